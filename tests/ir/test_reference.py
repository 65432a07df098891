"""Reference semantics against independent formulas (plain loops, published values)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper.errors import ModelError, WeightsMissingError
from mapper.ir.builder import GraphBuilder
from mapper.ir.reference import evaluate
from mapper.ir.types import TensorType, type_of
from mapper.ir.weights import WeightSymbol

Array = npt.NDArray[Any]
RNG = np.random.default_rng(11)


def call(name: str, operands: list[Array | None], attrs: dict[str, Any], **weights: Array) -> list[Array]:
    b = GraphBuilder("one")
    for symbol, data in weights.items():
        b.weight(WeightSymbol.of(symbol, data))
    given = [None if a is None else b.input(f"x{i}", type_of(a)) for i, a in enumerate(operands)]
    made = b.add_op(name, given, attrs)
    graph = b.finish({f"y{i}": r for i, r in enumerate(made.results)})
    inputs = {f"x{i}": a for i, a in enumerate(operands) if a is not None}
    return list(evaluate(graph, inputs).values())


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape)


def attention_by_loops(
    q: Array, k: Array, v: Array, allowed: Array, scale: float, cap: float, sinks: Array
) -> Array:
    """Attention written as the definition says, one query at a time."""
    batch, heads, tokens, _ = q.shape
    out = np.zeros((batch, heads, tokens, v.shape[3]))
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // k.shape[1])
            for s in range(tokens):
                scores = [cap * math.tanh(scale * float(q[b, h, s] @ row) / cap) for row in k[b, group]]
                weights = [math.exp(x) if allowed[s, t] else 0.0 for t, x in enumerate(scores)]
                total = sum(weights) + math.exp(sinks[h])
                for t, weight in enumerate(weights):
                    out[b, h, s] += weight / total * v[b, group, t]
    return out


@pytest.mark.parametrize("window", [0, 2])
def test_attention_is_its_definition(window: int) -> None:
    q, k, v, sinks = f(2, 4, 3, 6), f(2, 2, 5, 6), f(2, 2, 5, 7), f(4)
    t, s = np.arange(5), np.arange(3)[:, None] + 2
    allowed = (t <= s) & ((t > s - window) if window else True)
    expected = attention_by_loops(q, k, v, allowed, 0.4, 3.0, sinks)
    attrs = {"scale": 0.4, "causal": True, "window": window, "softcap": 3.0}
    (by_rule,) = call("attention", [q, k, v, None, sinks], attrs)
    (by_mask,) = call("attention", [q, k, v, allowed[None, None], sinks], attrs)
    cache = [np.concatenate([x, np.full_like(x, np.nan)], axis=2) for x in (k, v)]
    serving = {"scale": 0.4, "window": window, "softcap": 3.0}
    (cached,) = call("cached_attention", [q, *cache, np.array(2), sinks], serving)
    for found in (by_rule, by_mask, cached):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("window", "chunk"), [(0, 3), (2, 4), (0, 16)])
def test_attention_in_runs_of_positions(window: int, chunk: int) -> None:
    q, k, v, sinks = f(2, 4, 3, 8), f(2, 2, 7, 8), f(2, 2, 7, 6), f(4)
    position, t = np.arange(4, 7)[:, None], np.arange(7)
    allowed = (t <= position) & ((t > position - window) | (window == 0))
    allowed &= t >= position - position % chunk
    expected = attention_by_loops(q, k, v, allowed, 0.4, 3.0, sinks)
    attrs = {"scale": 0.4, "window": window, "chunk": chunk, "softcap": 3.0}
    (by_rule,) = call("attention", [q, k, v, None, sinks], {**attrs, "causal": True})
    cache = [np.concatenate([x, np.full_like(x, np.nan)], axis=2) for x in (k, v)]
    (cached,) = call("cached_attention", [q, *cache, np.array(4), sinks], attrs)
    np.testing.assert_allclose(by_rule, expected, rtol=1e-12)
    np.testing.assert_allclose(cached, expected, rtol=1e-12)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_rows_are_scaled_by_their_position(axis: int) -> None:
    shape = [2, 5, 5, 5]
    shape[axis] = 3
    x, table = f(*shape), f(9)
    (found,) = call("scale_at", [x, np.array(4)], {"table": "t", "axis": axis}, t=table)
    for s in range(3):
        rows, old = np.take(found, s, axis), np.take(x, s, axis)
        np.testing.assert_allclose(rows, old * table[4 + s], rtol=1e-12)


def test_latent_attention_over_a_cache_sees_what_is_filled() -> None:
    q, latent, key, weight = f(2, 2, 3, 6), f(2, 1, 5, 7), f(2, 1, 5, 2), f(7, 2 * (4 + 3))
    attrs = {"weight": "t", "nope_dim": 4, "scale": 0.4}
    (expected,) = call("latent_attention", [q, latent, key], {**attrs, "causal": True}, t=weight)
    cache = [np.concatenate([x, np.full_like(x, np.nan)], axis=2) for x in (latent, key)]
    (found,) = call("cached_latent_attention", [q, *cache, np.array(2)], attrs, t=weight)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_alibi_slopes_are_the_additive_mask() -> None:
    q, k, v = f(1, 2, 3, 4), f(1, 2, 3, 4), f(1, 2, 3, 4)
    slopes = (0.5, 0.25)
    t, s = np.arange(3), np.arange(3)[:, None]
    mask = np.array(slopes)[:, None, None] * t + np.where(t <= s, 0, -np.inf)
    (by_mask,) = call("attention", [q, k, v, mask[None]], {"scale": 0.5})
    (by_rule,) = call("attention", [q, k, v], {"scale": 0.5, "causal": True, "slopes": slopes})
    np.testing.assert_allclose(by_rule, by_mask, rtol=1e-12)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("twice", [False, True])
def test_rope_turns_pairs_by_the_angle(style: str, twice: bool) -> None:
    x = f(1, 2, 3, 8)
    angle = np.arange(3)[:, None] * np.array([1.0, 0.1, 0.01])
    order = np.concatenate([angle, angle], 1) if style == "half" else np.repeat(angle, 2, 1)
    given = order if twice else angle
    attrs = {"rotary_dim": 6, "style": style}
    (found,) = call("rope", [x, np.cos(given), np.sin(given)], attrs)
    pairs = [(0, 3), (1, 4), (2, 5)] if style == "half" else [(0, 1), (2, 3), (4, 5)]
    for p, (i, j) in enumerate(pairs):
        turned = (x[..., i] + 1j * x[..., j]) * np.exp(1j * angle[:, p])
        np.testing.assert_allclose(found[..., i], turned.real, atol=1e-12)
        np.testing.assert_allclose(found[..., j], turned.imag, atol=1e-12)
    np.testing.assert_array_equal(found[..., 6:], x[..., 6:])
    (later,) = call(
        "rope_at",
        [x[:, :, 1:], np.array(1)],
        {**attrs, "table": "t"},
        t=np.stack([np.cos(angle), np.sin(angle)]),
    )
    np.testing.assert_allclose(later, found[:, :, 1:], atol=1e-12)


def test_norms_are_the_published_formulas() -> None:
    x, g, c = f(3, 5), f(5), f(5)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (g + 1)
    (found,) = call("norm", [x], {"kind": "rms", "eps": 1e-3, "weight": "g", "weight_offset": 1.0}, g=g)
    np.testing.assert_allclose(found, rms, rtol=1e-12)
    layer = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * g + c
    (found,) = call("norm", [x], {"kind": "layer", "eps": 1e-3, "weight": "g", "bias": "c"}, g=g, c=c)
    np.testing.assert_allclose(found, layer, rtol=1e-12)


def test_activations_at_known_points() -> None:
    x = np.array([-2.0, 0.0, 1.0])
    phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    expected = {
        "gelu": x * phi,
        "gelu_tanh": [-0.045402305912, 0.0, 0.841191990607],
        "gelu_quick": x / (1 + np.exp(-1.702 * x)),
        "silu": x / (1 + np.exp(-x)),
        "relu": [0, 0, 1],
        "relu_squared": [0, 0, 1],
    }
    for kind, values in expected.items():
        (found,) = call("activation", [x], {"kind": kind})
        np.testing.assert_allclose(found, values, atol=1e-9)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "topk_softmax"])
def test_moe_is_a_weighted_sum_of_chosen_experts(scoring: str) -> None:
    x, router, gate, up, down = f(4, 5), f(5, 3), f(3, 5, 6), f(3, 5, 6), f(3, 6, 5)
    index, weight = call("route", [x @ router], {"top_k": 2, "scoring": scoring, "normalise": True})
    names = {"act": "silu", "gate": "g", "up": "u", "down": "d"}
    (found,) = call("moe", [x, index, weight], names, g=gate, u=up, d=down)
    for row, y in zip(x, found, strict=True):
        logits = row @ router
        best = sorted(range(3), key=lambda e: -logits[e])[:2]
        raw = 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits)
        share = {e: raw[e] / sum(raw[i] for i in best) for e in best}
        hidden = {e: (row @ gate[e]) / (1 + np.exp(-(row @ gate[e]))) * (row @ up[e]) for e in best}
        np.testing.assert_allclose(y, sum(share[e] * (hidden[e] @ down[e]) for e in best), rtol=1e-10)


def test_rounding_in_blocks_by_hand() -> None:
    (found,) = call("round_blocks", [np.array([[127.0, -1.4, 1.6, 0.5, 0.5]])], {"block": 3})
    np.testing.assert_allclose(found, [[127.0, -1.0, 2.0, 0.5, 0.5]], rtol=1e-12)


def test_groups_limit_the_choice_by_their_best_two() -> None:
    logits = np.array([[3.0, 0.0, 2.0, 1.9, 1.0, 0.9]])
    attrs = {"top_k": 3, "scoring": "none", "groups": 3, "top_groups": 2, "group_fill": -np.inf}
    index, share = call(
        "route", [logits], {**attrs, "group_score": "top2", "epsilon": 1.0, "normalise": True}
    )
    assert index.tolist() == [[0, 2, 3]]  # best twos: 3.0, 3.9, 1.9
    np.testing.assert_allclose(share, np.array([[3.0, 2.0, 1.9]]) / 7.9, rtol=1e-12)
    index, share = call(
        "route", [logits], {**attrs, "correction": "c", "scale": 2.0}, c=np.array([-9.0] * 4 + [0, 0])
    )
    assert index.tolist() == [[4, 5, 0]]  # bests: -6, -7, 1.0
    np.testing.assert_allclose(share, [[2.0, 1.8, 6.0]], rtol=1e-12)


@pytest.mark.parametrize("packing", ["halves", "interleaved"])
@pytest.mark.parametrize("share_input", [False, True])
def test_packed_experts_with_biases_and_limit(packing: str, share_input: bool) -> None:
    x, up, bias, down, end = f(2, 5), 3 * f(3, 5, 8), f(3, 8), f(3, 5, 4), f(3, 5)
    index, share = np.array([[2, 0], [1, 2]]), f(2, 2)
    names = {"up": "u", "up_bias": "b", "down": "d", "down_transposed": True, "down_bias": "e"}
    options = {"act": "gelu_quick", "packing": packing, "limit": 2.0, "up_offset": 1.0}
    attrs = {**names, **options, "share_input": share_input}
    (found,) = call("moe", [x, index, share], attrs, u=up, b=bias, d=down, e=end)
    for t in range(2):
        total = np.zeros(5)
        for e, w in zip(index[t], share[t], strict=True):
            both = (x[t] * w if share_input else x[t]) @ up[e] + bias[e]
            g, u = (both[:4], both[4:]) if packing == "halves" else (both[0::2], both[1::2])
            g, u = np.minimum(g, 2.0), np.clip(u, -2.0, 2.0) + 1.0
            y = down[e] @ (g / (1 + np.exp(-1.702 * g)) * u) + end[e]
            total += y if share_input else w * y
        np.testing.assert_allclose(found[t], total, rtol=1e-10)


def test_integer_division_truncates_and_mod_follows_its_flag() -> None:
    a, b = np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2])
    assert call("div", [a, b], {})[0].tolist() == [3, -3, -3, 3]
    assert call("mod", [a, b], {})[0].tolist() == [1, 1, -1, -1]
    assert call("mod", [a, b], {"fmod": True})[0].tolist() == [1, -1, 1, -1]


def test_conv_is_a_sum_of_shifted_products() -> None:
    x, w = f(1, 2, 6), f(3, 2, 2)
    (found,) = call("conv", [x, w], {"strides": (2,), "pads": (1, 0), "dilations": (2,)})
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0)))
    expected = [[(padded[0, :, 2 * i : 2 * i + 3 : 2] * w[o]).sum() for i in range(3)] for o in range(3)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)


def test_precision_computes_in_float64() -> None:
    b = GraphBuilder("p")
    x = b.input("x", TensorType.of([2, 3], "f32"))
    b.weight(WeightSymbol.of("w", f(3, 4).astype(np.float32)))
    graph = b.finish({"y": b.add("linear", [x], {"weight": "w"})})
    data = f(2, 3).astype(np.float32)
    assert evaluate(graph, {"x": data})["y"].dtype == np.float32
    wide = evaluate(graph, {"x": data}, precision="f64")["y"]
    np.testing.assert_array_equal(
        wide, data.astype(np.float64) @ graph.weights["w"].load().astype(np.float64)
    )


def test_inputs_that_do_not_fit_are_model_errors() -> None:
    b = GraphBuilder("p")
    x = b.input("x", TensorType.of(["n", 3], "f32"))
    y = b.input("y", TensorType.of(["n"], "f32"))
    b.weight(WeightSymbol("w", (3, 4), "f32", file="nowhere.bin", bytes=48))
    graph = b.finish({"a": b.add("linear", [x], {"weight": "w"}), "b": b.add("neg", [y])})
    data = np.zeros((2, 3), np.float32)
    with pytest.raises(WeightsMissingError, match="'w'"):
        evaluate(graph, {"x": data, "y": np.zeros(2, np.float32)})
    with pytest.raises(ModelError, match="n is 5 here and 2"):
        evaluate(graph, {"x": data, "y": np.zeros(5, np.float32)})
    with pytest.raises(ModelError, match="rank 2"):
        evaluate(graph, {"x": data[0]})
    with pytest.raises(ModelError, match="was not given"):
        evaluate(graph, {"y": np.zeros(2, np.float32)})
    assert evaluate(graph, {"y": np.ones(2, np.float32)}, ["b"])["b"].tolist() == [-1, -1]
