"""Numeric probes of a decoder graph: what it computes from positions and masks when no token is padding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from xdsl.ir import SSAValue

from mapper.errors import ModelError, UnsupportedModelError
from mapper.ir.dims import ONE, Dim
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.reference import evaluate_values
from mapper.ir.reference_transformer import position_mask
from mapper.ir.types import Array, TensorType

_MASKED = -1e4
"""An additive mask at or below this excludes a position."""
_PROBED, _STEPPED = 4096, 1 << 17
"""Windows and runs up to this many positions are probed at their ends: in a graph that takes a past, which
makes few rows of a mask, and in one that does not, where queries are as many as keys."""


@dataclass
class Probe:
    """Evaluates parts of an unrolled, dynamic decoder graph on chosen positions."""

    graph: Graph
    _tables: dict[tuple[SSAValue, SSAValue, int], Array] = field(default_factory=dict)
    _checked: set[tuple[SSAValue | None, object]] = field(default_factory=set)

    @cached_property
    def cached(self) -> bool:
        """Whether the graph has cache inputs; one without starts at position 0."""
        return bool(self.graph.inputs_with_role("past"))

    def inputs(self, past: int, tokens: int) -> dict[str, Array]:
        """Inputs of batch 1: `tokens` new tokens after `past` old ones, nothing padded, caches zero. Raises
        ModelError where a cache of fixed length is too short."""
        made: dict[str, Array] = {}
        for name, kind in self.graph.inputs:
            role = self.graph.roles["inputs"].get(name, "other")
            array = _steering(role, kind, past, tokens)
            if array is None and role.startswith("past.") and kind.rank >= 3:
                # of the input's type at once, so that a long past takes no memory until it is read
                array = np.zeros(self._cache_shape(name, kind, past, tokens), kind.numpy)
            if array is not None:
                made[name] = array.astype(kind.numpy, copy=False)
        return made

    def _cache_shape(self, name: str, kind: TensorType, past: int, tokens: int) -> list[int]:
        """A cache's shape: its symbols by name, else by where they stand in [B, Hkv, P, Dh]."""
        symbols = {"batch": 1, "sequence": tokens, "past": past, "capacity": past + tokens}
        sizes = []
        for i, dim in enumerate(kind.shape):
            known = dim.symbols <= set(symbols)
            sizes.append(dim.evaluate(symbols) if known else (1, 0, past, 0)[i] if i < 4 else past)
        if any(
            str(d) not in symbols and d.is_const and d.value < past + tokens for d in self._rows(name, kind)
        ):
            raise ModelError(
                f"input {name!r}: a cache of fixed length is too short for {past + tokens} tokens"
            )
        return sizes

    def _rows(self, name: str, kind: TensorType) -> list[Dim]:
        """The token axis of a cache of fixed length, none of one that grows."""
        layouts = [t["layout"] for t in self.graph.roles.get("caches", {}).values() if t["input"] == name]
        axes = re.findall(r"\(.*?\)|.", layouts[0]) if layouts else []
        return [kind.shape[axes.index("L")]] if "L" in axes else []

    def values(self, op: DataflowOp, values: Sequence[SSAValue], past: int, tokens: int) -> list[Array]:
        """Values of the graph at those positions. Raises UnsupportedModelError naming `op`, their reader."""
        past = past if self.cached else 0
        try:
            return evaluate_values(self.graph, self.inputs(past, tokens), values)
        except ModelError as error:
            raise UnsupportedModelError(f"{place(op)}: cannot be evaluated on its own: {error}") from error

    @cached_property
    def from_tokens(self) -> set[SSAValue]:
        """All values that depend on the token ids' values (not only on their shape)."""
        return self._from(self.graph.inputs_with_role("token_ids"), False)

    @cached_property
    def from_positions(self) -> set[SSAValue]:
        """All values that depend on inputs, but on what tokens and caches hold in no way."""
        held = self.from_tokens | self._from(self.graph.inputs_with_role("past"), False)
        return self._from([n for n, _ in self.graph.inputs], True) - held

    def _from(self, names: Iterable[str], shapes: bool) -> set[SSAValue]:
        """All values that depend on the inputs of those names, or (`shapes`) on their shapes."""
        found: set[SSAValue] = {self.graph.input_values[n] for n in names}
        for op in self.graph.top():
            if (shapes or op.mnemonic != "shape_of") and any(v in found for v in op.operands):
                found.update(op.results)
        return found

    def is_position_embedding(self, op: DataflowOp) -> bool:
        """Whether the op embeds something else than tokens."""
        return op.mnemonic == "embed" and op.operands[0] not in self.from_tokens

    def position_offset(self, op: DataflowOp) -> int:
        """The table row of position 0. Raises where the rows are not position + offset."""
        past = 3 if self.cached else 0
        (ids,) = self.values(op, [op.operands[0]], past, 4)
        offset = int(ids.flat[0]) - past
        if ids.shape[-1] != 4 or not (ids.reshape(-1, 4) == np.arange(4) + past + offset).all():
            raise UnsupportedModelError(f"{place(op)}: its rows are not positions plus a constant")
        return offset

    def rope_table(self, op: DataflowOp, context: int) -> Array:
        """[2, context, rotary_dim/2] f32: cosines and sines of positions 0..context-1. Raises where the
        angles depend on more than the position."""
        cos, sin = op.operands[1:3]
        key = (cos, sin, context)
        if key not in self._tables:
            table = self._angles(op, 0, context)
            past = context // 2 if self.cached else 0
            later = self._angles(op, past, min(context - past, 4))
            if not np.allclose(later, table[:, past : past + later.shape[1]], rtol=1e-5, atol=1e-6):
                raise UnsupportedModelError(
                    f"{place(op)}: its angles depend on more than the token's position"
                )
            self._tables[key] = table
        return self._tables[key]

    def _angles(self, op: DataflowOp, past: int, tokens: int) -> Array:
        pairs = op.attr("rotary_dim") // 2
        found: list[Array] = []
        for array in self.values(op, op.operands[1:3], past, tokens):
            if array.size != tokens * array.shape[-1]:
                raise UnsupportedModelError(f"{place(op)}: angles of shape {list(array.shape)}")
            flat = array.reshape(tokens, -1)
            if flat.shape[1] == 2 * pairs:
                half = op.attr("style") == "half"
                flat, twin = (flat[:, :pairs], flat[:, pairs:]) if half else (flat[:, ::2], flat[:, 1::2])
                if not np.allclose(flat, twin, rtol=1e-6, atol=1e-7):
                    raise UnsupportedModelError(f"{place(op)}: the two angles of a pair differ")
            found.append(flat)
        return np.stack(found).astype(np.float32)

    def check_attention(self, op: DataflowOp) -> None:
        """Raises UnsupportedModelError where the mask is not what the op's attributes say."""
        if not op.attr("causal"):
            raise UnsupportedModelError(f"{place(op)}: not causal; the serving form needs a decoder")
        latent = op.mnemonic == "latent_attention"
        mask = op.operand("mask")
        window, slopes, chunk = op.attr("window"), None, 0
        if not latent:
            slopes, chunk = op.attr("slopes"), op.attr("chunk")
        key = (mask, (window, slopes, chunk))
        if mask is None or key in self._checked:
            return
        most = _STEPPED if self.cached else _PROBED
        past, tokens = (window if 0 < window <= _PROBED else 0) + 3, 4
        if 0 < chunk <= most:
            past = max(past, chunk - 2)  # the last two of a run, and the first two of the next
        past, tokens = (past, tokens) if self.cached else (0, past + tokens)
        (found,) = self.values(op, [mask], past, tokens)
        total = max(past + tokens, found.shape[-1])
        allowed, bias = position_mask(np.arange(past, past + tokens), total, True, window, slopes, chunk)
        if not _same_mask(found, allowed, bias):
            raise UnsupportedModelError(
                f"{place(op)}: its mask is not causal with window {window}, chunk {chunk} as recognised"
            )
        self._checked.add(key)

    def check_rows(self, op: DataflowOp) -> None:
        """Raises UnsupportedModelError where a cache update does not write the rows after the past."""
        rows = op.operands[2]
        if (rows, None) in self._checked:
            return
        for past, tokens in ((3, 4), (5, 1)):
            (found,) = self.values(op, [rows], past, tokens)
            if not (found.reshape(-1, tokens) == np.arange(past, past + tokens)).all():
                raise UnsupportedModelError(f"{place(op)}: its rows are not those after the past")
        self._checked.add((rows, None))


