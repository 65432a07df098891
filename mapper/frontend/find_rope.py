"""Recognises rotary embeddings: a rotation of column pairs of one tensor by tables of cosines and sines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mapper.errors import MapperError
from mapper.frontend import build
from mapper.frontend.agree import MAX_ELEMENTS, Checker, Probe, stored_array, volume
from mapper.frontend.cut import VIEWS, View
from mapper.frontend.net import Array, Value
from mapper.frontend.rewrite import Match
from mapper.ir.dims import ONE, Dim

_INSIDE = frozenset({"add", "sub", "mul", "neg", "cast"} | VIEWS)
_OUT = ("add", "concat", "reshape", "transpose")
_SWAP = (0, 2, 1, 3)  # [B, S, H, D] to [B, H, S, D]
_PROBE = {"batch": 1, "sequence": 6, "past": 0}


@dataclass(eq=False)
class Tables:
    """Evaluates tables of angles once per pair, with stand-in frequencies where they are stored."""

    folder: Path
    known: dict[tuple[int, int], tuple[Array, Array] | None] = field(default_factory=dict)

    def values(self, cos: Value, sin: Value) -> tuple[Array, Array] | None:
        """Both tables at positions 0, 1, 2, ..., None where they cannot be evaluated."""
        key = (id(cos), id(sin))
        if key not in self.known:
            self.known[key] = self._evaluate(cos, sin)
        return self.known[key]

    def _evaluate(self, cos: Value, sin: Value) -> tuple[Array, Array] | None:
        probe = Probe.of([cos, sin], [])
        arrays: dict[int, Array] = {}
        for leaf in probe.leaves:
            if leaf.weight is not None and leaf.rank == 2 and leaf.dims[0].value > 1:
                table = stored_array(leaf, self.folder)
                if table is None:
                    return None
                arrays[id(leaf)] = table
            if leaf.source and leaf.dtype[0] in "iu":
                shape = [d.evaluate(_PROBE) if d.symbols <= set(_PROBE) else 6 for d in leaf.dims]
                if volume(shape) > MAX_ELEMENTS:
                    return None
                arrays[id(leaf)] = np.broadcast_to(
                    np.arange(shape[-1]) if shape else np.array(0), shape
                ).copy()
        try:
            first, second = probe.evaluate(_PROBE, arrays)
        except MapperError:
            return None
        return first, second


def is_rotation(cos: Array, sin: Array) -> bool:
    """cos > 0 and sin = 0 at position 0, cos^2 + sin^2 the same everywhere."""
    if not cos.size or cos.shape != sin.shape or cos.ndim < 2:
        return False
    first_cos, first_sin = (
        cos.reshape(-1, cos.shape[-2], cos.shape[-1])[0, 0],
        sin.reshape(-1, *sin.shape[-2:])[0, 0],
    )
    norm = cos**2 + sin**2
    steady = bool(np.allclose(norm, norm.reshape(-1)[0], rtol=1e-4))
    return steady and bool(np.all(first_cos > 0)) and bool(np.allclose(first_sin, 0, atol=1e-6))


def doubled(table: Array, style: str) -> bool:
    """Whether both columns of every pair hold the same angle."""
    half = table.shape[-1] // 2
    a, b = (table[..., :half], table[..., half:]) if style == "half" else (table[..., 0::2], table[..., 1::2])
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-12))


def ropes(view: View, checker: Checker) -> list[Match]:
    """Rotations of [B, H, S, D] tensors; the largest region of each."""
    tables, found = Tables(checker.folder), []
    covered: set[int] = set()
    for node in reversed(view.nodes):
        out = node.outputs[0]
        if node.op not in _OUT or out.rank != 4 or id(out) in covered or not view.is_data(out):
            continue
        if not out.dims[3].is_const:
            continue
        swapped = node.op == "transpose"
        if swapped and node.attrs["perm"] != _SWAP:
            continue
        dims = node.inputs[0].dims if swapped else out.dims
        cuts = [c for c in view.sources(out, _INSIDE) if c[0].dims == dims and len(c[1]) == 2]
        match = _rope(view, checker, tables, out, *cuts[0]) if cuts else None
        if match is not None:
            found.append(match)
            covered |= {id(o) for n in Probe.of([out], match.bounds).nodes for o in n.outputs}
    return found


def _angles(values: list[Value]) -> list[Value]:
    """The distinct tables among the values that are no data, behind broadcasting views."""
    found: dict[int, Value] = {}
    for value in values:
        if value.rank >= 2 and value.dtype in ("f32", "f16", "bf16", "f64"):
            found.setdefault(id(value), value)
    return list(found.values())


def _rope(
    view: View, checker: Checker, tables: Tables, out: Value, x: Value, free: list[Value]
) -> Match | None:
    angles = _angles(free)
    if len(angles) != 2 or len(free) != 2:
        return None
    swapped = out.op == "transpose"
    source, x = x, build.transpose(view.net, x, _SWAP) if swapped else x
    for cos, sin in (angles, angles[::-1]):
        made = tables.values(cos, sin)
        if made is not None and not is_rotation(*made):
            continue
        for width in _widths(cos, x):
            for given, style in _operands(view, x, width):
                match = _with_tables(view, checker, out, (given, source), (cos, sin), width, style, made)
                if match is not None:
                    return match
    return None


def _operands(view: View, x: Value, width: int) -> list[tuple[Value, str]]:
    """What may be turned, and how: `x` in both styles, and `x` whose pairs are parted first (as multi-head
    latent attention does: interleaved pairs in, halves out)."""
    plain = [(x, "half"), (x, "interleaved")]
    if x.dims[3].value != width:
        return plain
    sides = [build.slice_(view.net, x, [Dim.of(side)], [Dim.of(width)], [3], [2]) for side in (0, 1)]
    return [*plain, (build.concat(view.net, sides, 3), "half")]


def _widths(table: Value, x: Value) -> list[int]:
    if not table.dims[-1].is_const:
        return []
    columns, whole = table.dims[-1].value, x.dims[3].value
    return [w for w in (columns, 2 * columns) if w <= whole and w % 2 == 0]


def _with_tables(
    view: View,
    checker: Checker,
    out: Value,
    operand: tuple[Value, Value],
    pair: tuple[Value, Value],
    width: int,
    style: str,
    made: Any,
) -> Match | None:
    full = pair[0].dims[-1].value == width
    if full and made is not None and not all(doubled(t, style) for t in made):
        return None
    fitted = [_fit(view, t, out.op == "transpose") for t in pair]
    if None in fitted:
        return None
    cos, sin = (t for t in fitted if t is not None)
    attrs = {"style": style, "rotary_dim": width}
    x, source = operand
    match = Match(out, "rope", ("x", "cos", "sin"), (x, cos, sin), attrs, (source, *pair))
    if full:  # only doubled tables are meant: independent columns would tell the two sides apart for nothing
        return match if _holds_doubled(checker, match, pair, style) else None
    return match if checker.holds(match) else None


def _holds_doubled(checker: Checker, match: Match, pair: tuple[Value, Value], style: str) -> bool:
    probe = Probe.of([match.out, *match.inputs], match.bounds)
    key = (checker.key(match, probe), "doubled")
    if key not in checker.seen:
        arrays: dict[int, Array] = {}
        rng = np.random.default_rng(11)
        for table in pair:
            shape = [d.value if d.is_const else 1 for d in table.dims]
            shape[-2] = 1
            if volume(shape) > MAX_ELEMENTS:
                return False
            part = rng.standard_normal((*shape[:-1], shape[-1] // 2))
            whole = np.concatenate([part, part], -1) if style == "half" else np.repeat(part, 2, -1)
            arrays[id(table)] = whole.astype(np.float32)
        checker.seen[key] = checker.test(match, probe, None, arrays)
    return checker.seen[key]


def _fit(view: View, table: Value, swapped: bool) -> Value | None:
    """The table in a shape that `rope` takes: [S, r], [B, S, r] or [B, 1, S, r]; `swapped` where it is laid
    out against [B, S, H, D]."""
    if swapped:
        if table.rank == 3 and table.dims[1] == ONE:  # [S, 1, r]
            return build.transpose(view.net, table, (1, 0, 2))
        fits = table.rank == 4 and table.dims[2] == ONE
        return build.transpose(view.net, table, _SWAP) if fits else None
    if table.rank == 2 or table.rank == 3:
        return table
    if table.rank == 4 and table.dims[1] == ONE:
        return table
    if table.rank == 4 and table.dims[2] == ONE:  # x is [B, S, H, D]: not the layout of `rope`
        return None
    return (
        build.reshape(view.net, table, table.dims[1:]) if table.rank == 5 and table.dims[0] == ONE else None
    )
