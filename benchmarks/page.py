"""Tables in a page of docs/: the script that makes them writes them, and a test compares."""

from __future__ import annotations

from collections.abc import Mapping


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part between its two marks, in the place of what stood there.

    Raises:
        ValueError: a mark is missing.

    >>> print(filled("a <!-- x -->old<!-- end of x --> b", {"x": "new"}))
    a <!-- x -->
    <BLANKLINE>
    new
    <BLANKLINE>
    <!-- end of x --> b
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page has no place for {name!r}: write {begin} and {end} there")
        page = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    return page
