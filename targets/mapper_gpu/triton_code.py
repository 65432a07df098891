"""Task programs as Triton statements: what an instruction of `programs` is on a tile of a kernel.

A program's registers are evaluated over a frame: the rows of a tile, and one or more groups of its columns.
Rotary embedding pairs the columns of a head, so a frame that rotates has the first and the second of each
pair, and what is not rotated, as groups: tiles of their own, loaded so, that no lane exchanges values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mapper.errors import LoweringError
from mapper_gpu.triton_names import Parameters

Json = Any
TYPES = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16", "i64": "tl.int64"}
"""Storage format -> Triton's type."""
HALVES = 12582912.0
"""1.5 x 2^23, which rounds away the fraction of a small number that is added to it."""
WIDE = 1 << 31
"""Elements from which indices take 64 bits."""
_SIGMOID = "1.0 / (1.0 + tl.exp(-{0}))"
_TANH = "(2.0 / (1.0 + tl.exp(-2.0 * ({0}))) - 1.0)"
ACTIVATIONS = {
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "0.5 * {0} * (1.0 + "
    + _TANH.format("0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0})")
    + ")",
    "gelu_quick": "{0} / (1.0 + tl.exp(-1.702 * {0}))",
    "relu": "tl.maximum({0}, 0.0)",
    "relu_squared": "tl.maximum({0}, 0.0) * tl.maximum({0}, 0.0)",
    "sigmoid": _SIGMOID,
    "tanh": _TANH,
    "identity": "{0}",
}
POINTS = {
    "tanh": _TANH, "sigmoid": _SIGMOID, "relu": "tl.maximum({0}, 0.0)", "exp": "tl.exp({0})", "neg": "-{0}",
    "softplus": "tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0})))", "sqrt": "tl.sqrt({0})",
    "abs": "tl.abs({0})", "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
}  # fmt: skip


