"""From chains to a timed program: the repeated layer by iterative modulo scheduling, the rest around it.

The layer body is placed once, on a modulo reservation table of period II; II grows from the body's own
critical recurrence (x in -> x out) until every piece finds a place and every value lives shorter than II.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mapper.errors import LoweringError
from mapper_lpu.calendar import Calendar
from mapper_lpu.chain import Chain, Mxm, Tile
from mapper_lpu.decoder import Program
from mapper_lpu.instruction import Form, Instruction, Latencies
from mapper_lpu.placer import PeriodTooShort, Placed, Placer, TemplateCache, planes

_TRIES = 200


@dataclass
class Timed:
    """Placed blocks: instructions relative to the block's start. Absolute cycle = start + repetition * period
    + cycle.
    """

    before: list[Instruction] = field(default_factory=list)
    body: list[Instruction] = field(default_factory=list)
    after: list[Instruction] = field(default_factory=list)
    start: int = 0
    period: int = 0
    repeat: int = 0
    end: int = 0  # last effect
    placed: dict[str, list[Placed]] = field(default_factory=dict)
    # x is ready for the next part: per part (piece, lag, form), lag counted to cycle 0 of the next part's
    # frame
    ends: dict[str, list[tuple[int, int, Form]]] = field(default_factory=dict)


def _tiles(chain: Chain) -> list[Tile]:
    found: list[Tile] = []
    for op in chain.ops:
        for operand in (op.a, op.b):
            if isinstance(operand, Mxm) and operand.tile not in found:
                found.append(operand.tile)
    return found


def place(placer: Placer, chains: list[Chain]) -> None:
    """Place chains in order; a tile loads just before its first use, the first of a frame in time."""
    for chain in chains:
        late: list[Tile] = []
        for tile in _tiles(chain):
            if tile.installed is None:
                if placer.floor is None and not any(p in placer.current for p in planes(tile)):
                    late.append(tile)
                else:
                    placer.load(tile)
        placer.chain(chain)
        for tile in late:
            placer.load_before(tile, tile.first_activation)


def _reset(program: Program) -> None:
    for value in program.values:
        value.ready.clear()
        value.written.clear()
        value.last.clear()
    for tile in program.tiles:
        tile.reset()


def _body(
    program: Program, cache: TemplateCache, period: int | None, carried: dict[int, dict[int, int]]
) -> Placer:
    """One attempt to place the body; `carried` gives the cycles at which rows of x are ready."""
    _reset(program)
    for stored in program.carried:
        stored.ready.update(carried[id(stored)])
    placer = Placer(Calendar(period), cache)
    place(placer, program.body)
    return placer


def _recurrence(program: Program, placer: Placer, carried: dict[int, dict[int, int]]) -> int:
    """The smallest period that this placement allows: x carried to the next iteration, MXM reuse, value
    lifetimes.
    """
    low = 1
    for stored in program.carried:
        for row, ready in stored.ready.items():
            low = max(low, ready - carried[id(stored)][row])
    for plane, last in placer.current.items():
        first = placer.first_tile[plane]
        assert last.installed is not None and first.installed is not None
        low = max(low, last.installed + placer.lat.install - first.first_load)
        low = max(low, last.last_activation + 1 - placer.lat.install - first.installed)
    for stored in program.values:
        if stored in program.carried:
            continue
        for row, written in stored.written.items():
            low = max(low, stored.last.get(row, written) - written + 1)
    return low


def _carried_zero(program: Program, ready: dict[int, dict[int, int]] | None) -> dict[int, dict[int, int]]:
    """Cycles at which x is ready in the frame of an iteration: the latest row at 0, the others as much
    earlier as made.
    """
    if ready is None:
        return {id(s): {r: 0 for r in range(s.rows)} for s in program.carried}
    top = max(c for rows in ready.values() for c in rows.values())
    return {k: {r: c - top for r, c in rows.items()} for k, rows in ready.items()}


def _schedule_body(program: Program, cache: TemplateCache) -> tuple[Placer, int, dict[int, dict[int, int]]]:
    carried = _carried_zero(program, None)
    period = 0
    _body(program, cache, None, carried)
    # now the skew between the copies of x is known
    carried = _carried_zero(program, {id(s): dict(s.ready) for s in program.carried})
    placer = _body(program, cache, None, carried)
    period = _recurrence(program, placer, carried)
    best: tuple[int, int] | None = None
    for _ in range(_TRIES):
        try:
            placer = _body(program, cache, period, carried)
        except PeriodTooShort:
            period += 1
            continue
        needed = _recurrence(program, placer, carried)
        if needed <= period:
            return placer, period, carried
        best = (needed, period)
        period = max(period + 1, min(needed, period + 8))
    raise LoweringError(f"no initiation interval found up to {period} cycles (last try needed {best})")


def schedule(program: Program, latencies: Latencies, layers: int, tail: int) -> Timed:
    """All blocks of a program. `tail`: cycles added at the end (the skew of the tiles)."""
    cache = TemplateCache(latencies)
    timed = Timed(repeat=layers)
    body, timed.period, carried = _schedule_body(program, cache)
    body_ready = {id(s): dict(s.ready) for s in program.carried}
    timed.body = body.instructions
    timed.placed["body"] = body.placed
    timed.ends["body"] = _ends(program, body, carried)

    before = Placer(Calendar(), cache, floor=0)
    for stored in program.carried:
        stored.ready.clear()
    place(before, program.before)
    timed.before, timed.placed["before"] = before.instructions, before.placed
    timed.ends["before"] = _ends(program, before, carried)
    timed.start = _first_start(program, before, body, timed, carried, layers)

    grid = before.calendar
    for r in range(layers):
        for uses, cycle in body.taken:
            grid.take(uses, cycle + timed.start + r * timed.period)
    after = Placer(grid, cache, floor=0)
    shift = timed.start + (layers - 1) * timed.period
    after.current = {plane: _moved_tile(last, shift) for plane, last in body.current.items()}
    zero = timed.start + timed.repeat * timed.period
    for stored in program.carried:
        for row in body_ready[id(stored)]:
            stored.ready[row] = zero + carried[id(stored)][row]
    place(after, program.after)
    timed.after, timed.placed["after"] = after.instructions, after.placed
    ends = [i.cycle + i.duration for i in timed.before + timed.after]
    ends += [i.cycle + i.duration + shift for i in timed.body]
    timed.end = max(ends) + tail
    return timed


def _ends(
    program: Program, placer: Placer, carried: dict[int, dict[int, int]]
) -> list[tuple[int, int, Form]]:
    """(piece, lag, form) of every row of x that a part makes: when the next part may start."""
    ends: dict[int, tuple[int, Form]] = {}
    for stored in program.carried:
        for row in range(stored.rows):
            piece, lag, made = placer.maker[(id(stored), row)]
            lag -= carried[id(stored)][row]
            if piece not in ends or lag > ends[piece][0]:
                ends[piece] = (lag, made)
    return [(piece, lag, made) for piece, (lag, made) in ends.items()]


def _first_start(
    program: Program,
    before: Placer,
    body: Placer,
    timed: Timed,
    carried: dict[int, dict[int, int]],
    layers: int,
) -> int:
    """The first start of the body at which x and all that is made before is ready and no resource is taken
    twice.
    """
    low = -min(i.cycle for i in timed.body)
    for stored in program.carried:
        for row, ready in stored.ready.items():
            low = max(low, ready - carried[id(stored)][row])
    written_before = {id(o.value) for c in program.before for o in c.outs}
    reads: dict[tuple[int, int], int] = {}
    for template, cycle in body.templates:
        for stored, row, relative, _ in template.reads:
            if id(stored) in written_before and stored not in program.carried:
                key = (id(stored), row)
                reads[key] = min(reads.get(key, cycle + relative), cycle + relative)
    for stored in program.values:
        for row, ready in stored.ready.items():
            if (id(stored), row) in reads:
                low = max(low, ready - reads[(id(stored), row)])
    for start in range(low, low + 4000):
        if all(
            before.calendar.fits(uses, cycle + start + r * timed.period)
            for r in range(layers)
            for uses, cycle in body.taken
        ):
            return start
    raise LoweringError("the repeated layer finds no place after what comes before it")


def _moved_tile(tile: Tile, shift: int) -> Tile:
    assert tile.installed is not None
    moved = Tile(tile.name, tile.hemisphere, tile.loads, tile.op, tile.planes)
    moved.installed = tile.installed + shift
    moved.last_activation = tile.last_activation + shift
    return moved
