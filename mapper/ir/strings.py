"""String literals of the text form, checked before the parser sees them.

The parser's own pattern for a string takes exponential time on one that is not closed, or has an escape that
it does not know; this one is linear (possessive quantifiers).
"""

from __future__ import annotations

import re

from mapper.errors import ModelError

_PARTS = re.compile(
    r"""
      [^"/]++ | //[^\n]*+ | /                                       # anything else; comments
    | "(?: [^"\\\n\v\f]++ | \\ (?: ["nt\\] | [0-9A-Fa-f]{2} ) )*+"  # a string of MLIR's syntax
    """,
    re.VERBOSE,
)


def check_strings(text: str) -> None:
    """Raises ModelError naming the line of a string literal that is not closed or not well formed."""
    at = 0
    while at < len(text):
        match = _PARTS.match(text, at)
        if match is None:
            line = text.count("\n", 0, at) + 1
            raise ModelError(
                f"not a dataflow module: line {line}: a string is not closed or has an unknown escape"
            )
        at = match.end()
