"""Lowering a decoder: storage, ports, both programs. The one module that sees the whole flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import LoweringError
from mapper.ir.weights import WeightSymbol
from mapper.machine import Machine
from mapper.schedule.tables import Phase
from mapper_lpu import attention, mlp, position
from mapper_lpu.decoder import SIDES, Builder, Cache, Program, head_width
from mapper_lpu.instruction import Latencies
from mapper_lpu.isa import EAST, F16, F32, LANES
from mapper_lpu.program import Timed, schedule
from mapper_lpu.spec import Decoder
from mapper_lpu.storage import Storage, Stored, mem
from mapper_lpu.weights import HeadLayout, Weights

U16_TYPE = F16  # an index vector is two byte planes, like fp16


@dataclass
class Lowered:
    """All of a schedule but its tables. `bindings`: buffer of layer 0 -> buffer per layer."""

    storage: Storage
    timed: dict[Phase, Timed]
    bindings: dict[int, tuple[int, ...]]
    constants: dict[str, npt.NDArray[Any]]
    symbols: dict[str, WeightSymbol]
    tokens: dict[Phase, int] = field(default_factory=dict)


def _caches(decoder: Decoder, storage: Storage, weights: Weights) -> list[Cache]:
    """KV caches of every layer: rows batch * context + position, even rows east, odd rows west."""
    a = decoder.attention
    rows = decoder.batch * decoder.context
    out = []
    share = a.heads // a.kv_heads
    columns = HeadLayout(a.heads, a.head_dim).columns(share)
    take = weights.constant("lanes/cache", np.array(columns, np.int64))
    for layer in range(decoder.layers):
        cache = Cache({}, {})
        for name, type, kind, first, into in (
            ("key", F16, "f16", 10, cache.keys),
            ("value", F32, "f32", 8, cache.values),
        ):
            planes = 2 if type == F16 else 4
            units = tuple(u for side in SIDES for u in mem(side, first, planes))
            both = storage.store(f"cache.{name}.{layer}", type, rows, units, ways=2)
            for side in SIDES:
                part = slice(side * planes, (side + 1) * planes)
                count = (rows + 1 - side) // 2
                into[side] = Stored(
                    both.name, type, count, both.units[part], both.base[part], both.buffers[part]
                )
            layout = {
                "kind": "rows",
                "dtype": kind,
                "ways": 2,
                "axes": [0, 2, 1, 3],
                "row_axes": 2,
                "take": take,
            }
            shape = (decoder.batch, a.kv_heads, decoder.context, a.head_dim)
            zeros = ["zeros", list(shape), "float32"]
            storage.port(f"cache.{name}.{layer}", "state", "float32", shape, both, layout, zeros)
        out.append(cache)
    return out


def _input(storage: Storage, phase: str, decoder: Decoder) -> Stored:
    """Token ids as index vectors, in the slices inside of the embedding table's."""
    rows = decoder.batch * decoder.tokens
    tokens = storage.store(f"{phase}/input_ids", U16_TYPE, rows, mem(EAST, 4, 2), program=phase)
    layout = {"kind": "broadcast", "dtype": "u16", "ways": 1}
    shape = (decoder.batch, decoder.tokens)
    storage.port("input_ids", "input", "int64", shape, tokens, layout, programs=(phase,))
    return tokens


def _position(storage: Storage, phase: str) -> tuple[dict[int, Stored], dict[int, Stored]]:
    """The position as index vectors and as numbers, on both sides."""
    index, value = {}, {}
    for side in SIDES:
        index[side] = storage.store(f"{phase}/position", U16_TYPE, 1, mem(side, 2, 2), program=phase)
        value[side] = storage.store(f"{phase}/position_value", F32, 1, mem(side, 0, 4), program=phase)
    placed = [(dtype, stored) for dtype, both in (("u16", index), ("f32", value)) for stored in both.values()]
    parts = [
        {"layout": {"kind": "broadcast", "dtype": dtype, "ways": 1}, "buffers": list(stored.buffers)}
        for dtype, stored in placed
    ]
    every = Stored("position", F32, 1, (), (), tuple(b for _, s in placed for b in s.buffers))
    storage.port(
        "past_length", "input", "int64", (), every, {"kind": "multi", "parts": parts}, programs=(phase,)
    )
    return index, value


