"""Writing of text files: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mapper.errors import MapperError


def write_whole(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; a file that was there stays as it was unless all could be written.

    Raises MapperError where it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a terminal or a pipe cannot be replaced
            return
        target = Path(os.path.realpath(path))
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            made = Path(file.name)
        try:
            made.write_text(text, encoding="utf-8")
            made.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
            made.replace(target)
        finally:
            made.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise MapperError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