def _steering(role: str, kind: TensorType, past: int, tokens: int) -> Array | None:
    """An input that is neither tokens nor cache, by its role; None where that does not say what it holds."""
    lengths = {"write_index": past, "last_index": past + tokens - 1, "total_length": past + tokens}
    if role == "token_ids":
        return np.zeros((1, tokens))
    if role == "attention_mask" and kind.rank == 2:
        room = kind.shape[1].value if kind.shape[1].is_const else past + tokens
        return (np.arange(room) < past + tokens)[None]
    if role == "position_ids" and kind.rank == 2:
        return np.arange(past, past + tokens)[None]
    if role == "cache_position" and kind.rank == 1:
        return np.arange(past, past + tokens)
    if role in lengths and kind.rank <= 1:
        return np.full([1] * kind.rank, lengths[role])
    return None


def _same_mask(found: Array, allowed: Array, bias: Array | None) -> bool:
    """Whether a mask passes `allowed` [S, T] and adds `bias` [H, S, T] there, up to a constant per row."""
    heads = 1 if bias is None else bias.shape[0]
    try:
        wide = np.broadcast_to(found, (1, heads, *allowed.shape))[0]
    except ValueError:
        return False
    if wide.dtype == np.bool_:
        return bias is None and bool((wide == allowed).all())
    if ((wide > _MASKED) != allowed).any():
        return False
    expected = np.zeros(wide.shape) if bias is None else bias
    difference = np.where(allowed, wide - expected, np.nan)
    spread = np.nanmax(difference, axis=-1) - np.nanmin(difference, axis=-1)
    return bool((spread <= 1e-4 * (1 + np.abs(expected).max())).all())


