"""What an attention mask means when no token is padding, found by evaluating it at probe lengths.

Causal or not, how far back a query sees (sliding window), and the slopes of a linear bias (ALiBi) are read
off the numbers; no spelling of the mask is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mapper.errors import MapperError
from mapper.frontend.agree import MAX_ELEMENTS, Probe, stored_array, volume
from mapper.frontend.net import Array, Net, Node, Value
from mapper.frontend.rewrite import Match, rebuild, topological
from mapper.frontend.steering import Steering, fed, from_rows, hypotheses, unknown
from mapper.frontend.steering import sizes as buffer_sizes

HIDDEN = -1e4  # scores below this take no part in a softmax
NOTHING = Steering()
_LONGEST = 1 << 17
_WHOLE = 1 << 10  # longest sequence whose whole mask is evaluated
_SIZES = 16  # sizes of runs that are tried
_SMALL = ((5, 0), (4, 3), (1, 6))  # (new tokens, past) of the first probes


@dataclass(frozen=True)
class MaskKind:
    """The meaning of a mask: see the IR's `attention`."""

    causal: bool = False
    window: int = 0
    slopes: tuple[float, ...] = ()
    chunk: int = 0


def classify(net: Net, folder: Path) -> Net:
    """The net with `causal`, `window` and `slopes` on every attention whose mask could be evaluated."""
    known: dict[int, MaskKind | None] = {}
    matches = []
    nodes = topological(net)
    steering = from_rows(nodes)
    for node in nodes:
        if node.op not in ("attention", "latent_attention") or "mask" not in node.attrs["slots"]:
            continue
        mask = node.inputs[node.attrs["slots"].index("mask")]
        if hides_nothing(mask):
            matches.append(_unmasked(node))
            continue
        if id(mask) not in known:
            known[id(mask)], steering = steered_kind(mask, folder, steering)
        matches += _with_kind(node, known[id(mask)])
    net.caches.steering.update(steering.meanings)
    return rebuild(net, matches)


def steered_kind(mask: Value, folder: Path, steering: Steering) -> tuple[MaskKind | None, Steering]:
    """The meaning of a mask and of the inputs that it reads: that with which it is causal, if any."""
    leaves = Probe.of([mask], []).leaves
    if not steering.fixed and not unknown(leaves, steering.meanings):
        return kind_of(mask, folder, steering), steering
    for guess in hypotheses(leaves, steering.meanings):
        tried = replace(steering, meanings=guess)
        kind = kind_of(mask, folder, tried)
        if kind is not None and kind.causal:
            return kind, tried
    return (None if steering.fixed else kind_of(mask, folder, steering)), steering


def hides_nothing(mask: Value) -> bool:
    """Whether a mask depends on no input by more than its shape, and lets everything through as it is."""
    probe = Probe.of([mask], [])
    if any(v.source or v.weight is not None for v in probe.leaves):
        return False
    for new, past in _SMALL:
        try:
            (values,) = probe.evaluate({"batch": 1, "sequence": new, "past": past}, {})
        except MapperError:
            return False
        if not bool(values.all() if values.dtype == bool else (values == 0).all()):
            return False
    return True


def _unmasked(node: Node) -> Match:
    """Attention without its mask, which lets everything through."""
    slots = dict(zip(node.attrs["slots"], node.inputs, strict=True))
    del slots["mask"]
    attrs = {k: v for k, v in node.attrs.items() if k != "slots"}
    return Match(node.outputs[0], node.op, tuple(slots), tuple(slots.values()), attrs)


def _with_kind(node: Node, kind: MaskKind | None) -> list[Match]:
    plain = kind is None or not (kind.slopes or kind.chunk) or node.op == "attention"
    if kind is None or kind == MaskKind() or not plain:
        return []
    attrs = {k: v for k, v in node.attrs.items() if k != "slots"}
    attrs |= {"causal": kind.causal, "window": kind.window}
    if kind.slopes:
        attrs["slopes"] = kind.slopes
    if kind.chunk:
        attrs["chunk"] = kind.chunk
    return [Match(node.outputs[0], node.op, node.attrs["slots"], node.inputs, attrs)]


