"""The inner loops of attention over cached rows: scores of a block of rows, and the weighted sum of one, for
one, two or four queries that read the same rows.

While a block is used, another one is prefetched line by line: keys ask for the values of their block, values
for the keys of the next, so that memory is read all the time and not only in one of the two loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from mapper_kernels.jit import intrinsic, jit
from mapper_kernels.sizes import POSITIONS, QUERIES
from mapper_kernels.vec import F16, F32, I8, I16, I32, Emitter, Value, vector

KV_FORMATS = ("f32", "f16", "bf16", "int8")
"""Formats of cached rows; the position is the code."""
KV_SIZES = (4, 2, 2, 1)
"""Bytes of an element, by code."""
_SUMS = 16
"""Sums that a loop carries: rows times queries."""
STREAMS = 4
"""Places at which a block is prefetched by turns."""
_LINE = 64
_WIDE = vector(F32, 16)


def _elements(e: Emitter, name: str, at: Value, left: Value | None) -> Value:
    """Sixteen elements as float32, or `left` of them and zeros."""
    b = e.b
    kind = vector({"f32": F32, "f16": F16, "bf16": I16, "int8": I8}[name], 16)
    raw = e.load(at, kind) if left is None else e.load_part(at, kind, e.mask(16, left))
    if name == "f32":
        return raw
    if name == "f16":
        return b.fpext(raw, _WIDE)
    if name == "bf16":
        return b.bitcast(b.shl(b.zext(raw, vector(I32, 16)), e.fill(I32, 16, 16)), _WIDE)
    return b.sitofp(raw, _WIDE)


def _transposed_sums(e: Emitter, rows: list[Value]) -> Value:
    """The sums of the lanes of sixteen vectors, as one vector."""
    width = 8
    while len(rows) > 1:
        half = len(rows) // 2
        made = []
        for a, b in zip(rows[:half], rows[half:], strict=True):
            # lanes come in runs of 2 * width; the first half of each run is added to the second
            low = [i for i in range(16) if i % (2 * width) < width]
            high = [i for i in range(16) if i % (2 * width) >= width]
            order_low = _merged(low, width)
            order_high = _merged(high, width)
            made.append(e.b.fadd(e.pick(a, order_low, b), e.pick(a, order_high, b)))
        rows, width = made, width // 2
    return rows[0]


def _merged(lanes: list[int], width: int) -> list[int]:
    """`lanes` of a and the same of b, in runs of `width` by turns."""
    runs = [lanes[i : i + width] for i in range(0, len(lanes), width)]
    return [lane for run in runs for lane in (*run, *(i + 16 for i in run))]


def _ahead(e: Emitter, base: Value, step: Value, line: Value) -> None:
    """Prefetch line number `line` of a block of POSITIONS rows, `step` bytes apart and without gaps.

    Lines are asked for in STREAMS places by turns: memory gives more to several streams than to one. They go
    to the second-level cache, because the first has no room for two blocks.
    """
    b = e.b
    stream, at = b.and_(line, e.number(STREAMS - 1)), b.ashr(line, e.number(STREAMS.bit_length() - 1))
    e.prefetch(e.at(base, (b.mul(stream, e.number(POSITIONS // STREAMS)), step), (_LINE, at)), 2)


def _emit_scores(e: Emitter, name: str, queries: int, args: Any) -> None:
    q, q_step, k, step, count, d, out, ahead, ahead_step = args
    size, tile = KV_SIZES[KV_FORMATS.index(name)], _SUMS // queries
    b = e.b
    wanted = b.icmp_signed("!=", ahead, e.number(0))
    full, rest = b.sdiv(d, e.number(16)), b.srem(d, e.number(16))

    def scores(first: Value, valid: Value | None) -> None:
        rows = []
        for i in range(tile):
            t = e.number(i)
            if valid is not None:  # a row that is not there is the last one that is
                last = b.sub(valid, e.number(1))
                t = b.select(b.icmp_signed("<", t, last), t, last)
            rows.append(e.at(k, (b.add(first, t), step)))

        def part(c: Value, left: Value | None, sums: list[Value]) -> list[Value]:
            def ask(_: list[Value]) -> list[Value]:
                # 16 elements of each row of this tile, as the lines of as many bytes
                lines = tile * size // 4
                before = b.add(b.mul(b.sdiv(first, e.number(tile)), full), c)
                for i in range(lines):
                    _ahead(e, ahead, ahead_step, e.at(e.number(i), (before, lines)))
                return []

            e.when(wanted, [], ask)
            xs = [_elements(e, "f32", e.at(q, (i, q_step), (64, c)), left) for i in range(queries)]
            made = list(sums)
            for i, row in enumerate(rows):
                y = _elements(e, name, e.at(row, (16 * size, c)), left)
                for j, x in enumerate(xs):
                    made[j * tile + i] = e.fma(x, y, made[j * tile + i])
            return made

        zero = [e.fill(F32, 16, 0.0)] * _SUMS
        sums = e.loop(e.number(0), full, zero, lambda c, now: part(c, None, now))
        some = b.icmp_signed(">", rest, e.number(0))
        sums = e.when(some, sums, lambda now: part(full, rest, now))
        found = _transposed_sums(e, sums)
        for j in range(queries):
            e.store(e.pick(found, range(j * tile, (j + 1) * tile)), e.at(out, (j, 4 * POSITIONS), (4, first)))

    whole = b.sdiv(count, e.number(tile))

    def body(i: Value, _: list[Value]) -> list[Value]:
        scores(b.mul(i, e.number(tile)), None)
        return []

    e.loop(e.number(0), whole, [], body)
    over = b.srem(count, e.number(tile))

    def tail(_: list[Value]) -> list[Value]:
        scores(b.mul(whole, e.number(tile)), over)
        return []

    e.when(b.icmp_signed(">", over, e.number(0)), [], tail)


def _emit_weigh(e: Emitter, name: str, queries: int, args: Any) -> None:
    p, v, step, count, d, factors, out, out_step, ahead, ahead_step = args
    size = KV_SIZES[KV_FORMATS.index(name)]
    b = e.b
    asked = b.icmp_signed("!=", ahead, e.number(0))

    def columns(c: Value, n: int, left: Value | None) -> None:
        """Columns 16 c.. of the sums, n times 16 of them."""
        base = e.at(v, (16 * size, c))

        def target(j: int, i: int) -> Value:
            return e.at(out, (j, out_step), (64, b.add(c, e.number(i))))

        def old(j: int, i: int) -> Value:
            wide = e.splat(e.load(e.at(factors, (j, 4)), F32), 16)
            at = target(j, i)
            known = e.load(at, _WIDE) if left is None else e.load_part(at, _WIDE, e.mask(16, left))
            return b.fmul(known, wide)

        def body(t: Value, now: list[Value]) -> list[Value]:
            def ask(_: list[Value]) -> list[Value]:
                # n times 16 elements of this row, as the lines of as many bytes
                lines = max(1, n * size // 4)
                before = e.at(b.mul(b.sdiv(c, e.number(n)), e.number(POSITIONS)), (t, 1))
                for i in range(lines):
                    _ahead(e, ahead, ahead_step, e.at(e.number(i), (before, lines)))
                return []

            e.when(asked, [], ask)
            made, row = list(now), e.at(base, (t, step))
            ys = [_elements(e, name, b.add(row, e.number(16 * size * i)), left) for i in range(n)]
            for j in range(queries):
                weight = e.splat(e.load(e.at(p, (j, 4 * POSITIONS), (4, t)), F32), 16)
                for i, y in enumerate(ys):
                    made[j * n + i] = e.fma(weight, y, made[j * n + i])
            return made

        start = [old(j, i) for j in range(queries) for i in range(n)]
        for number, total in enumerate(e.loop(e.number(0), count, start, body)):
            at = target(*divmod(number, n))
            if left is None:
                e.store(total, at)
            else:
                e.store_part(total, at, e.mask(16, left))

    def each(n: int) -> Callable[[Value, list[Value]], list[Value]]:
        def body(i: Value, _: list[Value]) -> list[Value]:
            columns(b.mul(i, e.number(n)), n, None)
            return []

        return body

    groups = b.sdiv(d, e.number(64))
    e.loop(e.number(0), groups, [], each(4))
    singles = b.sdiv(d, e.number(16))
    e.loop(b.mul(groups, e.number(4)), singles, [], each(1))
    rest = b.srem(d, e.number(16))

    def tail(_: list[Value]) -> list[Value]:
        columns(singles, 1, rest)
        return []

    e.when(b.icmp_signed(">", rest, e.number(0)), [], tail)


def _emit(what: Callable[..., None], name: str, builder: Any, args: Any) -> None:
    """The loop for as many queries as the first argument says."""
    e, (asked, *others) = Emitter(builder, False), args

    def made(queries: int) -> Callable[[list[Value]], list[Value]]:
        def body(_: list[Value]) -> list[Value]:
            what(e, name, queries, others)
            return []

        return body

    for queries in QUERIES:
        e.when(builder.icmp_signed("==", asked, e.number(queries)), [], made(queries))


def _scores(name: str) -> Callable[..., None]:
    @intrinsic
    def emitted(
        typingctx: Any, queries: Any, q: Any, q_step: Any, k: Any, step: Any, count: Any, d: Any, out: Any,
        ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(_emit_scores, name, builder, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), build

    @jit
    def _run(
        queries: int, q: int, q_step: int, k: int, step: int, count: int, d: int, out: int, ahead: int,
        ahead_step: int,
    ) -> None:  # fmt: skip
        emitted(queries, q, q_step, k, step, count, d, out, ahead, ahead_step)

    made: Callable[..., None] = _run
    return made


def _weigh(name: str) -> Callable[..., None]:
    @intrinsic
    def emitted(
        typingctx: Any, queries: Any, p: Any, v: Any, step: Any, count: Any, d: Any, factors: Any, out: Any,
        out_step: Any, ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(_emit_weigh, name, builder, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), build

    @jit
    def _run(
        queries: int, p: int, v: int, step: int, count: int, d: int, factors: int, out: int, out_step: int,
        ahead: int, ahead_step: int,
    ) -> None:  # fmt: skip
        emitted(queries, p, v, step, count, d, factors, out, out_step, ahead, ahead_step)

    made: Callable[..., None] = _run
    return made


_scores_f32, _scores_f16, _scores_bf16, _scores_int8 = (_scores(name) for name in KV_FORMATS)
_weigh_f32, _weigh_f16, _weigh_bf16, _weigh_int8 = (_weigh(name) for name in KV_FORMATS)


@jit
def scores(
    code: int, queries: int, q: int, q_step: int, k: int, step: int, count: int, d: int, out: int, ahead: int,
    ahead_step: int,
) -> None:  # fmt: skip
    """out [queries, POSITIONS] = q.k of `count` rows; q and k are `q_step` and `step` bytes apart. `queries`
    is one of QUERIES. The rows at `ahead`, where it is not 0, are prefetched."""
    if code == 0:
        _scores_f32(queries, q, q_step, k, step, count, d, out, ahead, ahead_step)
    elif code == 1:
        _scores_f16(queries, q, q_step, k, step, count, d, out, ahead, ahead_step)
    elif code == 2:
        _scores_bf16(queries, q, q_step, k, step, count, d, out, ahead, ahead_step)
    else:
        _scores_int8(queries, q, q_step, k, step, count, d, out, ahead, ahead_step)


@jit
def weigh(
    code: int, queries: int, p: int, v: int, step: int, count: int, d: int, factors: int, out: int,
    out_step: int, ahead: int, ahead_step: int,
) -> None:  # fmt: skip
    """out [queries][d] = out factors + p v for p [queries, POSITIONS] and `count` rows of v."""
    if code == 0:
        _weigh_f32(queries, p, v, step, count, d, factors, out, out_step, ahead, ahead_step)
    elif code == 1:
        _weigh_f16(queries, p, v, step, count, d, factors, out, out_step, ahead, ahead_step)
    elif code == 2:
        _weigh_bf16(queries, p, v, step, count, d, factors, out, out_step, ahead, ahead_step)
    else:
        _weigh_int8(queries, p, v, step, count, d, factors, out, out_step, ahead, ahead_step)
