"""A kernel's programs in float64 with running error analysis: what the emitted bf16 kernels are held against.

Every register is its exact value, from the operands as they are stored, and a bound on the error of any
float32 evaluation of it whose products take operands in the program's format (Higham, Accuracy and Stability
of Numerical Algorithms, sections 3.1 and 3.3). The unit roundoff of a format with p bits is 2**-p. Shares
nothing with the emitter and the executor but the plan's programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
SINGLE = ROUNDOFF["f32"]
NUMPY = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "i64": np.int64}
FUNCTION = 8
"""Roundoffs of a float32 exponential, quotient or root, and the few operations around it."""


@dataclass(frozen=True)
class Bounded:
    """A value and the largest absolute error of its evaluation, element by element."""

    value: Array
    error: Array


@dataclass
class Reference:
    """Evaluates programs over all rows and columns of their values. `read` gives an operand's stored array:
    [rows, columns], weights [n, k], caches [heads, batch, positions, elements]."""

    batch: int
    read: Callable[[Mapping[str, Any]], Array]
    attended: Bounded | None = None
    part: tuple[int, int] = (0, 1)
    partial: dict[str, Bounded] = field(default_factory=dict)
    registers: dict[str, Bounded] = field(default_factory=dict)
    program: Any = None

    def run(self, program: Any, part: tuple[int, int] = (0, 1)) -> list[tuple[Any, Bounded, int]]:
        """(operand, what is stored in it, its past: -1 unless it is a cache) of each write of a program; of
        the part (number, of how many) of K where K is split."""
        self.program, self.registers, self.part = program, {}, part
        found = []
        for op, *rest in program["code"]:
            if op == "write":
                operand = program["writes"][rest[0]]
                self.partial[operand["value"]] = self.registers[rest[1]]
                found.append((operand, rounded(self.registers[rest[1]], operand["dtype"]), -1))
            elif op == "append":
                operand, past = program["writes"][rest[0]], int(self.registers[rest[2]].value.item())
                found.append((operand, rounded(self.registers[rest[1]], operand["dtype"]), past))
            else:
                getattr(self, f"_{op}")(*rest)
        return found

    def _read(self, out: str, number: int) -> None:
        operand = self.program["reads"][number]
        value = self.read(operand)
        if operand["c"] == "k":
            value = self._share(value)
        self.registers[out] = Bounded(value, np.zeros_like(value))

    def _share(self, value: Array) -> Array:
        number, parts = self.part
        return np.split(value, parts, -1)[number]

    def _columns(self, out: str, x: str) -> None:
        v = self.registers[x]
        self.registers[out] = Bounded(self._share(v.value), self._share(v.error))

    def _sum(self, out: str, parts: Sequence[str]) -> None:
        # parts of K: from the programs that came before
        reads = {i[1]: self.program["reads"][i[2]]["value"] for i in self.program["code"] if i[0] == "read"}
        terms = [self.partial[reads[p]] for p in parts]
        error = sum((t.error for t in terms), np.zeros(1))
        size = sum((abs(t.value) + t.error for t in terms), np.zeros(1))
        self.registers[out] = Bounded(
            sum((t.value for t in terms), np.zeros(1)), error + len(terms) * SINGLE * size
        )

    def _embed(self, out: str, ids: str, table: str) -> None:
        value = self.registers[table].value[self.registers[ids].value.astype(int).ravel()]
        self.registers[out] = Bounded(value, np.zeros_like(value))

    def _norm(self, out: str, x: str, weight: str, bias: None, kind: str, eps: float, offset: float,
              head: int) -> None:  # fmt: skip
        assert kind == "rms" and bias is None and not offset and not head
        v = self.registers[x]
        assert not v.error.any()
        value = v.value / np.sqrt(np.mean(v.value**2, -1, keepdims=True) + eps) * self.registers[weight].value
        # a sum of n squares errs by n roundoffs, its root by half of that
        self.registers[out] = Bounded(value, (v.value.shape[-1] / 2 + FUNCTION) * SINGLE * abs(value))

    def _matmul(self, out: str, x: str, weight: str, form: str) -> None:
        self.registers[out] = dot(taken(self.registers[x], form), self.registers[weight].value.T)

    def _rope(self, out: str, x: str, table: str, past: str, style: str, rotary: int, head: int,
              tokens: int, length: int) -> None:  # fmt: skip
        assert style == "half" and tokens == 1
        at, half, v = int(self.registers[past].value.item()), rotary // 2, self.registers[x]
        cos, sin = self.registers[table].value.reshape(2, length, half)[:, at]
        value, error = (w.reshape(self.batch, -1, head).copy() for w in (v.value, v.error))
        a, b = value[..., :half].copy(), value[..., half:rotary].copy()
        ea, eb = error[..., :half].copy(), error[..., half:rotary].copy()
        value[..., :half], value[..., half:rotary] = a * cos - b * sin, b * cos + a * sin
        for place, (c, s) in ((slice(0, half), (cos, sin)), (slice(half, rotary), (sin, cos))):
            moved = ea * abs(c) + eb * abs(s)
            error[..., place] = moved + 3 * SINGLE * (abs(a * c) + abs(b * s) + moved)
        self.registers[out] = Bounded(value.reshape(v.value.shape), error.reshape(v.value.shape))

    def _point(self, out: str, fn: str, inputs: Sequence[str], scalar: None) -> None:
        assert fn == "add" and scalar is None
        a, b = (self.registers[i] for i in inputs)
        self.registers[out] = rounded(Bounded(a.value + b.value, a.error + b.error), "f32")

    def _gate(self, out: str, act: str, gate: str, up: str) -> None:
        assert act == "silu"
        g, u = self.registers[gate], self.registers[up]
        silu = g.value / (1 + np.exp(-g.value))
        # the steepest slope of silu is 1.0998
        error = 1.1 * g.error + FUNCTION * SINGLE * (abs(silu) + g.error)
        whole = abs(u.value) * error + abs(silu) * u.error + error * u.error
        self.registers[out] = rounded(Bounded(silu * u.value, whole), "f32")

    def _attend(self, out: str, stats: str, q: str, k: str, v: str, past: str, dim: int, value_dim: int,
                group: int, tokens: int, window: int, scale: float, softcap: float) -> None:  # fmt: skip
        assert tokens == 1 and not window and not softcap
        seen = int(self.registers[past].value.item()) + 1
        form = next(o["dtype"] for o in self.program["reads"] if o["r"] == "cache")
        keys, values = (self.registers[r].value[:, :, :seen] for r in (k, v))
        heads = self.registers[q].value.shape[1] // dim
        made = np.zeros((2, self.batch, heads, value_dim))
        queries = taken(self.registers[q], form)
        for b in range(self.batch):
            for h in range(heads):
                one = slice(h * dim, (h + 1) * dim)
                query = Bounded(queries.value[b : b + 1, one], queries.error[b : b + 1, one])
                made[:, b, h] = attention(query, keys[h // group, b], values[h // group, b], scale, form)
        self.attended = Bounded(*made.reshape(2, self.batch, -1))
        self.registers[out] = self.registers[stats] = self.attended

    def _merge(self, out: str, total: str, parts: Sequence[str], stats: Sequence[str]) -> None:
        # stretches of the cache: the whole of it, from the attention that came before
        assert self.attended is not None
        self.registers[out] = self.registers[total] = self.attended

    def _finish(self, out: str, x: str, stats: str, sinks: None) -> None:
        assert sinks is None
        self.registers[out] = self.registers[x]


def rounded(v: Bounded, form: str) -> Bounded:
    """A value that is rounded to a format."""
    return Bounded(v.value, v.error + ROUNDOFF[form] * (abs(v.value) + v.error))


def taken(v: Bounded, form: str) -> Bounded:
    """An operand as a product of a format takes it: rounded, unless all of it is exact there already."""
    exact = not v.error.any() and (v.value == v.value.astype(NUMPY[form]).astype(np.float64)).all()
    return v if exact else rounded(v, form)


def dot(x: Bounded, w: Array) -> Bounded:
    """x @ w for exact w, summed in float32 in any order."""
    size = (abs(x.value) + x.error) @ abs(w)
    return Bounded(x.value @ w, x.error @ abs(w) + len(w) * SINGLE * size)


def attention(q: Bounded, keys: Array, values: Array, scale: float, form: str) -> tuple[Array, Array]:
    """(result, bound) of one head: keys [n, d], values [n, e]."""
    s = dot(q, keys.T * scale)
    delta = s.error + FUNCTION * SINGLE * (abs(s.value) + s.error)
    weights = np.exp(s.value - s.value.max())
    shares = weights / weights.sum()
    # a share errs by twice the largest error of a score; it is rounded to the format of the cache; sums of n
    # terms stand above and below, rescaled at most n times
    part = np.expm1(2 * delta.max()) + ROUNDOFF[form] + 2 * (len(keys) + FUNCTION) * SINGLE
    return (shares @ values)[0], part * (1 + part) * (shares @ abs(values))[0]
