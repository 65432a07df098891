"""Lowering: a graph with static shapes to a program of kernel steps.

A graph in serving form (see mapper/passes/serve.py) keeps its repeat as one block with bindings; in any
other graph repeats are unrolled. Values are contiguous; views that keep the order of elements are aliases;
caches are updated in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xdsl.ir import Operation, SSAValue

from mapper.errors import LoweringError
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.sections import Section
from mapper_host import rules_experts, rules_primitive, rules_transformer
from mapper_host.context import RULES, Context, SlotConflict, Weights
from mapper_host.opcodes import CODES, COPY, ELEMENTWISE, SIZES, VECTOR
from mapper_host.ops import OpList
from mapper_host.program import BlockSteps, Memory, Slice, Step, Storage, Value
from mapper_host.program import step as make_step

RULE_MODULES = (rules_experts, rules_primitive, rules_transformer)
"""Importing them registers their rules in RULES."""


@dataclass(eq=False)
class Lowered:
    """One program: blocks of steps, its inputs and outputs by name, and the list of its ops. `fused`: op ->
    op whose steps do its work."""

    phase: str
    blocks: list[BlockSteps]
    inputs: dict[str, Value]
    outputs: dict[str, Value]
    states: dict[str, Value]
    ops: OpList
    fused: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Lowering:
    graph: Graph
    weights: Weights
    phase: str
    states: dict[str, Value]
    ops: OpList
    blocks: list[BlockSteps] = field(default_factory=list)
    values: dict[SSAValue, Value] = field(default_factory=dict)
    done: set[Operation] = field(default_factory=set)

    def context(self, block: BlockSteps, place: str) -> Context:
        """A context on the values so far; new values of a block stay its own."""
        c = Context(self.graph, self.weights, block, place, dict(self.values))
        c.serving = bool(self.graph.inputs_with_role("past_length"))
        return c

    def run_ops(self, c: Context, ops: tuple[DataflowOp, ...], repeat: int) -> None:
        """Lower ops into the context's block."""
        for op in ops:
            if op.mnemonic not in RULES:
                raise LoweringError(f"host: {c.place}{op.mnemonic}: this target has no kernel for it")
            c.op, c.row = op, self.ops.add(op, c, repeat)
            RULES[op.mnemonic](c, op)
            c.narrow()
            self.done.add(op)

    def plain(self, section: Section, place: str) -> None:
        """A stretch of ops outside of repeats."""
        block = BlockSteps(place or "ops")
        c = self.context(block, "")
        self.run_ops(c, section.ops, 1)
        self.values = c.values
        self.blocks.append(block)

    def repeat(self, section: Section) -> None:
        """A repeat, as one block where each of its slots and carried values has a storage of its own."""
        self.ops.mark()
        try:
            self.folded(section)
        except SlotConflict:
            self.ops.reset()
            for iteration in range(section.count):
                self.unrolled(section, iteration)

    def unrolled(self, section: Section, iteration: int) -> None:
        """Iteration number `iteration` as a block of its own."""
        block = BlockSteps(f"layers.{iteration}")
        c = self.context(block, f"layers.{iteration}/")
        c.slots = {slot: names[iteration] for slot, names in section.table.items()}
        for carried in section.carried:
            source = carried.initial if iteration == 0 else carried.result
            c.values[carried.argument] = self.values[source]
            self.ops.same(carried.argument, source)
        for shared in section.shared:
            c.values[shared.argument] = self.values[shared.value]
            self.ops.same(shared.argument, shared.value)
        for slot in section.inputs:
            c.values[slot.argument] = self.values[slot.values[iteration]]
            self.ops.same(slot.argument, slot.values[iteration])
        self.run_ops(c, section.ops, 1)
        for carried in section.carried:
            self.values[carried.result] = c.values[carried.yielded]
            self.ops.same(carried.result, carried.yielded)
        for out in section.outputs:
            self.values[out.results[iteration]] = c.values[out.yielded]
            self.ops.same(out.results[iteration], out.yielded)
        self.blocks.append(block)

    def folded(self, section: Section) -> None:
        """All iterations as one block with bindings. Raises SlotConflict where that cannot be."""
        block = BlockSteps("layers", section.count)
        c = self.context(block, "layers/")
        c.slots = {slot: names[0] for slot, names in section.table.items()}
        homes = self._enter(section, c)
        self.run_ops(c, section.ops, section.count)
        made = [c.values[carried.yielded] for carried in section.carried]
        if len({v.storage for v in made} | {h.storage for h in homes}) < 2 * len(made):
            raise SlotConflict
        self._bind_weights(section, c)
        for slot in section.inputs:
            bind(block, [self.values[v].storage for v in slot.values])
        self._states(section, c)
        self._fill(section, homes)
        for carried, value, home in zip(section.carried, made, homes, strict=True):
            carry(block, value, home, c)
            self.values[carried.result] = home
            self.ops.same(carried.result, carried.yielded)
        self.blocks.append(block)

    def _enter(self, section: Section, c: Context) -> list[Value]:
        """Set the body's arguments; the home of each carried value."""
        homes: list[Value] = []
        for carried in section.carried:
            initial = self.values[carried.initial]
            homes.append(Value(Storage("layers/carried", initial.bytes), initial.shape, initial.dtype))
            c.values[carried.argument] = homes[-1]
            self.ops.same(carried.argument, carried.initial)
        for shared in section.shared:
            c.values[shared.argument] = self.values[shared.value]
            self.ops.same(shared.argument, shared.value)
        for slot in section.inputs:
            c.values[slot.argument] = self.values[slot.values[0]]
        return homes

    def _states(self, section: Section, c: Context) -> None:
        """Iterated outputs are the caches that the iterated inputs were. Raises SlotConflict for any
        other."""
        for out in section.outputs:
            inside = c.values[out.yielded].storage
            match = [s for s in section.inputs if self.values[s.values[0]].storage is inside]
            if not match or inside.memory != "state":
                raise SlotConflict
            for result, value in zip(out.results, match[0].values, strict=True):
                self.values[result] = self.values[value]
                self.ops.same(result, out.yielded)

    def _fill(self, section: Section, homes: list[Value]) -> None:
        """Bring the initial values into their homes: the ops before the repeat write them there where
        nothing else uses the value, else a block of copies does."""
        copies: list[Step] = []
        for carried, home in zip(section.carried, homes, strict=True):
            initial = self.values[carried.initial]
            if self._only_entering(section, initial.storage) and self._retarget(
                initial.storage, home.storage
            ):
                continue
            copies += copy_steps(initial, home, -1)
        if copies:
            self.blocks.append(BlockSteps("enter", 1, copies))

    def _only_entering(self, section: Section, storage: Storage) -> bool:
        """Whether the values in a storage are used by lowered ops and, once, as a carried value of the
        repeat."""
        entering = 0
        for ssa, value in self.values.items():
            if value.storage is storage:
                for use in ssa.uses:
                    if use.operation is section.repeat:
                        entering += 1
                    elif use.operation not in self.done:
                        return False
        return entering == 1

    def _retarget(self, old: Storage, home: Storage) -> bool:
        writers = [b for b in self.blocks if _touching(b.steps, old)[1]]
        if old.memory != "arena" or len(writers) != 1 or writers[0].repeat != 1 or old.bytes != home.bytes:
            return False
        for block in self.blocks:
            _replace(block.steps, old, home)
        return True

    def _bind_weights(self, section: Section, c: Context) -> None:
        for storage, (slot, form) in c.used_slots.items():
            if not slot:
                continue
            symbols = [self.graph.weights[name] for name in section.table[slot]]
            bind(c.block, [self.weights.symbol(s, form).storage for s in symbols])
            assert c.block.bindings.get(storage) is not None or len({s.name for s in symbols}) == 1


