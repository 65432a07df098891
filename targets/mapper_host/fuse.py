"""Fusion of steps, after lowering: what one kernel can do without bringing it to memory and waiting for the
others.

    rope_at, cache_append, cached_attention  -> attend_at     (one new token)
    norm -> project                          -> project with a norm
    projects of the same x                   -> one project
    project -> vector add                    -> project with a residual
    project -> activation                    -> project with an activation

A step goes where the last of its parts was, or, for products of the same x, where the first was. A value
that disappears must be a temporary, written once and read by the steps that take it in alone; and what a
step reads must not be written between its old place and its new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mapper_host.lower import Lowered
from mapper_host.opcodes import (
    ACTIVATION,
    ATTEND_AT,
    CACHE_APPEND,
    CACHED_ATTENTION,
    MERGE_SPLITS,
    NORM,
    PROJECT,
    ROPE_AT,
    VECTOR,
)
from mapper_host.program import BlockSteps, Slice, Step, Storage, step
from mapper_kernels.names import EPILOGUES, NORMS, PROJECT_HEAD

_NORM, _EPILOGUE, _ACT, _COUNT = 2, 7, 8, 9
_MOST = 3
"""Matrices of one product."""
_PLAIN = EPILOGUES.index("plain")
_LONG, _ITEMS = 512, 8
"""Caches of this many rows are split where there are fewer than so many (sequence, key head) pairs to
share."""


@dataclass(eq=False)
class _Uses:
    """Where each storage is read and written: (block, step)."""

    reads: dict[Storage, list[Step]] = field(default_factory=dict)
    writes: dict[Storage, list[Step]] = field(default_factory=dict)

    @staticmethod
    def of(blocks: list[BlockSteps]) -> _Uses:
        """All uses in a program."""
        found = _Uses()
        for block in blocks:
            for one in block.steps:
                for table, slices in ((found.reads, one.reads), (found.writes, one.writes)):
                    for storage in dict.fromkeys(s.storage for s in slices):
                        table.setdefault(storage, []).append(one)
        return found


@dataclass(eq=False)
class _Fusion:
    """One block being fused. `doer`: op -> op whose steps do its work now."""

    block: BlockSteps
    uses: _Uses
    doer: dict[int, int]
    bound: frozenset[Storage]

    @property
    def steps(self) -> list[Step]:
        """The block's steps."""
        return self.block.steps

    def place(self, one: Step) -> int:
        """Position of a step in the block, or -1."""
        return next((i for i, s in enumerate(self.steps) if s is one), -1)

    def inner(self, storage: Storage, readers: int) -> list[Step] | None:
        """The steps that read a temporary, in order, if it is written once, here, before they read it here;
        `readers` of them (0: any number)."""
        writes, reads = self.uses.writes.get(storage, []), self.uses.reads.get(storage, [])
        if storage.memory != "arena" or storage in self.bound or len(writes) != 1 or not reads:
            return None
        places = [self.place(s) for s in (writes[0], *reads)]
        if min(places) < 0 or min(places[1:]) <= places[0] or (readers and len(reads) != readers):
            return None
        return reads

    def untouched(self, slices: list[Slice], begin: int, end: int) -> bool:
        """Whether no step at begin..end - 1 writes what the slices hold."""
        mine = {s.storage for s in slices}
        return not any(w.storage in mine for s in self.steps[begin:end] for w in s.writes)

    def put(self, at: int, new: Step, gone: list[Step]) -> None:
        """Replace step number `at` by `new` and drop the others that it takes in."""
        old = self.steps[at]
        taken = [old, *(s for s in gone if s is not old)]
        for one in taken:
            if one.op >= 0 and one.op != new.op and new.op >= 0:
                self.doer[one.op] = new.op
        self.steps[at] = new
        for one in taken[1:]:
            self.steps.remove(one)
        for table, kind in ((self.uses.reads, "reads"), (self.uses.writes, "writes")):
            for one in taken:
                for storage in {s.storage for s in getattr(one, kind)}:
                    table[storage] = [s for s in table[storage] if s is not one]
            for storage in dict.fromkeys(s.storage for s in getattr(new, kind)):
                table.setdefault(storage, []).append(new)

    def insert(self, at: int, new: Step) -> None:
        """Put one more step before step number `at`."""
        self.steps.insert(at, new)
        for table, slices in ((self.uses.reads, new.reads), (self.uses.writes, new.writes)):
            for storage in dict.fromkeys(s.storage for s in slices):
                table.setdefault(storage, []).append(new)