def build(
    decoder: Decoder, phase: str, storage: Storage, weights: Weights, caches: list[Cache], lag: int
) -> Program:
    """The chains of one phase."""
    builder = Builder(decoder, phase, storage, weights, caches, lag)
    tokens = _input(storage, phase, decoder)
    x = builder.residual("x", 0)
    builder.embed(x, tokens)
    if phase == "decode":
        index_in, value_in = _position(storage, phase)
        tables, index = position.positional(builder, index_in)
        builder.mask = position.masks(builder, value_in)
        positions = [0] * builder.rows
    else:
        tables, index = position.rotary_tables(builder), {}
        positions = [r % decoder.tokens for r in range(builder.rows)]
    builder.chains = builder.program.body
    middle = builder.residual("middle", 1)
    attended = attention.attention(builder, x, tables, index, positions)
    attention.output(builder, attended, x, middle)
    mlp.mlp(builder, middle, x)
    builder.program.carried = [s for part in x for s in (part.wide, *part.half.values())]
    builder.chains = builder.program.after
    logits = builder.head(x)
    parts = [
        {"layout": {"kind": "rows", "dtype": "f32", "ways": 1}, "buffers": list(stored.buffers)}
        for stored in logits
    ]
    shape = (decoder.batch, decoder.tokens, decoder.vocabulary)
    every = Stored("logits", F32, builder.rows, (), (), tuple(b for s in logits for b in s.buffers))
    layout = {"kind": "columns", "parts": parts, "width": head_width(decoder.vocabulary), "row_axes": 2}
    storage.port("logits", "output", "float32", shape, every, layout, programs=(phase,))
    return builder.program


def lower(
    decoders: Mapping[Phase, Decoder], machine: Machine, declared: Mapping[str, WeightSymbol]
) -> Lowered:
    """Schedule every phase of a decoder. Raises LoweringError or CapacityError."""
    latencies = Latencies.of(machine)
    first = next(iter(decoders.values()))
    _check(first)
    storage = Storage()
    weights = Weights(first, storage, declared)
    caches = _caches(first, storage, weights)
    timed: dict[Phase, Timed] = {}
    for phase, decoder in decoders.items():
        program = build(decoder, phase, storage, weights, caches, latencies.alu)
        timed[phase] = schedule(program, latencies, decoder.layers, machine.whole("chip.tiles"))
    tokens = {phase: decoder.tokens for phase, decoder in decoders.items()}
    return Lowered(storage, timed, _bindings(weights, caches), weights.constants, weights.symbols, tokens)


def _bindings(weights: Weights, caches: list[Cache]) -> dict[int, tuple[int, ...]]:
    bound: dict[int, tuple[int, ...]] = {}
    for per_layer in weights.stored.values():
        if len(per_layer) > 1:
            for plane, buffer in enumerate(per_layer[0].buffers):
                bound[buffer] = tuple(s.buffers[plane] for s in per_layer)
    for side in SIDES:
        for kind in ("keys", "values"):
            stored = [getattr(c, kind)[side] for c in caches]
            for plane, buffer in enumerate(stored[0].buffers):
                bound[buffer] = tuple(s.buffers[plane] for s in stored)
    return bound


def _check(d: Decoder) -> None:
    """What this version of the lowering does not map, named."""
    heads = HeadLayout(d.attention.heads, d.attention.head_dim)
    if heads.lanes > LANES:
        raise LoweringError(
            f"lpu: attention heads take {heads.lanes} lanes ({d.attention.heads} heads of {heads.stride}), "
            f"one chip's lowering maps at most {LANES}"
        )
    if d.width > LANES:
        raise LoweringError(
            f"lpu: model width {d.width} exceeds {LANES}, the lanes of one vector: not mapped yet"
        )
    if d.batch > 1 and d.context % 2:
        raise LoweringError("lpu: an odd context needs batch 1")
