"""Mutation operators: each breaks one stated rule of a schedule. What a check or the output must then notice.

An operator returns None where the schedule offers nothing to break in its way. All choices come from `rng`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mapper.schedule.edit import Place, Row, step_at, with_buffer, with_step
from mapper.schedule.equivalence import commutes
from mapper.schedule.tables import Int, Schedule

Mutant = tuple[Schedule, str]
TRIES = 64


class Mutation(Protocol):
    """A mutation operator. Targets add their own beside the shared ones."""

    @property
    def name(self) -> str:
        """The kind of mutant, e.g. "drop_step"."""

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """A mutant and what was done to it, in words; None where the operator does not apply."""


@dataclass(frozen=True)
class StepMutation:
    """An operator that changes one random step. `change` gets (schedule, place, row, rng) and returns the new
    row and words for it, (None, words) to drop the step, or None to try another step."""

    name: str
    change: Callable[[Schedule, Place, Row, np.random.Generator], tuple[Row | None, str] | None]

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        for place in _places(schedule, rng):
            row = step_at(schedule, place)
            found = self.change(schedule, place, row, rng)
            if found is not None:
                return with_step(schedule, place, found[0]), f"{place}: {found[1]}"
        return None


def _places(schedule: Schedule, rng: np.random.Generator) -> Iterator[Place]:
    """Random steps, each as likely as any other."""
    blocks = [(phase, n) for phase, p in schedule.programs.items() for n in range(len(p.blocks))]
    sizes = np.array([len(schedule.programs[p].blocks[n].steps) for p, n in blocks], np.int64)
    if not sizes.sum():
        return
    for _ in range(TRIES):
        phase, block = blocks[rng.choice(len(blocks), p=sizes / sizes.sum())]
        yield Place(phase, block, int(rng.integers(len(schedule.programs[phase].blocks[block].steps))))


def _block(schedule: Schedule, place: Place) -> Any:
    return schedule.programs[place.phase].blocks[place.block].steps


def _before_operand(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Start a step when the step that writes its operand starts."""
    steps = _block(schedule, place)
    offsets, buffer, low, size = steps.slices("writes")
    start = steps.column("start")
    writer = np.repeat(np.arange(len(steps)), np.diff(offsets))
    for k in rng.permutation(len(row["reads"])):
        read = row["reads"][k]
        touching = (buffer == read["buffer"]) & (low < read["offset"] + read["bytes"])
        touching &= (low + size > read["offset"]) & (start[writer] < row["start"])
        if touching.any():
            first = int(start[writer[touching]].min())
            return {
                **row,
                "start": first,
            }, f"starts at {first}, when its operand is only begun, not {row['start']}"
    return None


