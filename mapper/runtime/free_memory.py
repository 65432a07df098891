"""How much memory a process may still take: what the system has, within the limits of control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_FILES = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""The file of a group's limit -> the file of what it uses; control groups version 2, version 1."""


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that can be had without pushing anything out, as the system estimates it, and no more than the
    control groups of this process leave; 0 where the system does not say. `root` holds proc and sys."""
    found = _free(root / "proc/meminfo")
    return max(0, min([found, *_left(root)]))


def _free(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _left(root: Path) -> Iterator[int]:
    """What each group that this process is in, and those around it, has left; cached files can be dropped."""
    for group in _groups(root):
        for limit, usage in _FILES.items():
            try:
                most = (group / limit).read_text().strip()
                if most != "max":
                    yield int(most) - int((group / usage).read_text()) + _cached(group)
            except (OSError, ValueError):
                continue


def _groups(root: Path) -> Iterator[Path]:
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mounted / "memory" if controllers else mounted
        place = top / name.strip("/")
        yield place
        # in a container the group may be mounted as the root, under another name than the process sees
        yield from (p for p in place.parents if p.is_relative_to(top))


def _cached(group: Path) -> int:
    """Bytes of files that the group holds and has not used lately."""
    for line in (group / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