def fuse(work: Lowered) -> dict[int, int]:
    """Fuse the steps of a program in place; for each op whose work another op's steps do now, that op."""
    uses, doer = _Uses.of(work.blocks), dict[int, int]()
    for block in work.blocks:
        bound = {s for b in work.blocks for s, to in b.bindings.items() for s in (s, *to)}
        fusion = _Fusion(block, uses, doer, frozenset(bound))
        for rule in (_attend, _normed, _together, _epilogue):
            for old in list(block.steps):
                if fusion.place(old) >= 0:
                    rule(fusion, old)
    return {op: _last(doer, by) for op, by in doer.items()}


def _last(doer: dict[int, int], op: int) -> int:
    while op in doer:
        op = doer[op]
    return op


def _normed(f: _Fusion, norm: Step) -> None:
    """Take a norm into the products that read its result, where nothing else does."""
    if norm.opcode != NORM:
        return
    rows, d, centred, weighted, biased, eps, offset = norm.args
    readers = f.inner(norm.writes[0].storage, 0)
    begin = f.place(norm)
    if readers is None or any(
        s.opcode != PROJECT
        or s.args[_NORM]
        or s.args[:2] != (rows, d)
        or any(r.storage is norm.writes[0].storage for r in s.reads[1:])
        or not f.untouched(norm.reads, begin, f.place(s))
        for s in readers
    ):
        return
    for reader in list(readers):
        kind = NORMS.index("layer" if centred else "rms")
        args = (rows, d, kind, weighted, biased, eps, offset, *reader.args[_EPILOGUE:])
        new = replace(
            reader, args=args, reads=[*norm.reads, *reader.reads[1:]],
            flops=reader.flops + norm.flops, bytes=reader.bytes + sum(r.bytes for r in norm.reads[1:]),
        )  # fmt: skip
        f.put(f.place(reader), new, [norm] if reader is readers[-1] else [])
        if norm.op >= 0 and reader.op >= 0:
            f.doer[norm.op] = reader.op


def _together(f: _Fusion, first: Step) -> None:
    """Make plain products of the same x one step."""
    if first.opcode != PROJECT or first.args[_EPILOGUE] != _PLAIN:
        return
    entry = 1 + (first.args[3] + first.args[4] if first.args[_NORM] else 0)
    at = f.place(first)
    parts = [first]
    for other in f.steps[at + 1 :]:
        alike = (
            other.opcode == PROJECT
            and other.args[: _EPILOGUE + 1] == first.args[: _EPILOGUE + 1]
            and other.reads[:entry] == first.reads[:entry]
            and sum(p.args[_COUNT] for p in parts) + other.args[_COUNT] <= _MOST
            and f.untouched(other.reads, at, f.place(other))
            and not _touched(f, other.writes, at, f.place(other))
        )
        if alike:
            parts.append(other)
    if len(parts) == 1:
        return
    args = [*first.args[:_COUNT], sum(p.args[_COUNT] for p in parts)]
    for p in parts:
        args += p.args[PROJECT_HEAD:]
    reads = [*first.reads[:entry], *(r for p in parts for r in p.reads[entry:])]
    writes = [w for p in parts for w in p.writes]
    shared = sum(r.bytes for r in first.reads[:entry]) * (len(parts) - 1)
    moved = sum(p.bytes for p in parts) - shared
    norms = 8 * first.args[0] * first.args[1] if first.args[_NORM] else 0
    flops = sum(p.flops for p in parts) - norms * (len(parts) - 1)
    new = Step(PROJECT, tuple(args), reads, writes, first.op, moved, flops)
    f.put(at, new, parts[1:])


def _touched(f: _Fusion, slices: list[Slice], begin: int, end: int) -> bool:
    mine = {s.storage for s in slices}
    return any(r.storage in mine for s in f.steps[begin:end] for r in (*s.reads, *s.writes))


