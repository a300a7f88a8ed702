"""`python -m benchmarks`; `--help` lists the options."""

from __future__ import annotations

from benchmarks.run import main

if __name__ == "__main__":
    main()
