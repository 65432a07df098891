"""Memory nodes: on a computer that has several, large memories lie on all of those that this process computes
on, by turns.

A page lies where the thread runs that first touches it. Weights are written by one thread, which would put
all of them on its own node, and every core would read through that node's memory alone. By turns, all cores
reach all nodes' bandwidth whichever part they read; which one that is changes with the phase and the format.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

SYSTEM = Path("/sys/devices/system")
_INTERLEAVE = 3
"""MPOL_INTERLEAVE of linux/mempolicy.h."""
_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, by machine (asm/unistd.h)."""
_WORD = 64


def spread(text: str) -> list[int]:
    """The numbers of a list such as 0-3,8. Raises ValueError."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def processors_by_node(system: Path = SYSTEM) -> dict[int, list[int]]:
    """Number of each memory node -> its processors; {} where the system does not say."""
    found = {}
    for path in sorted(system.glob("node/node[0-9]*/cpulist")):
        try:
            found[int(path.parent.name.removeprefix("node"))] = spread(path.read_text())
        except (OSError, ValueError):
            continue
    return found


def own_nodes(system: Path = SYSTEM) -> list[int]:
    """The memory nodes of the processors that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    own = os.sched_getaffinity(0)
    return [n for n, processors in processors_by_node(system).items() if own & set(processors)]


def mask_of(nodes: Sequence[int]) -> list[int]:
    """The nodes as bits of 64-bit words, lowest first."""
    words = [0] * (max(nodes) // _WORD + 1)
    for n in nodes:
        words[n // _WORD] |= 1 << n % _WORD
    return words


def bind(address: int, size: int, policy: int, words: Sequence[int]) -> bool:
    """The mbind(2) system call on whole pages; whether it was done."""
    number = _MBIND.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype, mask = ctypes.c_long, (ctypes.c_uint64 * len(words))(*words)
    # the kernel takes one bit less than it is told of
    bits = ctypes.c_ulong(_WORD * len(words) + 1)
    where, length = ctypes.c_void_p(address), ctypes.c_ulong(size)
    return int(call(ctypes.c_long(number), where, length, ctypes.c_ulong(policy), mask, bits, 0)) == 0


def interleave(
    address: int,
    size: int,
    nodes: Sequence[int],
    call: Callable[[int, int, int, Sequence[int]], bool] = bind,
) -> bool:
    """Ask that pages not yet touched lie on these nodes by turns; whether that was done. With fewer than two
    nodes nothing is to be done; a system that forbids it (containers may) keeps its own way."""
    return len(nodes) > 1 and call(address, size, _INTERLEAVE, mask_of(nodes))