def _epilogue(f: _Fusion, one: Step) -> None:
    """Take a residual sum or an activation behind a product into it."""
    if one.opcode != PROJECT or one.args[_EPILOGUE] != _PLAIN or one.args[_COUNT] != 1:
        return
    made = one.writes[0].storage
    readers = f.inner(made, 1)
    if readers is None or not f.untouched(one.reads, f.place(one), f.place(readers[0])):
        return
    after = readers[0]
    args = list(one.args)
    items = args[0] * args[PROJECT_HEAD]
    extra: list[Slice] = []
    if after.opcode == ACTIVATION:
        args[_EPILOGUE], args[_ACT] = EPILOGUES.index("activation"), after.args[1]
    elif after.opcode == VECTOR and after.args == (0, items, 0):
        extra = [r for r in after.reads if r.storage is not made]
        args[_EPILOGUE] = EPILOGUES.index("residual")
        if len(extra) != 1:
            return
    else:
        return
    moved = one.bytes + sum(r.bytes for r in extra)
    new = Step(
        PROJECT, tuple(args), [*one.reads, *extra], after.writes, one.op, moved, one.flops + after.flops
    )
    f.put(f.place(after), new, [one])


def _attend(f: _Fusion, one: Step) -> None:
    """Make the attention of one new token one step with the rotation of query and key, and the appending."""
    if one.opcode != CACHED_ATTENTION or one.args[2] != 1:
        return
    b, h, _, d, kv, length, dv, window, sinks, slopes, scale, softcap, chunk, *bias = one.args
    q, keys, values, past, *sink = one.reads
    appended = [_appends(f, cache, past, one) for cache in (keys, values)]
    if appended[0] is None or appended[1] is None or appended[0] is appended[1]:
        return
    new_key, new_value = (a.reads[1] for a in appended if a is not None)
    gone = [a for a in appended if a is not None]
    turns = [_rotation(f, s, past) for s in (q, new_key)]
    rotary = interleaved = rows = 0
    table: list[Slice] = []
    if all(t is not None for t in turns):
        both = [t for t in turns if t is not None]
        if both[0].args[3:] != both[1].args[3:] or both[0].reads[1] != both[1].reads[1]:
            return
        rows, rotary, interleaved = both[0].args[3:6]
        q, new_key, table = both[0].reads[0], both[1].reads[0], [both[0].reads[1]]
        gone += both
    elif any(t is not None for t in turns):
        return
    splits = 1 if length < _LONG else max(1, -(-_ITEMS // (b * kv)))
    begin, end = min(f.place(s) for s in gone), f.place(one)
    caches = {keys.storage, values.storage}
    others = {x.storage for s in f.steps[begin:end] if s not in gone for x in (*s.reads, *s.writes)}
    late = ([r for r in s.reads if r.storage not in caches] for s in gone)
    if others & caches or not all(f.untouched(r, f.place(s), end) for s, r in zip(gone, late, strict=True)):
        return
    args = [
        b, h, d, kv, length, dv, window, sinks, slopes, scale, softcap, rotary, interleaved, rows,
        splits, 0, chunk, *bias,
    ]  # fmt: skip
    y = one.writes[0]
    if splits > 1:
        size = 4 * b * h * splits * (dv + 2)
        y = Slice(Storage(f"{one.writes[0].storage.name}.parts", size), 0, size)
    operands = [q, new_key, new_value, keys, values, past, *table, *sink]
    reads = sum(s.bytes for s in (q, new_key, new_value, keys, values))
    moved = reads + new_key.bytes + new_value.bytes + y.bytes + 4 * rotary
    flops = one.flops + sum(s.flops for s in gone)
    new = step(ATTEND_AT, args, [*operands, keys, values, y], 3, one.op, flops, moved)
    f.put(f.place(one), new, gone)
    if splits > 1:
        last = [b * h, h, splits, dv, sinks]
        f.insert(f.place(new) + 1, step(MERGE_SPLITS, last, [y, *sink, *one.writes], 1, one.op, y.bytes))


def _appends(f: _Fusion, cache: Slice, past: Slice, reader: Step) -> Step | None:
    """The step that appends one row per head to a cache right before it is read."""
    end = f.place(reader)
    found = [s for s in f.steps[:end] if any(w.storage is cache.storage for w in s.writes)]
    if len(found) != 1 or found[0].opcode != CACHE_APPEND or found[0].args[2] != 1:
        return None
    _, new, position = found[0].reads
    whole = found[0].writes[0] == cache and cache.offset == 0
    return found[0] if whole and position == past and new.storage is not cache.storage else None


def _rotation(f: _Fusion, source: Slice, past: Slice) -> Step | None:
    """The step that made a query or key by rotating it, where nothing else reads it."""
    made = [s for s in f.steps if any(w == source for w in s.writes)]
    if len(made) != 1 or made[0].opcode != ROPE_AT or made[0].args[2] != 1 or made[0].reads[2] != past:
        return None
    return made[0] if f.inner(source.storage, 1) is not None else None