def power(n: int) -> int:
    """The least power of two that is at least n: the extent of a Triton tensor."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Group:
    """Columns of a frame: `index` a variable [1, columns] (or [rows, columns]), `mask` one of the same shape
    or "" where all columns exist; `element` the columns' places in their heads, or in the rotated half, and
    `heads` x `lanes` the shape of the columns where whole heads are held."""

    suffix: str
    index: str
    mask: str = ""
    element: str = ""
    heads: int = 0
    lanes: int = 0


@dataclass(frozen=True)
class Frame:
    """Where registers are evaluated. `row` is a variable [rows, 1], `token` its row modulo the tokens of a
    sequence."""

    name: str
    row: str
    row_mask: str
    groups: tuple[Group, ...]
    rows: int


@dataclass
class Statements:
    """The statements of one program, evaluated piece by piece into `lines`. `mark` ends the names of its
    variables whose shapes are the tile's, beside another program's in a branch of the same kernel: what both
    branches define Triton wants to be of one shape."""

    program: Json
    parameters: Parameters
    batch: int
    mark: str = ""
    lines: list[str] = field(default_factory=list)
    stats: dict[str, tuple[str, str]] = field(default_factory=dict)
    _values: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.made: dict[str, list[Json]] = {}
        for op, *rest in self.program["code"]:
            if op not in ("write", "append"):
                self.made.setdefault(rest[0], [op, *rest])
        if any(i[0] == "attend" for i in self.program["code"]):
            attend = next(i for i in self.program["code"] if i[0] == "attend")
            self.made[attend[2]] = attend

    def take(self) -> list[str]:
        """The lines so far, which are then forgotten."""
        lines, self.lines = self.lines, []
        return lines

    def fresh(self, name: str) -> str:
        """A variable of that name, or with a number behind it where it is taken."""
        made, number = name, 1
        while made in self._names or made in self.parameters.known.values():
            number += 1
            made = f"{name}{number}"
        self._names.add(made)
        return made

    def reserve(self, other: Statements) -> None:
        """Take none of the names that another program of the same kernel has for its statistics."""
        self._names |= {n for pair in other.stats.values() for n in pair if n}

    def bind(self, register: str, frame: Frame, names: Sequence[str]) -> None:
        """Say which variables hold a register in a frame."""
        self._values[register, frame.name] = list(names)

    def operand(self, number: int, writes: bool = False) -> Json:
        """A read, or written, operand."""
        return self.program["writes" if writes else "reads"][number]

    # values --------------------------------------------------------------------------------------

    def value(self, register: str, frame: Frame) -> list[str]:
        """Variables that hold a register, one per group of the frame; statements are added as needed."""
        key = (register, frame.name)
        if key not in self._values:
            op, *rest = self.made[register]
            rule = getattr(self, f"_{op}", None)
            if rule is None:
                raise LoweringError(f"gpu: no Triton source for {op!r} in a {self.program['kind']}")
            self._values[key] = rule(frame, *rest)
        return self._values[key]

    def _assign(self, name: str, frame: Frame, parts: Sequence[str]) -> list[str]:
        base = self.fresh(name)
        found = []
        for group, part in zip(frame.groups, parts, strict=True):
            self.lines.append(f"{base}{group.suffix} = {part}")
            found.append(f"{base}{group.suffix}")
        return found

    def _read(self, frame: Frame, out: str, number: int) -> list[str]:
        o = self.operand(number)
        p = self.parameters.name(o)
        vector = o["r"] == "all" and o["rows"] == 1
        row, row_mask = ("0", "") if vector else (frame.row, frame.row_mask)
        return self._assign(f"{p}_tile", frame, [
            load(p, o, row, g.index, join(row_mask, g.mask)) for g in frame.groups
        ])  # fmt: skip

    def _embed(self, frame: Frame, out: str, ids: str, table: str) -> list[str]:
        tokens, o = self.operand(self.made[ids][2]), self.operand(self.made[table][2])
        where = self.fresh("token")
        self.lines.append(
            f"{where} = tl.load({self.parameters.name(tokens)} + {frame.row}{masked(frame.row_mask, '0')})"
        )
        return self._assign("embedded", frame, [
            load(self.parameters.name(o), o, where, g.index, join(frame.row_mask, g.mask))
            for g in frame.groups
        ])  # fmt: skip

    def _positions(
        self, frame: Frame, out: str, table: str, past: str, tokens: int, offset: int
    ) -> list[str]:
        o = self.operand(self.made[table][2])
        where = self.fresh("place")
        self.lines.append(f"{where} = {self.place(frame, past, tokens)} + {offset}")
        return self._assign("position", frame, [
            load(self.parameters.name(o), o, where, g.index, join(frame.row_mask, g.mask))
            for g in frame.groups
        ])  # fmt: skip

    def past(self, register: str) -> str:
        """The expression that loads the tokens before these."""
        return f"tl.load({self.parameters.name(self.operand(self.made[register][2]))})"

    def place(self, frame: Frame, past: str, tokens: int) -> str:
        """The expression of the rows' places in their sequences."""
        return self.past(past) + (f" + {frame.row} % {tokens}" if tokens > 1 else "")

    def _norm(self, frame: Frame, out: str, x: str, weight: str | None, bias: str | None, kind: str,
              eps: float, offset: float, head: int) -> list[str]:  # fmt: skip
        values = self.value(x, frame)
        if head:
            values = self._head_norm(frame, values, kind, eps, head)
        else:
            mean, scale = self.stats[out]
            values = [f"({v} - {mean}) * {scale}" if mean else f"{v} * {scale}" for v in values]
        gain = self._across(frame, weight, head)
        shift = self._across(frame, bias, head)
        return self._assign("normed", frame, [
            v + (f" * {w}" if w and not offset else f" * ({w} + {offset})" if w else "")
            + (f" + {b}" if b else "")
            for v, w, b in zip(values, gain, shift, strict=True)
        ])  # fmt: skip

    def _across(self, frame: Frame, register: str | None, head: int) -> list[str]:
        """Loads of a vector as wide as the rows, or as a head."""
        if register is None:
            return [""] * len(frame.groups)
        o = self.operand(self.made[register][2])
        if head and o["width"] == head:
            return [load(self.parameters.name(o), o, "0", g.index + f" % {head}", g.mask)
                    for g in frame.groups]  # fmt: skip
        return [load(self.parameters.name(o), o, "0", g.index, g.mask) for g in frame.groups]

    def _head_norm(self, frame: Frame, values: list[str], kind: str, eps: float, head: int) -> list[str]:
        shapes = [f"[{frame.rows}, {g.heads}, {g.lanes}]" for g in frame.groups]
        headed = self.fresh("headed" + self.mark)
        for g, v, shape in zip(frame.groups, values, shapes, strict=True):
            kept = f"tl.where({g.mask}, {v}, 0.0)" if g.mask else v
            self.lines.append(f"{headed}{g.suffix} = tl.reshape({kept}, {shape})")
        parts = [f"{headed}{g.suffix}" for g in frame.groups]
        if kind == "layer":
            mean = self.fresh("mean" + self.mark)
            self.lines.append(f"{mean} = ({' + '.join(f'tl.sum({p}, 2)' for p in parts)}) / {head}")
            for g, p, shape in zip(frame.groups, parts, shapes, strict=True):
                centred = f"{p} - {mean}[:, :, None]"
                if g.mask:
                    centred = f"tl.where(tl.reshape({g.mask} & ({frame.row} >= 0), {shape}), {centred}, 0.0)"
                self.lines.append(f"{p} = {centred}")
        scale = self.fresh("scale" + self.mark)
        total = " + ".join(f"tl.sum({p} * {p}, 2)" for p in parts)
        self.lines.append(f"{scale} = 1.0 / tl.sqrt(({total}) / {head} + {eps!r})")
        return [
            f"tl.reshape({p} * {scale}[:, :, None], [{frame.rows}, {g.heads * g.lanes}])"
            for g, p in zip(frame.groups, parts, strict=True)
        ]

    def _rope(self, frame: Frame, out: str, x: str, table: str, past: str, style: str, rotary: int, head: int,
              tokens: int, length: int) -> list[str]:  # fmt: skip
        values = self.value(x, frame)
        first, _, *rest = frame.groups
        half = rotary // 2
        p = self.parameters.name(self.operand(self.made[table][2]))
        angle = self.fresh("angle" + self.mark)
        self.lines.append(f"{angle} = ({self.place(frame, past, tokens)}) * {half} + {first.element}")
        mask = masked(join(frame.row_mask, first.mask), "0.0")
        cos, sin = self.fresh("cos" + self.mark), self.fresh("sin" + self.mark)
        self.lines += [f"{cos} = tl.load({p} + {angle}{mask})",
                       f"{sin} = tl.load({p} + {length * half} + {angle}{mask})"]  # fmt: skip
        a, b = values[:2]
        turned = [f"{a} * {cos} - {b} * {sin}", f"{b} * {cos} + {a} * {sin}"]
        return self._assign("rotated", frame, [*turned, *values[2 : 2 + len(rest)]])

    def _columns(self, frame: Frame, out: str, x: str) -> list[str]:
        return self.value(x, frame)

    def _round_blocks(self, frame: Frame, out: str, x: str, block: int) -> list[str]:
        """Whole steps of 1/127 of each block's largest magnitude; of a turn of K, which has whole blocks."""
        found = []
        for g, v in zip(frame.groups, self.value(x, frame), strict=True):
            made, step = self.fresh("blocked"), self.fresh("size")
            self.lines += [
                f"{made} = tl.reshape({v}, [{frame.rows}, {g.lanes // block}, {block}])",
                f"{step} = tl.max(tl.abs({made}), 2)[:, :, None] / 127.0",
                f"{made} = {made} / tl.where({step} > 0.0, {step}, 1.0)",
                # to the nearest, of two the even one: in float32 there are no fractions from 2^23 on
                f"{made} = ({made} + {HALVES} - {HALVES}) * {step}",
                f"{made} = tl.reshape({made}, [{frame.rows}, {g.lanes}])",
            ]
            found.append(made)
        return found

    def _sum(self, frame: Frame, out: str, parts: list[str]) -> list[str]:
        found = [self.value(p, frame) for p in parts]
        return self._assign("total", frame, [" + ".join(p) for p in zip(*found, strict=True)])

    def _concat(self, frame: Frame, out: str, parts: list[str]) -> list[str]:
        terms: list[str] = []
        (group,) = frame.groups
        at = 0
        for part in parts:
            o = self.operand(self.made[part][2])
            first, end = o["c"] if not isinstance(o["c"], str) else (0, o["width"])
            low, high = at, at + end - first
            index = f"({group.index} - {low - first})"
            inside = f"({group.index} >= {low}) & ({group.index} < {high})"
            terms.append(load(self.parameters.name(o), o, frame.row, index,
                              join(frame.row_mask, group.mask, inside)))  # fmt: skip
            at = high
        return self._assign("gathered", frame, [" + ".join(terms)])

    def _point(self, frame: Frame, out: str, fn: str, inputs: list[str], scalar: list[Any] | None
               ) -> list[str]:  # fmt: skip
        columns = [list(v) for v in zip(*(self.value(i, frame) for i in inputs), strict=True)]
        for names in columns:
            if scalar is not None:
                names.insert(int(scalar[0]), repr(float(scalar[1])))
        form = ACTIVATIONS[fn[4:]] if fn.startswith("act:") else POINTS[fn]
        name = {"add": "added", "mul": "scaled"}.get(fn, fn.split(":")[-1])
        return self._assign(name, frame, [form.format(*names) for names in columns])

    def _gate(self, frame: Frame, out: str, act: str, gate: str, up: str) -> list[str]:
        pairs = zip(self.value(gate, frame), self.value(up, frame), strict=True)
        return self._assign("gated", frame, [
            f"({ACTIVATIONS[act].format(a)}) * {b}" for a, b in pairs
        ])  # fmt: skip

    # results -------------------------------------------------------------------------------------

    def store(self, frame: Frame) -> None:
        """The program's writes and appends, in order."""
        for op, *rest in self.program["code"]:
            if op == "write":
                o = self.operand(rest[0], True)
                for g, v in zip(frame.groups, self.value(rest[1], frame), strict=True):
                    self.put(o, frame, g, v)
            elif op == "append":
                self._append(frame, *rest)

    def put(self, o: Json, frame: Frame, g: Group, v: str, offset: str = "") -> None:
        """Store a tile into a written operand."""
        mask = join(frame.row_mask, g.mask)
        where = f"{self.parameters.name(o)}{offset} + {address(o, frame.row, g.index)}"
        self.lines.append(f"tl.store({where}, {v}{', mask=' + mask if mask else ''})")

    def _append(self, frame: Frame, number: int, x: str, past: str, tokens: int, head: int) -> None:
        values = self.value(x, frame)
        o = self.operand(number, True)
        p, length = self.parameters.name(o), o["rows"] // self.batch
        place = self.fresh("place")
        self.lines.append(
            f"{place} = {f'{frame.row} // {tokens}' if tokens > 1 else frame.row} * {length} + "
            + self.place(frame, past, tokens)
        )
        for g, v in zip(frame.groups, values, strict=True):
            index = f"({g.index} // {head} * {self.batch * length} + {place}) * {head} + {g.index} % {head}"
            mask = join(frame.row_mask, g.mask)
            self.lines.append(f"tl.store({p} + {index}, {v}{', mask=' + mask if mask else ''})")


def join(*masks: str) -> str:
    """Masks that must all hold."""
    return " & ".join(dict.fromkeys(m for m in masks if m))


def masked(mask: str, other: str) -> str:
    """The mask arguments of a load."""
    return f", mask={mask}, other={other}" if mask else ""


def address(o: Json, row: str, column: str) -> str:
    """The element of a panel layout at a row and a column (see storage)."""
    rows, width, panel = o["rows"], o["width"], o["panel"]
    if rows == 1:
        return column
    if rows * width >= WIDE and row != "0":
        row = f"{row}.to(tl.int64)"
    if panel == width:
        return f"{row} * {width} + {column}" if row != "0" else column
    return f"{column} // {panel} * {rows * panel} + {row} * {panel} + {column} % {panel}"


def load(p: str, o: Json, row: str, column: str, mask: str) -> str:
    """A load of a tile as float32."""
    cast = "" if o["dtype"] == "f32" else ".to(tl.float32)"
    return f"tl.load({p} + {address(o, row, column)}{masked(mask, '0.0')}){cast}"