def kind_of(mask: Value, folder: Path, steering: Steering = NOTHING) -> MaskKind | None:
    """The meaning of a mask, None where it cannot be evaluated or is none of those known. `steering`: what
    its inputs say."""
    probe = Probe.of([mask], [])
    stored = None if any(v.source and v.rank >= 3 for v in probe.leaves) else _stored(probe, folder)
    if stored is None:
        return None
    cached = steering.fixed or any("past" in d.symbols for v in [mask, *probe.leaves] for d in v.dims)
    kinds = []
    for new, past in _SMALL:
        past = past if cached else 0
        values = evaluate(probe, stored, new, past, steering)
        kinds.append(None if values is None else read(values, past))
    if kinds[0] is None or any(k != kinds[0] for k in kinds[: 3 if cached else 2]):
        return _short_window(probe, stored, cached, steering)
    return _window(probe, stored, kinds[0], cached, steering)


def _stored(probe: Probe, folder: Path) -> dict[int, Array] | None:
    """The stored tables that the mask reads; None where one is absent or large."""
    found: dict[int, Array] = {}
    for leaf in probe.leaves:
        if leaf.weight is not None:
            array = stored_array(leaf, folder)
            if array is None:
                return None
            found[id(leaf)] = array
    return found


def evaluate(
    probe: Probe, stored: Mapping[int, Array], new: int, past: int, steering: Steering = NOTHING
) -> Array | None:
    """The mask as scores [H, S, T] for one sequence of `new` tokens after `past`, no padding. Over a cache of
    fixed length, T is cut behind the tokens that are there."""
    sizes = {"batch": 1, "sequence": new, "past": past}
    arrays = dict(stored)
    if steering.fixed:
        return _over_buffer(probe, arrays, new, past, steering)
    for leaf in probe.leaves:
        if leaf.source in steering.meanings:
            arrays[id(leaf)] = fed(leaf, new, past, steering.meanings)
        elif leaf.source:
            shape = tuple(d.evaluate(sizes) if d.symbols <= set(sizes) else new for d in leaf.dims)
            if volume(shape) > MAX_ELEMENTS:
                return None
            positions = shape[-1:] == (new,) and past + new != new
            row = np.arange(past, past + new) if positions else np.ones(shape[-1:] or (), np.int64)
            arrays[id(leaf)] = np.broadcast_to(row, shape).copy()
    try:
        (values,) = probe.evaluate(sizes, arrays)
    except MapperError:
        return None
    return _as_scores(values, new, past + new)


def _as_scores(values: Array, new: int, total: int) -> Array | None:
    if values.dtype == bool:
        values = np.where(values, 0.0, -np.inf)
    if values.ndim > 4 or (values.ndim == 4 and values.shape[0] != 1):
        return None
    values = values.reshape((1,) * (4 - values.ndim) + values.shape)[0]
    if values.shape[1] not in (1, new) or values.shape[2] not in (1, total):
        return None
    return np.broadcast_to(values, (values.shape[0], new, total))


def _over_buffer(
    probe: Probe, arrays: dict[int, Array], new: int, past: int, steering: Steering
) -> Array | None:
    """The mask over the rows of a cache that hold tokens; None where it lets any other row through."""
    try:
        arrays |= {id(v): fed(v, new, past, steering.meanings) for v in probe.leaves if v.source}
        (values,) = probe.evaluate(buffer_sizes(new, past), arrays)
    except (MapperError, ValueError):
        return None
    scores = _as_scores(values, new, values.shape[-1] if values.ndim else 1)
    if scores is None or scores.shape[2] < past + new or bool((scores[..., past + new :] > HIDDEN).any()):
        return None
    return scores[..., : past + new]


def read(values: Array, past: int) -> MaskKind | None:
    """The meaning of one evaluated mask, window left out; None where it fits none."""
    with np.errstate(all="ignore"):
        return _read(values, past)


def _read(values: Array, past: int) -> MaskKind | None:
    _, new, total = values.shape
    seen = values > HIDDEN
    position = past + np.arange(new)[:, None]
    token = np.arange(total)[None, :]
    causal = bool(np.array_equal(seen, np.broadcast_to(token <= position, seen.shape)))
    if not causal and not bool(seen.all()):
        return None
    kept = np.where(seen, values, 0.0)
    if not np.any(kept):
        return MaskKind((causal and total > 1) or (causal and new == 1))
    return _slopes(values, seen, token - position, causal)


