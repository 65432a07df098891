"""Free memory within control groups, from trees of files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapper.runtime.free_memory import available_memory

GB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    """A folder with these files."""
    for name, text in files.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return root


def system(gigabytes: int, groups: str) -> dict[str, str]:
    """What the kernel says of itself and of a process."""
    return {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:  {gigabytes << 20} kB\n",
        "proc/self/cgroup": groups,
    }


def group(limit: str, used: int, cached: int = 0) -> dict[str, str]:
    """Files of a group of version 2."""
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 1\ninactive_file {cached}\n",
    }


def at(place: str, files: dict[str, str]) -> dict[str, str]:
    """Files below a folder."""
    return {f"sys/fs/cgroup{place}/{name}": text for name, text in files.items()}


def test_without_groups_the_system_counts(tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, system(9, ""))) == 9 * GB
    assert available_memory(tmp_path / "nothing") == 0


@pytest.mark.parametrize("outer, expected", [("max", 3 * GB), (str(2 * GB), GB)])
def test_the_tightest_group_counts(tmp_path: Path, outer: str, expected: int) -> None:
    root = tree(
        tmp_path,
        system(9, "0::/a/b\n")
        | at("/a/b", group(str(5 * GB), 3 * GB, GB))
        | at("/a", group(outer, 2 * GB, GB)),
    )
    assert available_memory(root) == expected


def test_a_limit_above_what_the_system_has(tmp_path: Path) -> None:
    root = tree(tmp_path, system(2, "0::/a\n") | at("/a", group(str(50 * GB), 0)))
    assert available_memory(root) == 2 * GB


def test_version_1(tmp_path: Path) -> None:
    first = {
        "memory.limit_in_bytes": str(4 * GB),
        "memory.usage_in_bytes": str(GB),
        "memory.stat": "cache 7\ninactive_file 0\n",
    }
    groups = "5:cpu,cpuacct:/c\n4:memory:/m\n"
    assert available_memory(tree(tmp_path, system(9, groups) | at("/memory/m", first))) == 3 * GB


def test_in_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    root = tree(tmp_path, system(9, "0::/docker/1234\n") | at("", group(str(GB), 0)))
    assert available_memory(root) == GB


def test_more_used_than_allowed(tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, system(9, "0::/\n") | at("", group(str(GB), 2 * GB)))) == 0
