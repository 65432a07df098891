"""Memory nodes, from a fake tree of files, and the system call itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mapper.runtime import numa
from mapper.runtime.memories import HUGE, empty


def tree(root: Path, nodes: dict[int, str]) -> Path:
    """A system with these nodes and their processors."""
    for n, processors in nodes.items():
        folder = root / f"node/node{n}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(processors + "\n")
    return root


def test_lists() -> None:
    assert numa.spread("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert numa.spread("\n") == []


def test_nodes_of_a_system(tmp_path: Path) -> None:
    found = numa.processors_by_node(tree(tmp_path, {0: "0-1", 1: "2,3", 7: ""}))
    assert found == {0: [0, 1], 1: [2, 3], 7: []}
    assert numa.processors_by_node(tmp_path / "nothing") == {}


def test_only_nodes_that_the_process_computes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tree(tmp_path, {0: "0-1", 1: "2-3", 2: "4-5"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert numa.own_nodes(system) == [0, 2]


def test_words_of_a_mask() -> None:
    assert numa.mask_of([0, 2]) == [0b101]
    assert numa.mask_of([1, 64, 130]) == [2, 1, 4]


def test_several_nodes_are_asked_for_once_and_one_not_at_all() -> None:
    calls: list[tuple[int, int, int, list[int]]] = []

    def call(address: int, size: int, policy: int, words: Sequence[int]) -> bool:
        calls.append((address, size, policy, list(words)))
        return True

    assert numa.interleave(4096, 8192, [0, 1], call)
    assert not numa.interleave(4096, 8192, [0], call)
    assert not numa.interleave(4096, 8192, [], call)
    assert calls == [(4096, 8192, 3, [3])]


def test_large_memories_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("mapper.runtime.memories.own_nodes", lambda: [0, 1])
    monkeypatch.setattr("mapper.runtime.memories.interleave", lambda at, size, nodes: asked.append(size))
    made = empty(HUGE)
    empty(HUGE - 1)
    made[:] = 7
    assert asked == [HUGE]


def test_the_system_call() -> None:
    """On a computer with one node: pages bound to it "by turns" are listed so by the kernel."""
    nodes = numa.own_nodes()
    listed = Path("/proc/self/numa_maps")
    if not nodes or not listed.exists():
        pytest.skip("the system does not tell its memory nodes")
    made = empty(HUGE)
    if not numa.bind(made.ctypes.data, HUGE, 3, numa.mask_of(nodes)):
        pytest.skip("the system forbids mbind")
    made[:] = 1
    lines = [line.split() for line in listed.read_text().splitlines()]
    policy = {int(start, 16): p for start, p, *_ in lines}
    assert policy[made.ctypes.data].startswith("interleave")
    assert np.all(made == 1)
