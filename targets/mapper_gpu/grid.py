"""A kernel as tasks: coordinates, operands as slices of storages, and what each task costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mapper_gpu import flash, programs
from mapper_gpu.degrees import Degrees
from mapper_gpu.flash import pieces
from mapper_gpu.grid_collective import collective_tasks
from mapper_gpu.grid_experts import expert_tasks, route_task
from mapper_gpu.hardware import ENGINES, Gpu
from mapper_gpu.kernel import Branch, Kernel, attention_of, product_of
from mapper_gpu.nodes import HEADS, Section
from mapper_gpu.product import STAGES, Product, Tile, lane_width, stage_bytes, unpacking
from mapper_gpu.programs import Builder, Columns
from mapper_gpu.storage import Storage
from mapper_gpu.tasks import OPCODES, Coordinates, Grid, Task
from mapper_gpu.timing import MERGE, NONE


@dataclass
class Maker:
    """Makes the grids of one section. `programs` collects programs; `new` makes a storage of the program. The
    section is on chips from `base` on, shared by `degrees`."""

    gpu: Gpu
    section: Section
    storage: dict[str, Storage]
    programs: list[Any]
    batch: int
    tokens: int
    degrees: Degrees
    label: str
    new: Any
    base: int = 0

    def replica(self, number: int) -> range:
        """A replica's chips, counted from the group's first."""
        return range(number * self.degrees.tensor, (number + 1) * self.degrees.tensor)

    def rank(self, number: int) -> range:
        """The chips of one rank in all replicas, counted from the group's first."""
        return range(number, self.degrees.group, self.degrees.tensor)

    def absolute(self, chips: range) -> range:
        """Chips of the group by their numbers in the machine."""
        return range(self.base + chips.start, self.base + chips.stop, chips.step)

    def builder(self, kind: str) -> Builder:
        return Builder(kind, self.section, self.storage, self.tokens)

    def keep(self, builder: Builder) -> int:
        self.programs.append(builder.json())
        return len(self.programs) - 1

    def grid(self, kernel: Kernel, number: int) -> Grid:
        """The tasks of a kernel."""
        made = Grid(kernel)
        partial = f"{self.label}.k{number}"
        kinds = {
            "product": self._product, "attention": self._attention, "heads": self._heads, "rows": self._rows,
        }  # fmt: skip
        if kernel.kind in kinds:
            kinds[kernel.kind](made, partial)
        else:
            others = {"experts": expert_tasks, "route": route_task, "collective": collective_tasks}
            others[kernel.kind](self, made, partial)
        return made

    # products ------------------------------------------------------------------------------------

    def _product(self, grid: Grid, partial: str) -> None:
        kernel = grid.kernel
        tile = kernel.tile
        assert tile is not None
        names = self._partials(kernel, tile, partial)
        lanes: list[tuple[Branch, int, list[Builder], Builder | None, list[int]]] = []
        for branch in kernel.branches:
            main, merge = self._lane(kernel, branch, tile, names)
            mine = [self.keep(b) for b in main]
            lanes.append((branch, lane_width(branch.lane, tile.n), main, merge, mine))
        kept = [self.keep(m) if m else -1 for _, _, _, m, _ in lanes]
        rows, product = self._rows_of(kernel), product_of(self.section, kernel.nodes)
        heads = self.section.nodes[kernel.branches[0].linears[0]].attr("heads", 1)
        walk = _walk(rows, tile, [(b.lane.n, w) for b, w, _, _, _ in lanes], heads)
        for join, (m0, m1, lane, n0, n1) in enumerate(walk):
            branch, _, main, merge, mine = lanes[lane]
            node = self.section.nodes[branch.linears[0]]
            k = node.weights[0].k
            for j in range(tile.splits):
                at = (m0, m1, n0, n1, j * k // tile.splits, (j + 1) * k // tile.splits)
                grid.tasks.append(self._product_task(main[j], mine[j], at, branch, tile, join, product))
            if merge is not None:
                at = (m0, m1, n0, n1, 0, k)
                task = self.task(merge, kept[lane], "product_merge", at, node.op)
                task.lead, task.stage, task.join = MERGE, 1, join
                task.near = self._moved(merge, at)
                grid.tasks.append(task)
        self._shares(grid)

    def _rows_of(self, kernel: Kernel) -> int:
        first = self.section.nodes[kernel.branches[0].linears[0]]
        return int(self.section.values[first.inputs[0]].rows)

    def _partials(self, kernel: Kernel, tile: Tile, partial: str) -> dict[int, str]:
        names: dict[int, str] = {}
        if tile.splits == 1:
            return names
        for branch in kernel.branches:
            for i in branch.linears:
                names[i] = f"{partial}.{i}"
                value = self.section.values[self.section.nodes[i].output]
                panel = math.gcd(lane_width(branch.lane, tile.n), value.width)
                for j in range(tile.splits):
                    self.new(Storage(f"{names[i]}.{j}", value.rows, value.width, "f32", panel))
        return names

    def _lane(
        self, kernel: Kernel, branch: Branch, tile: Tile, names: Mapping[int, str]
    ) -> tuple[list[Builder], Builder | None]:
        split = tile.splits > 1
        main = []
        for j in range(tile.splits):
            b = self.builder("product")
            programs.product_program(b, kernel.prologue, branch.linears, branch.nodes, branch.stores, split)
            if split:
                for i in branch.linears:
                    b.write(f"{names[i]}.{j}", b.registers[f"={self.section.nodes[i].output}"])
            main.append(b)
        if not split:
            return main, None
        merge = self.builder("product_merge")
        programs.merge_program(merge, branch.linears, branch.nodes, branch.stores, names, tile.splits)
        return main, merge

    def _product_task(
        self, b: Builder, program: int, at: Coordinates, branch: Branch, tile: Tile, join: int,
        product: Product,
    ) -> Task:  # fmt: skip
        nodes = self.section.nodes
        m0, m1, n0, n1, k0, k1 = at
        task = self.task(b, program, "product", at, nodes[branch.linears[0]].op)
        engine = ENGINES.index(tile.engine)
        wide, short = self.gpu.mma[:2] if tile.engine != "vector" else (1, 1)
        if self.gpu.systolic and tile.engine != "vector":
            wide, short = short, wide
        columns = branch.lane.mats * (n1 - n0)
        padded = -(-(m1 - m0) // short) * short * -(-columns // wide) * wide
        task.work, task.engine = 2.0 * padded * (k1 - k0), engine
        task.work += unpacking(self.gpu, product.low, tile.engine, columns * (k1 - k0))
        task.flops = 2.0 * (m1 - m0) * columns * (k1 - k0)
        weights = columns * (k1 - k0) * product.stored
        task.near = weights + (m1 - m0) * (k1 - k0) * 4.0
        task.far = weights
        task.lead, task.join = NONE, join if tile.splits > 1 else -1
        stage = STAGES * stage_bytes(product, columns, m1 - m0)
        task.pages = max(1, math.ceil(stage / self.gpu.page))
        return task

    def _shares(self, grid: Grid) -> None:
        """The kernel's bytes shared among its tasks by what each loads, so that the sums are the model's."""
        timed = grid.kernel.timed
        main = [t for t in grid.tasks if t.stage == 0]
        loaded = sum(t.near for t in main)
        near = max(0.0, timed.near - sum(t.near for t in grid.tasks if t.stage))
        for t in main:
            share = t.near / loaded
            t.far, t.near = timed.far * share, near * share

    def _moved(self, b: Builder, at: Coordinates) -> float:
        """Bytes of a merge's operands by rows, and of the rows that it appends to a cache. Vectors and the
        row of a table that it takes are small beside them."""
        runs = [self._read(s, r, c, at) for s, r, c, _ in b.sources if r == "m"]
        runs += [self._write(s, r, c, at) for s, r, c in b.targets if r == "m"]
        rows = sum((at[1] - at[0]) * (at[3] - at[2]) * s.item for s, r, _ in b.targets if r == "cache")
        return float(rows + sum(n for part in runs for _, n in part))

    # attention -----------------------------------------------------------------------------------

    def _attention(self, grid: Grid, partial: str) -> None:
        kernel = grid.kernel
        split = kernel.split
        number = next(i for i in kernel.nodes if self.section.nodes[i].kind == "attention")
        node = self.section.nodes[number]
        a = attention_of(node)
        assert split is not None
        before = [i for i in kernel.nodes if i != number]
        group = a.group
        parts = split.splits
        if parts > 1:
            for j in range(parts):
                rows, width = a.batch * a.tokens, a.heads * a.value_dim
                self.new(Storage(f"{partial}.{j}.sum", rows, width, "f32", group * a.value_dim))
                self.new(Storage(f"{partial}.{j}.stats", rows, 2 * a.heads, "f32", 2 * group))
        built: dict[int, tuple[Builder, int]] = {}
        for j in range(parts):
            b = self.builder("attention")
            programs.attention_program(b, before, node, f"{partial}.{j}" if parts > 1 else None)
            built[j] = (b, self.keep(b))
        merge: Builder | None = None
        kept = -1
        if parts > 1:
            merge = self.builder("attention_merge")
            programs.attention_merge_program(merge, node, partial, parts)
            kept = self.keep(merge)
        engine = ENGINES.index(a.engine if a.engine in self.gpu.tensor else "vector")
        joins: dict[tuple[int, int, int], int] = {}
        row = a.element * (a.dim + (0 if a.shared else a.value_dim))
        held = max(1, math.ceil(2 * flash.KEY_STEP * row / self.gpu.page))
        for piece in pieces(a, split):
            j = piece.low // split.keys
            for s in range(a.batch):
                for h in range(a.kv_heads):
                    n0 = h * group * a.value_dim
                    at = (s * a.tokens + piece.first, s * a.tokens + piece.last, n0, n0 + group * a.value_dim,
                          piece.low, piece.high)  # fmt: skip
                    b, program = built[j]
                    task = self.task(b, program, "attention", at, node.op)
                    task.far, task.near, task.flops = piece.far, piece.near, piece.flops
                    task.work = flash.as_work(self.gpu, a, engine, piece.work)
                    task.engine, task.lead = engine, NONE
                    task.pages = held
                    if parts > 1:
                        task.join = joins.setdefault((s, h, piece.first), len(joins))
                    grid.tasks.append(task)
        for (s, h, first), join in joins.items():
            last = min(a.tokens, first + split.tokens)
            n0 = h * group * a.value_dim
            at = (s * a.tokens + first, s * a.tokens + last, n0, n0 + group * a.value_dim, 0, a.length)
            assert merge is not None
            task = self.task(merge, kept, "attention_merge", at, node.op)
            task.lead, task.stage, task.join = MERGE, 1, join
            task.near = float(sum(n for _, _, _, n in (*task.reads, *task.writes)))
            grid.tasks.append(task)

    # rows, heads, collectives --------------------------------------------------------------------

    def _rows(self, grid: Grid, partial: str) -> None:
        kernel = grid.kernel
        b = self.builder("rows")
        programs.run_nodes(b, kernel.nodes, "all")
        for v in kernel.stores:
            b.write(v, b.registers[f"={v}"], "m", "all")
        program = self.keep(b)
        nodes = self.section.nodes
        rows = max(self.section.values[nodes[i].output].rows for i in kernel.nodes)
        width = max(self.section.values[nodes[i].output].width for i in kernel.nodes)
        for m0 in range(0, rows, kernel.rows):
            at = (m0, min(rows, m0 + kernel.rows), 0, width, 0, width)
            self._even(grid, self.task(b, program, "rows", at, nodes[kernel.nodes[0]].op), rows)

    def _even(self, grid: Grid, task: Task, rows: int) -> None:
        timed = grid.kernel.timed
        share = (task.at[1] - task.at[0]) / rows
        task.far, task.near, task.work = (share * v for v in (timed.far, timed.near, timed.work))
        task.engine, task.lead = ENGINES.index("vector"), NONE
        grid.tasks.append(task)

    def _heads(self, grid: Grid, partial: str) -> None:
        """Column-wise nodes with appends: a task per sequence and head, so that no two write the same rows
        of a cache."""
        kernel = grid.kernel
        nodes = self.section.nodes
        b = self.builder("heads")
        programs.run_nodes(b, kernel.nodes, "n")
        for v in kernel.stores:
            if not v.endswith("@"):
                b.write(v, b.registers[f"={v}"], "m", "n")
        program = self.keep(b)
        head = max(nodes[i].attr("head", 0) for i in kernel.nodes if nodes[i].kind in HEADS)
        width = self.section.values[nodes[kernel.nodes[0]].inputs[0]].width
        count = self.batch * (width // head)
        for s in range(self.batch):
            for n0 in range(0, width, head):
                at = (s * self.tokens, (s + 1) * self.tokens, n0, n0 + head, 0, 0)
                task = self.task(b, program, "heads", at, nodes[kernel.nodes[0]].op)
                timed = kernel.timed
                task.far, task.near, task.work = timed.far / count, timed.near / count, timed.work / count
                task.engine, task.lead = ENGINES.index("vector"), NONE
                grid.tasks.append(task)

    # slices --------------------------------------------------------------------------------------

    def task(self, b: Builder, program: int, kind: str, at: Coordinates, op: int) -> Task:
        """A task of a program at some coordinates, its slices filled in."""
        reads = [(s, chip, *run) for s, r, c, chip in b.sources for run in self._read(s, r, c, at)]
        writes = [(s, -1, *run) for s, r, c in b.targets for run in self._write(s, r, c, at)]
        return Task(OPCODES.index(kind), program, at, reads, writes, op, 0.0, 0.0, 0.0, 0, 0.0, NONE)

    def _read(self, s: Storage, r: str, c: Columns, at: Coordinates) -> list[tuple[int, int]]:
        if r == "cache":
            return self._cache(s, c, at)
        if r == "expert":
            return [(0, s.bytes)]
        blocks = (at[0] // max(1, s.width - 1), at[1] // max(1, s.width - 1))
        r0, r1 = {"m": at[:2], "n": at[2:4], "all": (0, s.rows), "blocks": blocks}[r]
        c0, c1 = self._columns(s, c, at)
        return [s.cover(r0, r1, c0, c1)]

    def _write(self, s: Storage, r: str, c: Columns, at: Coordinates) -> list[tuple[int, int]]:
        if r == "cache":
            return self._cache(s, c, at)
        c0, c1 = self._columns(s, c, at)
        return s.runs(*((0, s.rows) if r == "all" else at[:2]), c0, c1)

    def _columns(self, s: Storage, c: Columns, at: Coordinates) -> tuple[int, int]:
        _, _, n0, n1, k0, k1 = at
        if not isinstance(c, str):
            return c[0], c[1]
        if c.startswith("head:"):
            k, n = (int(x) for x in c.split(":")[1:])
            return n0 // n * k, (n0 // n + 1) * k
        node = next((n for n in self.section.nodes if n.kind == "attention"), None)
        if c in ("q", "stats", "groups"):
            assert node is not None
            h, group = n0 // (n1 - n0), (n1 - n0) // node.attr("value_dim")
            each = {"q": node.attr("dim") * group, "stats": 2 * group, "groups": group}[c]
            return h * each, (h + 1) * each
        return {"n": (n0, n1), "k": (k0 // s.per, -(-k1 // s.per)), "all": (0, s.width)}[c]

    def _cache(self, s: Storage, c: Columns, at: Coordinates) -> list[tuple[int, int]]:
        """Runs of a cache [heads, batch, positions, elements]: whole rows of the heads and sequences of a
        tile, or a stretch of one."""
        m0, m1, n0, n1, k0, k1 = at
        head, length = s.panel, s.rows // self.batch
        row = head * s.item
        if c == "keys":
            h, b = 0 if s.width == head else n0 // (n1 - n0), m0 // self.tokens
            base = (h * self.batch + b) * length
            return [((base + k0) * row, (k1 - k0) * row)]
        b0, b1 = m0 // self.tokens, -(-m1 // self.tokens)
        heads = range(n0 // head, -(-n1 // head))
        if b0 == 0 and b1 == self.batch:
            low = heads.start * self.batch * length
            return [(low * row, len(heads) * self.batch * length * row)]
        return [(((h * self.batch + b0) * length) * row, (b1 - b0) * length * row) for h in heads]


def _walk(
    rows: int, tile: Tile, lanes: Sequence[tuple[int, int]], heads: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(m0, m1, lane, n0, n1) of all tiles: down a band of row tiles, then to the next column tile, of one
    head after the other."""
    starts = list(range(0, rows, tile.m))
    for at in range(0, len(starts), tile.band):
        band = starts[at : at + tile.band]
        for lane, (n, width) in enumerate(lanes):
            for head, n0 in itertools.product(range(heads), range(0, n, width)):
                for m0 in band:
                    last = min(n, n0 + width)
                    yield m0, min(rows, m0 + tile.m), lane, head * n + n0, head * n + last