def bind(block: BlockSteps, storages: list[Storage]) -> None:
    """In repetition i, storages[i] stands for storages[0]. Raises SlotConflict where that is bound
    already."""
    if all(s is storages[0] for s in storages):
        return
    if block.bindings.get(storages[0], tuple(storages)) != tuple(storages):
        raise SlotConflict
    block.bindings[storages[0]] = tuple(storages)


def copy_steps(source: Value, target: Value, op: int) -> list[Step]:
    """Steps that copy one value."""
    n, size = source.items, SIZES[source.code]
    if n == 0:
        return []
    return [make_step(COPY, [size, 1, 0, 0, n, 1, 1], [source, target], 1, op, n)]


def _replace(steps: list[Step], old: Storage, new: Storage) -> None:
    for step in steps:
        for part in (step.reads, step.writes):
            for i, s in enumerate(part):
                if s.storage is old:
                    part[i] = Slice(new, s.offset, s.bytes)


def _touching(steps: list[Step], storage: Storage) -> tuple[list[int], list[int]]:
    reads = [i for i, s in enumerate(steps) if any(r.storage is storage for r in s.reads)]
    writes = [i for i, s in enumerate(steps) if any(w.storage is storage for w in s.writes)]
    return reads, writes


def carry(block: BlockSteps, made: Value, home: Value, c: Context) -> None:
    """Bring the yielded value into its home at the end of the body: by writing it there, where nothing
    reads the home later and the writing step may work in place; else by a copy."""
    steps = block.steps
    old = made.storage
    reads_home, writes_home = _touching(steps, home.storage)
    _, writes = _touching(steps, old)
    free = old.memory == "arena" and len(writes) == 1 and old.bytes == home.bytes and not writes_home
    if free and max(reads_home, default=-1) <= writes[0]:
        writer = steps[writes[0]]
        in_place = writer.opcode in (ELEMENTWISE, VECTOR) and all(
            r.bytes == old.bytes for r in writer.reads if r.storage is home.storage
        )
        if writes[0] not in reads_home or in_place:
            _replace(steps, old, home.storage)
            return
    steps += copy_steps(made, home, c.row)