def place(op: DataflowOp) -> str:
    """How an error names an op."""
    return f"{op.name} ({op.node or 'unnamed node'})"


LENGTHS = ("write_index", "last_index", "total_length")
"""Roles of inputs that say how many rows of a cache hold tokens: before the step, the last one, after it."""


def step_shapes(graph: Graph, batch: int, tokens: int) -> Mapping[str, int]:
    """Values of the symbols for the batch and the number of new tokens; the past stays symbolic."""
    bound: dict[str, int] = {}
    placed = {t["input"] for t in graph.roles.get("caches", {}).values()}
    for name, kind in graph.inputs:
        role = graph.roles["inputs"].get(name, "other")
        sizes: list[int | None] = []
        if role in ("token_ids", "position_ids"):
            sizes = [batch, tokens]
        elif role in ("attention_mask", *LENGTHS):
            sizes = [batch]
        elif role.startswith("past."):
            sizes = [batch] if name not in placed else []
        elif role == "cache_position":
            sizes = [tokens]
        for dim, size in zip(kind.shape, sizes, strict=False):
            if size is None:
                continue
            if dim.is_const and dim.value != size and not (role in LENGTHS and dim == ONE):
                raise UnsupportedModelError(
                    f"input {name!r} has a fixed dimension {dim}, and {size} is asked for"
                )
            if not dim.is_const and bound.setdefault(str(dim), size) != size:
                raise UnsupportedModelError(
                    f"input {name!r}: dimension {dim} is both {bound[str(dim)]} and {size}"
                )
    return {symbol: size for symbol, size in bound.items()}


def table_of(tensors: Mapping[str, Array], table: Array) -> str | None:
    """The name under which an equal table is already there."""
    for name, known in tensors.items():
        if known.shape == table.shape and np.array_equal(known, table):
            return name
    return None


def static_or_raise(graph: Graph) -> None:
    """Raises UnsupportedModelError naming the first op with a shape that still depends on a symbol."""
    for op in graph.top():
        for result in op.results:
            if not tensor_type(result).is_static:
                raise UnsupportedModelError(
                    f"{place(op)}: shape {tensor_type(result)} depends on the cache length"
                )
