"""Suggestions for unknown names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message: the closest known name, else `otherwise`, if not empty, and all known names.

    suggestion("newz", ["news"], "it serves") is " (did you mean 'news'?)"; with ["waves"] it is "; it serves waves".
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f"; {otherwise} {', '.join(names)}" if otherwise else ""
