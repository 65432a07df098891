"""Work figures against formulas counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mapper.ir.builder import GraphBuilder
from mapper.ir.cost import attended_pairs, cost, costs, total
from mapper.ir.dims import Dim
from mapper.ir.types import TensorType
from mapper.ir.weights import WeightSymbol
from mapper.passes.pipeline import run
from mapper.passes.repeat import Repeat
from mapper.passes.serve import serve
from tests.ir.models import Sizes, llama


def test_linear_is_two_flops_per_weight_and_row() -> None:
    b = GraphBuilder("c")
    x = b.input("x", TensorType.of(["batch", "sequence", 6], "f32"))
    b.weight(WeightSymbol.of("w", np.zeros((5, 6), np.float16)))
    b.weight(WeightSymbol.of("b", np.zeros(5, np.float16)))
    made = b.add_op("linear", [x], {"weight": "w", "bias": "b", "transposed": True})
    found = cost(made, lambda s: b.scope.weights[s])
    rows = Dim.of("batch*sequence")
    assert found.flops == rows * (2 * 30 + 5)
    assert found.weights == Dim.of(2 * 30 + 2 * 5)
    assert (found.read, found.written) == (rows * 24, rows * 20)


@pytest.mark.parametrize(
    ("tokens", "keys", "window", "chunk"),
    [
        (1, 9, 0, 0), (4, 9, 0, 0), (4, 9, 3, 0), (4, 4, 2, 0), (5, 5, 0, 0),
        (1, 9, 0, 4), (1, 8, 0, 4), (4, 9, 0, 3), (7, 7, 2, 3), (4, 9, 0, 20),
    ],
)  # fmt: skip
def test_attended_pairs_are_counted_exactly(tokens: int, keys: int, window: int, chunk: int) -> None:
    b = GraphBuilder("c")
    q = b.input("q", TensorType.of([1, 2, tokens, 8], "f32"))
    k = b.input("k", TensorType.of([1, 2, keys, 8], "f32"))
    made = b.add_op("attention", [q, k, k], {"scale": 1.0, "causal": True, "window": window, "chunk": chunk})
    t, s = np.arange(keys), np.arange(tokens)[:, None] + keys - tokens
    allowed = (t <= s) & ((t > s - window) if window else True)
    allowed &= (t // chunk == s // chunk) if chunk else True
    assert attended_pairs(made).value == int(allowed.sum())


def test_symbolic_pairs_agree_with_static_ones() -> None:
    b = GraphBuilder("c")
    q = b.input("q", TensorType.of([1, 2, "s", 8], "f32"))
    k = b.input("k", TensorType.of([1, 2, "p + s", 8], "f32"))
    made = b.add_op("attention", [q, k, k], {"scale": 1.0, "causal": True})
    for s, p in ((1, 0), (1, 7), (5, 3)):
        assert attended_pairs(made).evaluate({"s": s, "p": p}) == sum(p + i + 1 for i in range(s))


def test_a_repeat_costs_what_its_layers_cost() -> None:
    graph = run(llama(Sizes(layers=3)), "fold,cse,dce")
    grouped = Repeat().apply(graph)
    assert total(grouped) == total(graph)
    assert sum(count for op, count, _ in costs(grouped) if op.mnemonic == "attention") == 3


def test_decode_reads_each_matrix_once() -> None:
    sizes = Sizes(layers=3)
    graph = llama(sizes)
    step = total(serve(graph, "decode", 1, 4, 32))
    d, w, g = sizes.width, sizes.heads * sizes.head, sizes.groups * sizes.head
    layer = d * w + 2 * d * g + w * d + 3 * d * sizes.inner + 2 * d
    rope = (sizes.heads and 2) * sizes.head * 4  # one row of cosines and sines for q, and one for k
    matrices = sizes.layers * layer + d * sizes.vocab + d
    assert step.weights.value == 4 * matrices + 4 * d + sizes.layers * rope
    batched = total(serve(graph, "decode", 8, 4, 32))
    assert batched.weights.value == step.weights.value + 7 * 4 * d


def test_a_window_limits_what_attention_reads() -> None:
    whole = total(serve(llama(Sizes(layers=1)), "decode", 1, 4, 32))
    windowed = total(serve(llama(Sizes(layers=1, window=5)), "decode", 1, 4, 32))
    row = 2 * 2 * 12 * 4
    assert whole.read.value - windowed.read.value == (32 - 5) * row
    chunked = total(serve(llama(Sizes(layers=1, chunk=12)), "decode", 1, 4, 32))
    assert whole.read.value - chunked.read.value == 24 * row  # the last run began at position 24


def test_a_factor_by_position_costs_a_product_per_element_and_a_row_of_its_table() -> None:
    plain, scaled = (
        total(serve(llama(Sizes(layers=1, tuned=t)), "prefill", 1, 4, 32)) for t in ("", "queries")
    )
    assert scaled.flops.value - plain.flops.value == 4 * 4 * 12
    assert scaled.weights.value - plain.weights.value == 4 * 4
