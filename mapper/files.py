"""Writing of files, whole or not at all, and where those go that can be made again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mapper.errors import MapperError


def write_whole(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; a file that was there stays as it was unless all could be written.

    Raises MapperError where it cannot be written.
    """
    try:
        with writing(path) as stream:
            stream.write(text.encode("utf-8"))
    except ValueError as error:  # of the text, or of the path
        raise MapperError(f"cannot write {path}: {error}") from error


def cache_folder() -> Path:
    """Where what can be made again is kept: $MAPPER_CACHE, or mapper in the user's cache folder."""
    own = os.environ.get("MAPPER_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mapper"


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content becomes `path` once it is complete; behind links, the file that they name.

    Raises MapperError where it cannot be written.
    """
    made: Path | None = None
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:  # a terminal or a pipe cannot be replaced
                yield stream
            return
        target = Path(os.path.realpath(path))
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            made = Path(file.name)
            yield file.file
        made.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        made.replace(target)
    except OSError as error:
        raise MapperError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
