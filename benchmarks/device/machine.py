"""The first line: what machine this is."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys

import torch

from benchmarks.device.group import Row, in_a_line

FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "pstate")


def described(device: torch.device) -> Row:
    """Names and versions; what can't be read is left out or says why."""
    row: Row = {
        "group": "machine",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "numpy": importlib.util.find_spec("numpy") is not None,
        "triton": importlib.util.find_spec("triton") is not None,
        "muon": hasattr(torch.optim, "Muon"),
    }
    if device.type != "cuda":
        return row | {"device": "CPU"}
    try:
        found = torch.cuda.get_device_properties(device)
        row |= {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": found.total_memory / 2**30,
        }
    except Exception as error:
        row["error"] = in_a_line(error)
    return row | _asked()


def _asked() -> Row:
    """Of nvidia-smi: driver, clocks and limits."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"driver": None}
    command = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver": None, "nvidia_smi": in_a_line(error)}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(("driver", *FIELDS[1:]), values))
