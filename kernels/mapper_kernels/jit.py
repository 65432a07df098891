"""The one way in which this package compiles: typed decorators around numba.njit with a cache that is never
stale."""

from __future__ import annotations

import fcntl
import hashlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import extending
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])
SAFE = {"contract", "nsz", "arcp", "reassoc", "afn"}
"""Fast-math flags that keep NaN and infinity meaningful: reassociation and fused multiply-add only."""


@cache
def digest(source: Path) -> str:
    """Hash of a source file, or of all sources of a package's folder."""
    state = hashlib.sha256()
    for path in sorted(source.glob("*.py")) if source.is_dir() else [source]:
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


_made: Counter[tuple[str, str]] = Counter()


def _set_apart(function: Callable[..., Any]) -> None:
    """Give every function that a factory makes a name of its own: the same in every process.

    Numba's symbols are a function's qualified name and a number that it counts from 1 in every process, as
    functions are compiled. Two cached entry points that were compiled by different processes hold different
    functions of one factory under one symbol; where both are loaded, the linker takes one for the other.
    """
    key = function.__module__, function.__qualname__
    function.__qualname__ += f"_{_made[key]}" if _made[key] else ""
    _made[key] += 1


def _compiled(function: F, **options: Any) -> F:
    _set_apart(function)
    # private functions are called from compiled code only: without wrappers they compile faster
    bare = function.__name__.startswith("_") or "forceinline" in options
    options |= {"error_model": "numpy", "no_cpython_wrapper": bare, "no_cfunc_wrapper": True}
    compiler: Any = numba.njit
    return cast(F, compiler(**options)(function))


def intrinsic(function: Callable[..., Any]) -> Any:
    """numba.extending.intrinsic: code for the compiler, called without the typing context."""
    return extending.intrinsic(function)


def jit(function: F) -> F:
    """Compile with exact floating-point semantics. Not cached on its own: it is linked into its callers."""
    return _compiled(function)


def fast(function: F) -> F:
    """Compile with reassociation and fused multiply-add (SAFE). Not cached on its own."""
    return _compiled(function, fastmath=SAFE)


def entry(*sources: Path) -> Callable[[F], F]:
    """Compile a function that Python calls: releases the GIL, and is cached on disk for later processes.

    The compiled form also depends on callees in other files, which Numba's own staleness test does not see;
    the cache is therefore stamped with a hash of all sources in this package and of `sources`.
    """

    def wrap(function: F) -> F:
        compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
        _separate(compiled, tuple(digest(f) for f in (Path(__file__).parent, *sources)))
        return cast(F, compiled)

    return wrap


def _separate(compiled: Any, stamp: tuple[str, ...]) -> None:
    """Give the disk cache of a function files of its own per version of the sources, and one writer at once.

    Numba numbers the data files of a function. Two processes that save at the same time, or that run other
    versions of the sources, would take the same number, and a third would run machine code that is not
    what it asked for.
    """
    known = compiled._cache
    if not hasattr(known, "_cache_file"):
        return  # no folder to cache in
    version = hashlib.sha256("".join(stamp).encode()).hexdigest()[:16]
    base = f"{known._impl.filename_base}-{version}"
    cache_file: Any = caching.IndexDataCacheFile
    file = cache_file(known._cache_path, base, stamp)
    save = file.save

    def save_alone(key: Any, data: Any) -> None:
        Path(known._cache_path).mkdir(parents=True, exist_ok=True)
        with (Path(known._cache_path) / f"{base}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            save(key, data)

    file.save = save_alone
    known._cache_file = file


def inline(function: F) -> F:
    """Compile and always inline into the caller: for tiny functions in hot loops."""
    return _compiled(function, fastmath=SAFE, forceinline=True)


def splice(function: F) -> F:
    """Put the function's code into its callers before types are known. A function that calls large ones costs
    the compiler another pass over all of them; this one does not."""
    _set_apart(function)
    compiler: Any = numba.njit
    return cast(F, compiler(inline="always", error_model="numpy")(function))