def lower_program(graph: Graph, phase: str, weights: Weights, states: dict[str, Value]) -> Lowered:
    """The program of a static graph. `states` holds the caches by name; new ones are added, programs share
    them."""
    work = _Lowering(graph, weights, phase, states, OpList(graph, phase))
    roles = graph.roles["inputs"]
    inputs: dict[str, Value] = {}
    for name, ssa in graph.input_values.items():
        kind = tensor_type(ssa)
        if not kind.is_static or kind.dtype not in CODES:
            raise LoweringError(f"host: input {name} has type {kind}; shapes must be known and types plain")
        state = roles.get(name, "").startswith("state.")
        memory: Memory = "state" if state else "io"
        value = states.get(name) if state else None
        if value is None:
            value = Value(Storage(name if state else f"{phase}:{name}", 0, memory), kind.ints, kind.dtype)
            value.storage.bytes = value.bytes
        work.values[ssa] = value
        (states if state else inputs)[name] = value
    for section in graph.sections():
        if section.repeat is not None:
            work.repeat(section)
        else:
            work.plain(section, "prologue" if not work.blocks else "epilogue")
    outputs = _outputs(work, graph, states)
    blocks = [b for b in work.blocks if b.steps]
    return Lowered(phase, blocks, inputs, outputs, states, work.ops)


def _outputs(work: _Lowering, graph: Graph, states: dict[str, Value]) -> dict[str, Value]:
    """Storage of every output that is no state: its own, in memory "io", written by a copy where it must
    be."""
    outputs: dict[str, Value] = {}
    last = BlockSteps("outputs")
    all_steps = [s for b in work.blocks for s in b.steps]
    for name, ssa in graph.output_values.items():
        value = work.values[ssa]
        if name in states and states[name].storage is value.storage:
            continue
        plain = value.storage.memory == "arena" and not any(
            v.storage is value.storage for v in outputs.values()
        )
        bound = any(value.storage in b.bindings for b in work.blocks)
        if plain and not bound and _touching(all_steps, value.storage)[1]:
            value.storage.memory, value.storage.name = "io", f"{work.phase}:{name}"
            outputs[name] = value
        else:
            made = Value(Storage(f"{work.phase}:{name}", value.bytes, "io"), value.shape, value.dtype)
            last.steps += copy_steps(value, made, -1)
            outputs[name] = made
    work.blocks.append(last)
    return outputs