def _two_on_unit(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    steps = _block(schedule, place)
    busy = (steps.column("unit") == row["unit"]) & (steps.column("duration") > 0)
    other = np.flatnonzero(busy & (steps.column("start") != row["start"]))
    if not len(other) or not row["duration"]:
        return None
    start = int(steps.column("start")[rng.choice(other)])
    return {**row, "start": start}, f"starts at {start} like another step of its unit, not at {row['start']}"


def _drop(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    return None, f"dropped ({schedule.opcodes[row['opcode']]})"


def _drop_move(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    if row["flops"] or not row["bytes"]:
        return None
    return _drop(schedule, place, row, rng)


def _swap_operands(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    reads = list(row["reads"])
    if commutes(schedule, row["opcode"], row["args"]):
        return None
    pairs = [(i, j) for i in range(len(reads)) for j in range(i) if reads[i] != reads[j]]
    if not pairs:
        return None
    i, j = pairs[rng.integers(len(pairs))]
    reads[i], reads[j] = reads[j], reads[i]
    return {**row, "reads": reads}, f"operands {j} and {i} swapped"


def _change_opcode(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    steps = _block(schedule, place)
    legal = np.unique(steps.column("opcode")[steps.column("unit") == row["unit"]])
    legal = legal[legal != row["opcode"]]
    if not len(legal):
        return None
    new = int(rng.choice(legal))
    return {**row, "opcode": new}, f"{schedule.opcodes[new]} instead of {schedule.opcodes[row['opcode']]}"


def _retarget(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    which = str(rng.choice(["reads", "writes"]))
    if not row[which]:
        return None
    slices = list(row[which])
    k = int(rng.integers(len(slices)))
    old = slices[k]
    table = schedule.buffers
    size, memory = (np.asarray(table.column(c).to_numpy(), np.int64) for c in ("bytes", "memory"))
    program = table.column("program").to_numpy(zero_copy_only=False)
    fits = (size >= old["offset"] + old["bytes"]) & (memory == memory[old["buffer"]])
    fits &= (program == "") | (program == place.phase)
    fits[old["buffer"]] = False
    if not fits.any():
        return None
    new = int(rng.choice(np.flatnonzero(fits)))
    slices[k] = {**old, "buffer": new}
    return {**row, which: slices}, f"{which} {k} goes to buffer {new} instead of {old['buffer']}"


def _shift(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    if not (isinstance(schedule.plan, dict) and schedule.plan.get("exact_time")):
        return None
    by = int(rng.choice([-1, 1]))
    return {**row, "start": row["start"] + by}, f"starts {by:+d} cycle"


@dataclass(frozen=True)
class ShrinkBuffer:
    """Take the last bytes of a buffer that steps use away from it."""

    name: str = "shrink_buffer"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        used = _used(schedule)
        if not len(used):
            return None
        row = int(rng.choice(used))
        size = int(schedule.buffers.column("bytes")[row].as_py())
        new = size - int(rng.integers(1, max(2, size // 2 + 1)))
        return with_buffer(schedule, row, {"bytes": new}), f"buffer {row} has {new} bytes instead of {size}"


@dataclass(frozen=True)
class OverlapLifetimes:
    """Put a buffer onto the bytes of another one that is alive at the same time."""

    name: str = "overlap_lifetimes"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        column = {k: _numbers(schedule, k) for k in ("memory", "offset", "bytes", "first", "last")}
        last = np.where(column["last"] < 0, 2**62, column["last"])
        program = schedule.buffers.column("program").to_numpy(zero_copy_only=False)
        end = column["offset"] + column["bytes"]
        for row in rng.permutation(_used(schedule))[:TRIES]:
            room = schedule.memories[column["memory"][row]][1] - column["bytes"][row]
            other = (
                (column["memory"] == column["memory"][row])
                & (column["offset"] <= room)
                & (column["bytes"] > 0)
            )
            other &= (column["first"] <= last[row]) & (last >= column["first"][row])
            other &= (program == program[row]) | (program == "") | (program[row] == "")
            other &= (column["offset"] >= end[row]) | (end <= column["offset"][row])
            if other.any():
                new = int(column["offset"][rng.choice(np.flatnonzero(other))])
                words = f"buffer {row} moved from byte {column['offset'][row]} to {new}, onto a live one"
                return with_buffer(schedule, int(row), {"offset": new}), words
        return None


def _numbers(schedule: Schedule, name: str) -> Int:
    return np.asarray(schedule.buffers.column(name).to_numpy(), np.int64)


def _used(schedule: Schedule) -> Int:
    """Buffers that steps name and that have bytes."""
    found = [np.zeros(0, np.int64)]
    for program in schedule.programs.values():
        for block in program.blocks:
            found += [block.steps.slices("reads")[1], block.steps.slices("writes")[1]]
    used = np.unique(np.concatenate(found))
    return used[_numbers(schedule, "bytes")[used] > 0]


@dataclass(frozen=True)
class FlipConstant:
    """Flip one high bit of one element of a constant."""

    name: str = "flip_constant"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        names = sorted(n for n, a in schedule.constants.items() if a.size)
        if not names:
            return None
        name = names[rng.integers(len(names))]
        array = schedule.constants[name]
        flip = choose_flip(name, array.size, array.dtype, rng)
        for _ in range(TRIES):
            if _shows(flip, array):
                break
            flip = choose_flip(name, array.size, array.dtype, rng)
        return replace(schedule, constants={**schedule.constants, name: flip.apply(array)}), f"{flip}"


def _shows(flip: Flip, array: npt.NDArray[Any]) -> bool:
    """Whether a flip moves its element by more than a thousandth of the largest; a zero's mostly do not."""
    if array.dtype.kind not in "fV":
        return True
    old, new = (np.asarray(a, np.float64).reshape(-1) for a in (array, flip.apply(array)))
    moved = abs(new[flip.element] - old[flip.element])
    return not moved <= 1e-3 * np.abs(old).max()


@dataclass(frozen=True)
class Flip:
    """One flipped bit of one element of a weight or constant. Bit 0 is the lowest."""

    name: str
    element: int
    bit: int

    def __str__(self) -> str:
        return f"bit {self.bit} of element {self.element} of {self.name} flipped"

    def apply(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy of `array` with the bit flipped."""
        out: npt.NDArray[Any] = np.array(array, order="C")
        size = out.dtype.itemsize
        at = self.element * size + self.bit // 8  # little-endian
        out.reshape(-1).view(np.uint8)[at] ^= np.uint8(1 << (self.bit % 8))
        return out


def choose_flip(name: str, size: int, dtype: np.dtype[Any], rng: np.random.Generator) -> Flip:
    """A random bit: of a float the sign, the exponent or the upper mantissa, of anything else any bit.

    A low mantissa bit changes a value by less than rounding does, and is no fault that an output must show.
    """
    bits = 8 * dtype.itemsize
    low = {2: 7, 4: 19, 8: 45}.get(dtype.itemsize, 0) if dtype.kind in "fV" else 0
    high = 1 if dtype.kind == "b" else bits
    return Flip(name, int(rng.integers(size)), int(rng.integers(low, high)))


def flip_weight(schedule: Schedule, rng: np.random.Generator) -> Flip | None:
    """A bit of a weight to flip when it is loaded. Tables that only embedding ops read are left alone: which
    of their rows matter depends on the tokens."""
    from mapper.schedule.dtypes import dtype
    from mapper.schedule.values import leaves

    kinds = _readers(schedule)
    names = set()
    for port in schedule.ports:
        if port.source is None or all(k.startswith("embed") for b in port.buffers for k in kinds.get(b, ())):
            continue
        names |= {name for kind, name in leaves(port.source) if kind == "weight"}
    names = {n for n in names if schedule.weights[n]["bytes"]}
    if not names:
        return None
    name = sorted(names)[rng.integers(len(names))]
    entry = schedule.weights[name]
    kind = dtype(entry["dtype"])
    return choose_flip(name, entry["bytes"] // kind.itemsize, kind, rng)


def _readers(schedule: Schedule) -> dict[int, set[str]]:
    """Buffer -> kinds of the ops whose steps read it ("" for steps of no op)."""
    from mapper.schedule.timeline import timeline

    kinds = [*schedule.ops.column("kind").to_pylist(), ""]
    found: dict[int, set[str]] = {}
    for phase in schedule.programs:
        times = timeline(schedule, phase)
        pairs = np.unique(np.stack([times.reads.buffer, times.op[times.reads.step]]), axis=1)
        for buffer, op in pairs.T:
            found.setdefault(int(buffer), set()).add(str(kinds[op]))
    return found


SHARED: tuple[Mutation, ...] = (
    StepMutation("before_operand", _before_operand),
    StepMutation("two_on_unit", _two_on_unit),
    StepMutation("drop_step", _drop),
    StepMutation("drop_move", _drop_move),
    StepMutation("swap_operands", _swap_operands),
    StepMutation("change_opcode", _change_opcode),
    StepMutation("retarget_slice", _retarget),
    StepMutation("shift_cycle", _shift),
    ShrinkBuffer(),
    OverlapLifetimes(),
    FlipConstant(),
)
"""The operators that apply to schedules of every target."""
