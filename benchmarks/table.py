"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def report(results: Mapping[str, Any]) -> str:
    """The whole file, from what the JSON holds."""
    lines = [f"# Benchmarks: {results['device']}", ""]
    lines += ["Written by `python -m benchmarks`. ms are medians [quartiles] ×runs.", ""]
    for section in results["sections"].values():
        quick = ", a quick run, to see whether it works" if section["quick"] else ""
        lines += [f"## {section['title']}", "", section["about"], ""]
        dates = [cell["when"] for cell in section["cells"].values()]
        lines += [f"{min(dates)} to {max(dates)}, {section['where']}{quick}.", ""]
        lines += [*section_table(section), ""]
    return "\n".join(lines)


def section_table(section: Mapping[str, Any]) -> list[str]:
    """The lines of one section's table."""
    return table(rows_of(section), section["columns"])


def rows_of(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of all its cells."""
    return [row for cell in section["cells"].values() for row in cell["rows"]]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of a Markdown table; columns without a value in any row are left out.

    >>> table([{"x": 1.0}], [{"key": "x", "header": "x", "form": "number"}])
    ['| x |', '|--:|', '| 1.00 |']
    """
    used = [c for c in columns if any(row.get(c["key"]) is not None for row in rows)]
    left = [c["form"] == "text" for c in used]
    lines = ["| " + " | ".join(c["header"] for c in used) + " |"]
    lines += ["|" + "|".join("---" if text else "--:" for text in left) + "|"]
    for row in rows:
        values = [written(row.get(c["key"]), c["form"]) for c in used]
        lines.append("| " + " | ".join(values) + " |")
    return lines


def written(value: Any, form: str) -> str:
    """One value in its column's form; nothing for None.

    >>> written(0.5, "share"), written(2**20, "bytes"), written(1234.5, "number")
    ('50 %', '1 MiB', '1,234')
    """
    if value is None:
        return ""
    if form == "ms":
        spread = f"[{_short(value['ms_low'])}, {_short(value['ms_high'])}]"
        return f"{_short(value['ms'])} {spread} ×{value['runs']}"
    if form == "share":
        return f"{100 * value:.0f} %"
    if form == "bytes":
        for unit, size in UNITS:
            if value >= 0.98 * size:
                return f"{value / size:.3g} {unit}"
        return f"{value} B"
    if form == "error":
        return f"{value:.1e}"
    return _short(value) if form == "number" else str(value)


def _short(x: float) -> str:
    """Three digits.

    >>> _short(0.01234), _short(3.14159), _short(56.78)
    ('0.0123', '3.14', '56.8')
    """
    if x == 0 or abs(x) >= 100:
        return f"{x:,.0f}"
    digits = 3 - len(f"{abs(x):.0f}") if abs(x) >= 1 else 2
    return f"{x:.{max(digits, 0)}f}" if abs(x) >= 0.1 else f"{x:.3g}"