def _slopes(values: Array, seen: Array, distance: Array, causal: bool) -> MaskKind | None:
    """A bias that is linear in the distance, up to a constant per row, which a softmax does not see."""
    heads, new, _ = values.shape
    found = []
    for head in range(heads):
        row, reach = values[head, -1], seen[head, -1]
        index = np.flatnonzero(reach)
        if len(index) < 2:
            return None
        slope = float((row[index[-1]] - row[index[0]]) / (index[-1] - index[0]))
        for s in range(new):
            tokens = np.flatnonzero(seen[head, s])
            line = values[head, s, tokens] - slope * distance[s, tokens]
            if not np.allclose(line, line[0], atol=1e-5):
                return None
        found.append(float(np.float32(slope)))
    return MaskKind(causal, 0, tuple(found))


def _lengths(probe: Probe) -> list[int]:
    """Lengths at which a sliding window would show, longest first."""
    numbers = {
        abs(int(v.scalar))
        for n in probe.nodes
        for v in n.inputs
        if v.scalar is not None and abs(v.scalar) < _LONGEST
    }
    numbers |= {
        v.dims[-1].value - 2 for v in probe.leaves if v.weight is not None and v.dims and v.dims[-1].is_const
    }
    top = max(numbers | {16})
    return sorted(
        {min(2 * top + 5, _LONGEST), *(n + 3 for n in numbers if n > 8), *(n for n in numbers if n > 8)}
    )[::-1]


def _window(
    probe: Probe,
    stored: Mapping[int, Array],
    kind: MaskKind | None,
    cached: bool,
    steering: Steering,
) -> MaskKind | None:
    """`kind` with the window, or the chunk, that long sequences show."""
    if kind is None or not kind.causal or kind.slopes:
        return kind
    look = _Look(probe, stored, cached, steering)
    for length in _lengths(probe):
        reach = look.reach(length)
        if reach is None:
            continue
        if reach == length:
            return kind
        other = length - 3 if length - 3 > reach else length + 3
        if look.reach(other) == reach:
            return MaskKind(True, reach)
        return look.chunked(length, reach)
    return kind


@dataclass(frozen=True)
class _Look:
    """How far back the last token of a sequence sees."""

    probe: Probe
    stored: Mapping[int, Array]
    cached: bool
    steering: Steering

    def reach(self, length: int) -> int | None:
        """Tokens that the last of `length` sees, None where they are not the last ones or cannot be told."""
        if not self.cached and length > _WHOLE:
            return None
        new, past = (1, length - 1) if self.cached else (length, 0)
        values = evaluate(self.probe, self.stored, new, past, self.steering)
        if values is None:
            return None
        seen = values[0, -1] > HIDDEN
        reach = int(seen.sum())
        return reach if bool(seen[length - reach :].all()) else None

    def chunked(self, length: int, reach: int) -> MaskKind | None:
        """Attention inside runs of one size, where that explains what the last tokens see."""
        start = length - reach  # of the last run: a multiple of its size
        sizes = [n for n in range(start, 1, -1) if start % n == 0 and reach <= n][:_SIZES]
        for size in sizes:
            lengths = (length, length + 1, size, size + 1, 2 * size, 2 * size + 1)
            if all(self.reach(n) == (n - 1) % size + 1 for n in lengths if n > 1):
                return MaskKind(True, chunk=size)
        return None


def _short_window(
    probe: Probe, stored: Mapping[int, Array], cached: bool, steering: Steering
) -> MaskKind | None:
    """A causal window so short that the first probes already show it."""
    values = evaluate(probe, stored, *((1, 40) if cached else (41, 0)), steering)
    if values is None:
        return None
    reach = int((values[0, -1] > HIDDEN).sum())
    kinds = [MaskKind(True, reach), *(MaskKind(True, chunk=n) for n in range(2, 17) if 40 % n + 1 == reach)]
    shapes = ((6, 0), (4, 30), (1, 13)) if cached else ((6, 0), (30, 0), (13, 0))
    made = [evaluate(probe, stored, new, past, steering) for new, past in shapes]
    for kind in kinds:
        if all(m is not None and _is_kind(m, kind, past) for m, (_, past) in zip(made, shapes, strict=True)):
            return kind
    return None


def _is_kind(mask: Array, kind: MaskKind, past: int) -> bool:
    """Whether an evaluated mask [H, S, T] is a causal window, or causal runs, and nothing besides."""
    position, token = past + np.arange(mask.shape[1])[:, None], np.arange(mask.shape[2])[None, :]
    wanted = token <= position
    if kind.chunk:
        wanted = wanted & (token // kind.chunk == position // kind.chunk)
    else:
        wanted = wanted & (token > position - kind.window)
    seen = mask > HIDDEN
    return bool((seen == wanted).all()) and not np.any(np.where(seen, mask, 0.0))
