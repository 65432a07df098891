"""Names that a user may have meant, for errors about names that are not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST = 3
_LEAST = 0.6
"""The least similarity (`difflib`, 0..1) of a name that is worth a hint."""
_LONGEST = 60
"""Characters that are compared; no known name is longer."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean A, B?" with up to three known names, or "" where none is near.

    Names that begin with what was typed come alone: h200 means h200-sxm, though gh200 differs in less.
    """
    typed = name[:_LONGEST].lower()
    names = {k.lower(): k for k in known}
    whole = [k for k in names if typed and k.startswith(typed)]
    close = difflib.get_close_matches(typed, whole or names, _MOST, 0 if whole else _LEAST)
    return f"; did you mean {', '.join(names[k] for k in close)}?" if close else ""
