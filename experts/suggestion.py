"""What is said of a name that is not known: the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Text for the end of a message: the known name that is closest, or all of them after `otherwise` if that is given.

    suggestion("newz", ["news"], "it serves") is " (did you mean 'news'?)", of ["waves"] it is "; it serves waves".
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f"; {otherwise} {', '.join(names)}" if otherwise else ""
