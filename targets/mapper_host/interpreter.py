"""The compiled interpreter: one call runs a whole serving program, step by step, on raw memory addresses.

`rows` holds one line per step: opcode, first argument, addresses of the operands. `args` are the arguments
of all steps, `floats` the same bytes as float64. The addresses and arguments must have been checked (see
`packed.py`): nothing is checked here but what depends on data: positions, tokens and indices.

Opcodes that only other graphs need are in `interpreter_general.py`, so that decoding does not wait for their
compilation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mapper_host.opcodes import (
    ACTIVATION,
    ATTEND_AT,
    CACHE_APPEND,
    CACHED_ATTENTION,
    COPY,
    EMBED_AT,
    EXPERTS_DOWN,
    EXPERTS_UP,
    GATE,
    GATHER,
    LINEAR_KN,
    LINEAR_NK,
    MERGE_SPLITS,
    NORM,
    PROJECT,
    ROPE_AT,
    ROUTE,
    VECTOR,
)
from mapper_kernels import attention, elementwise, experts, fused, gemm, index, norm, product, rope
from mapper_kernels.jit import entry, jit, splice
from mapper_kernels.memory import atomic_add, atomic_load, atomic_max, f32, f32_2d, f32_3d, f32_4d, i64
from mapper_kernels.split import SPINS, give_way, relax, share

BAD_POSITION, BAD_INDEX, BAD_OPCODE = 1, 2, 3
FAULTS = {
    BAD_POSITION: "the position is outside of the context that the program was made for",
    BAD_INDEX: "an index read from data is out of range",
    BAD_OPCODE: "unknown opcode",
}
"""What each fault number means. See `unpack`."""
SERVING = (
    ACTIVATION, CACHE_APPEND, CACHED_ATTENTION, COPY, EMBED_AT, GATE, GATHER, LINEAR_KN, LINEAR_NK, NORM,
    ROPE_AT,
    VECTOR, PROJECT, ATTEND_AT, MERGE_SPLITS, ROUTE, EXPERTS_UP, EXPERTS_DOWN,
)  # fmt: skip
"""Opcodes that `interpret` runs."""
SOURCES = [
    Path(__file__).with_name(f"{name}.py") for name in ("interpreter", "interpreter_general", "opcodes")
]
"""What the compiled interpreters are made from, besides the kernels."""
# typed numbers: a literal argument would compile the callee once more for that literal
_ONE: Any = np.int64(1)
_FOUR: Any = np.int64(4)


def unpack(result: int) -> tuple[int, int]:
    """(step, fault) of a result of an interpreter that is not 0."""
    return (result - 1) // 8, (result - 1) % 8


@jit
def _linear(op: int, r: Any, a: Any, part: int, parts: int) -> None:
    m, n, k, biased = a[0], a[1], a[2], a[3]
    x, y = f32_2d(r[0], m, k), f32_2d(r[3 if biased else 2], m, n)
    if op == LINEAR_NK:
        gemm.gemm_nk(x, f32_2d(r[1], n, k), y, part, parts)
    else:
        gemm.gemm_kn(x, f32_2d(r[1], k, n), y, part, parts)
    if biased:
        gemm.add_bias(y, f32(r[2], n), part, parts, 4 if op == LINEAR_NK else 16)


@jit
def _norm(r: Any, a: Any, f: Any, part: int, parts: int) -> None:
    rows, d, weighted, biased = a[0], a[1], a[3], a[4]
    weight = f32(r[1], d if weighted else 0)
    bias = f32(r[1 + weighted], d if biased else 0)
    y = f32_2d(r[1 + weighted + biased], rows, d)
    norm.norm(f32_2d(r[0], rows, d), weight, bias, y, a[2] != 0, f[5], f[6], part, parts)


@jit
def _rope_at(r: Any, a: Any, part: int, parts: int) -> int:
    rows, d, seq, length, rotary = a[0], a[1], a[2], a[3], a[4]
    past = i64(r[2], 1)[0]
    if past < 0 or past + seq > length:
        return BAD_POSITION
    table = f32_3d(r[1], 2, length, rotary // 2)
    x, y = f32_2d(r[0], rows, d), f32_2d(r[3], rows, d)
    rope.rope_at(x, table, y, seq, past, rotary, a[5] != 0, part, parts)
    return 0


@jit
def _cache_append(r: Any, a: Any, part: int, parts: int) -> int:
    heads, length, seq, d = a[0], a[1], a[2], a[3]
    past = i64(r[2], 1)[0]
    if past < 0 or past + seq > length:
        return BAD_POSITION
    low, high = share(heads, 1, part, parts)
    for h in range(low, high):
        index.move(r[1] + 4 * h * seq * d, r[3] + 4 * (h * length + past) * d, _FOUR, seq * d, _ONE, _ONE)
    return 0


@jit
def _cached_attention(r: Any, a: Any, f: Any, part: int, parts: int) -> int:
    b, h, s, d, hkv, length, dv = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    sinks, slopes = a[8], a[9]
    past = i64(r[3], 1)[0]
    if past < 0 or past + s > length:
        return BAD_POSITION
    attention.cached_attention(
        f32_4d(r[0], b, h, s, d), f32_4d(r[1], b, hkv, length, d), f32_4d(r[2], b, hkv, length, dv),
        f32(r[4], h if sinks else 0), f[13 : 13 + slopes], f32_4d(r[4 + sinks], b, h, s, dv),
        past, f[10], a[7], a[12], f[11], part, parts,
    )  # fmt: skip
    return 0


@jit
def _attend_at(r: Any, a: Any, f: Any, scratch: int, part: int, parts: int) -> int:
    past = i64(r[5], 1)[0]
    if past < 0 or past >= a[4]:
        return BAD_POSITION
    fused.attend_cached(r, a, f, past, scratch, part, parts)
    return 0


@jit
def _embed_at(r: Any, a: Any) -> int:
    rows, d, batch, seq, offset = a[0], a[1], a[2], a[3], a[4]
    first = i64(r[1], 1)[0] + offset
    if first < 0 or first + seq > rows:
        return BAD_POSITION
    for b in range(batch):
        index.move(r[0] + 4 * first * d, r[2] + 4 * b * seq * d, _FOUR, seq * d, _ONE, _ONE)
    return 0


@jit
def _copy(r: Any, a: Any, part: int, parts: int) -> None:
    size, n = a[0], a[1]
    x, y = r[0] + a[2] * size, r[1] + a[3] * size
    index.copy(x, y, size, a[4 : 4 + n], a[4 + n : 4 + 2 * n], a[4 + 2 * n : 4 + 3 * n], part, parts)


@jit
def _lookup(op: int, r: Any, a: Any) -> int:
    """Rows of tables, fetched by one thread."""
    if op == GATHER:
        bad = index.gather(r[0], r[1], a[1], r[2], a[0], a[2], a[3], a[4], a[5])
        return BAD_INDEX if bad != 0 else 0
    return _embed_at(r, a) if op == EMBED_AT else BAD_OPCODE


@jit
def meet(barrier: Any, arrivals: int, fault: int) -> Any:
    """Wait until `arrivals` threads have come; the first fault that any of them brought."""
    if fault != 0:
        atomic_max(barrier, 1, fault)
    atomic_add(barrier, 0, 1)
    spins = 0
    while atomic_load(barrier, 0) < arrivals:
        spins += 1
        relax()
        if spins > SPINS:
            give_way()
    return atomic_load(barrier, 1)


@splice
def _run(
    rows: Any, args: Any, floats: Any, begin: int, end: int, part: int, parts: int, barrier: Any, scratch: int
) -> Any:
    arrivals = 0
    for i in range(begin, end):
        first = rows[i, 1]
        op, r, a, f = rows[i, 0], rows[i, 2:], args[first:], floats[first:]
        fault = 0
        if op == PROJECT:
            fused.project(r, a, f, scratch, part, parts)
        elif op == ATTEND_AT:
            fault = _attend_at(r, a, f, scratch, part, parts)
        elif op == MERGE_SPLITS:
            fused.merge_splits(r, a, part, parts)
        elif op in (LINEAR_NK, LINEAR_KN):
            _linear(op, r, a, part, parts)
        elif op == NORM:
            _norm(r, a, f, part, parts)
        elif op == ROPE_AT:
            fault = _rope_at(r, a, part, parts)
        elif op == CACHE_APPEND:
            fault = _cache_append(r, a, part, parts)
        elif op == CACHED_ATTENTION:
            fault = _cached_attention(r, a, f, part, parts)
        elif op == GATE:
            product.gate(a[1], f32(r[0], a[0]), f32(r[1], a[0]), f32(r[2], a[0]), part, parts)
        elif op == ACTIVATION:
            product.activation(a[1], f32(r[0], a[0]), f32(r[1], a[0]), part, parts)
        elif op == VECTOR:
            elementwise.vector(a[0], r[0], r[1], r[2], a[1], a[2] != 0, part, parts)
        elif op == COPY:
            _copy(r, a, part, parts)
        elif op in (EXPERTS_UP, EXPERTS_DOWN):
            known = experts.experts(op == EXPERTS_UP, r, a, f, scratch, part, parts)
            fault = 0 if known else BAD_INDEX
        elif op == ROUTE:
            experts.route_rows(r, a, f, part, parts)
        elif part == 0:
            fault = _lookup(op, r, a)
        if parts > 1:
            arrivals += parts
            failed = meet(barrier, arrivals, 0 if fault == 0 else 8 * i + fault + 1)
            # a faster thread may have failed in the next step already; it waits there for this one
            if failed != 0 and (failed - 1) // 8 <= i:
                return failed
        elif fault != 0:
            return 8 * i + fault + 1
    return 0


GENERATION, BEGIN, END, PARTS, FINISHED, STOP = range(6)
"""Fields of the control block that a team of threads shares: see `member`."""
CONTROL = 8


@jit
def _wait(control: Any, seen: int, patience: int) -> Any:
    """The generation, once it is no longer `seen`; `seen` after `patience` looks, -1 when STOP is set."""
    looks = 0
    while True:
        now = atomic_load(control, GENERATION)
        if now != seen:
            return now
        if atomic_load(control, STOP) != 0:
            return np.int64(-1)
        looks += 1
        if looks > patience:
            return seen
        relax()
        if looks > SPINS:
            give_way()


@entry(*SOURCES)
def member(
    rows: Any,
    args: Any,
    floats: Any,
    control: Any,
    barrier: Any,
    scratch: int,
    part: int,
    seen: int,
    patience: int,
) -> Any:
    """Run steps control[BEGIN]..control[END] - 1 as thread `part` of control[PARTS].

    Thread 0 runs them once, waits for the others, and returns 0, or which step failed and how (see
    `unpack`). Any other runs them each time control[GENERATION] moves on from `seen`; it returns the last
    generation that it ran when nothing has happened for `patience` looks, or -1 when control[STOP] is set.

    rows int64 [n, 2 + OPERANDS]; args int64 [m]; floats: args as float64; control int64 [CONTROL] and
    barrier int64 [2] (arrivals, and the first fault; zero at first) are shared; scratch: address of memory
    of this thread's own, as much as `scratch.scratch_bytes` says. One function for both roles, because its
    compilation is what takes long.
    """
    while True:
        if part != 0:
            now = _wait(control, seen, patience)
            if now < 0 or now == seen:
                return now
            seen = now
        parts = control[PARTS]
        result = _run(rows, args, floats, control[BEGIN], control[END], part, parts, barrier, scratch)
        if part == 0:
            looks = 0
            while atomic_load(control, FINISHED) < parts - 1:
                looks += 1
                relax()
                if looks > SPINS:
                    give_way()
            return result
        atomic_add(control, FINISHED, 1)
