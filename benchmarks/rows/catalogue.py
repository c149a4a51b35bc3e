"""All rows by name, C1 to C11."""

from __future__ import annotations

from . import plane, served

DECLARED = {row.name: row for row in (*plane.ROWS, *served.ROWS)}
"""Rows of comparisons between arms."""

NAMES = tuple(f"C{number}" for number in range(1, 12))
