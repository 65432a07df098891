"""The serving form computes what the original graph computes: prefill, then decode steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from xdsl.ir import SSAValue

from mapper.errors import UnsupportedModelError, UsageError
from mapper.frontend.load import load
from mapper.ir.builder import GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.reference import evaluate
from mapper.ir.types import TensorType
from mapper.passes.pipeline import run
from mapper.passes.rewrite import builder_like
from mapper.passes.serve import serve
from mapper.passes.shorten import shorten
from mapper.passes.unroll import Unroll
from tests.frontend.test_abridge import mixed
from tests.frontend.tiny import Options, saved
from tests.ir.models import Sizes, gpt2, llama, run_inputs

Array = npt.NDArray[Any]
CONTEXT, PROMPT, BATCH = 9, 5, 2
MODELS: dict[str, Callable[[], Graph]] = {
    "llama": llama,
    "llama-interleaved": lambda: llama(Sizes(interleaved=True)),
    "llama-window": lambda: llama(Sizes(window=3)),
    "llama-bool-mask": lambda: llama(Sizes(float_mask=False, window=2)),
    "llama-chunk": lambda: llama(Sizes(chunk=3)),
    "llama-chunk-window": lambda: llama(Sizes(chunk=4, window=3, float_mask=False)),
    "llama-queries-by-position": lambda: llama(Sizes(tuned="queries")),
    "llama-heads-by-position": lambda: llama(Sizes(tuned="before", layers=4)),
    "llama-rows-by-position": lambda: llama(Sizes(tuned="rows")),
    "llama-one-layer": lambda: llama(Sizes(layers=1)),
    "gpt2": gpt2,
}


def compare(graph: Graph, prefill: Graph, decode: Graph, precision: str | None, tolerance: float) -> None:
    """Runs both forms over a prompt and decode steps up to a full cache; the caches start poisoned."""
    ids = np.random.default_rng(1).integers(0, 61, (BATCH, CONTEXT))
    caches: dict[str, Array] = {}
    states = {n: np.full(t.ints, np.nan, t.numpy) for n, t in decode.inputs if n.startswith("cache.")}
    for past in [0, *range(PROMPT, CONTEXT)]:
        new = ids[:, past : past + (1 if past else PROMPT)]
        expected = evaluate(graph, run_inputs(graph, new, caches), precision=precision)
        caches = {n: v for n, v in expected.items() if n != "logits"}
        step = {"input_ids": new, "past_length": np.array(past), **states}
        found = evaluate(decode if past else prefill, step, precision=precision)
        states = {n: v for n, v in found.items() if n != "logits"}
        scale = float(np.abs(expected["logits"]).max())
        assert float(np.abs(found["logits"] - expected["logits"]).max()) <= tolerance * scale
        rows = past + new.shape[1]
        for name, cache in caches.items():
            _, layer, what = name.split(".")
            state = states[f"cache.{what}.{layer}"]
            np.testing.assert_allclose(state[:, :, :rows], cache, rtol=1e-4, atol=1e-5)
            assert np.isnan(state[:, :, rows:]).all()


@pytest.mark.parametrize("name", list(MODELS))
def test_prefill_and_decode_equal_the_original(name: str) -> None:
    graph = MODELS[name]()
    prefill, decode = (serve(graph, phase, BATCH, PROMPT, CONTEXT) for phase in ("prefill", "decode"))
    compare(graph, prefill, decode, None, 1e-5)
    compare(graph, prefill, decode, "f64", 1e-6)


def test_the_test_models_attend_unevenly() -> None:
    """Otherwise a wrong mask or rotation would go unseen."""
    graph = llama()
    whole = evaluate(graph, run_inputs(graph, np.arange(12)[None] * 5 % 61))["logits"]
    swapped = evaluate(graph, run_inputs(graph, np.array([[5, 0, *range(10, 60, 5)]])))["logits"]
    assert np.abs(whole[0, -1] - swapped[0, -1]).max() > 0.02 * np.abs(whole[0, -1]).max()


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_many_layers_are_served_through_two_of_them(build: Callable[[Sizes], Graph], phase: str) -> None:
    graph = run(build(Sizes(layers=5, groups=4)), "fold,cse,dce")
    grouped = run(graph, "repeat")
    short = shorten(grouped)
    assert short is not None and [s.count for s in short.sections()] == [1, 2, 1]
    assert shorten(graph) is None
    whole = serve(graph, phase, 2, 4, 11)
    assert [s.count for s in whole.sections()] == [1, 5, 1]
    assert serve(grouped, phase, 2, 4, 11).print() == whole.print()


def test_layers_that_differ_in_more_than_weights_are_not_shortened() -> None:
    grouped = run(llama(Sizes(layers=4)), "repeat")  # shape operands of each layer its own: iterated values
    assert shorten(grouped) is None
    assert serve(grouped, context=9).layers == 4


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_grouped_graph_serves_the_same(build: Callable[[], Graph]) -> None:
    graph = build()
    grouped = run(graph, "fold,cse,dce,repeat")
    assert (
        serve(grouped, context=CONTEXT).print() == serve(run(graph, "fold,cse,dce"), context=CONTEXT).print()
    )


def test_the_interface_of_the_serving_form() -> None:
    served = serve(llama(Sizes(layers=2)), "decode", 3, 4, 32)
    caches = [f"cache.{w}.{i}" for i in range(2) for w in ("key", "value")]
    assert [n for n, _ in served.inputs] == ["input_ids", "past_length", *caches]
    assert [n for n, _ in served.outputs] == ["logits", *caches]
    types = dict(served.inputs)
    assert types["input_ids"] == TensorType.of([3, 1], "i64")
    assert types["past_length"] == TensorType.of([], "i64")
    assert types["cache.key.0"] == TensorType.of([3, 2, 32, 12], "f32")
    assert dict(served.outputs)["logits"] == TensorType.of([3, 1, 61], "f32")
    assert (
        served.roles["inputs"]["cache.value.1"] == served.roles["outputs"]["cache.value.1"] == "state.value.1"
    )
    assert served.roles["kv_layout"] == "BHLD"
    prologue, body, epilogue = served.sections()
    assert [op.mnemonic for op in prologue.ops] == ["embed"]
    assert [op.mnemonic for op in epilogue.ops] == ["norm", "lm_head"]
    assert {s.names for s in body.inputs} == {(f"cache.{w}.0", f"cache.{w}.1") for w in ("key", "value")}
    assert {s.names for s in body.outputs} == {s.names for s in body.inputs}
    assert all(all(d.is_const for d in r.type.shape) for op in served.ops() for r in op.results
               if isinstance(r.type, TensorType))  # fmt: skip
    table = served.weights["rope.table.0"]
    assert table.derived and table.shape == (2, 32, 6)
    angle = np.arange(32)[:, None] / 100 ** (np.arange(0, 12, 2) / 12)
    np.testing.assert_allclose(table.load(), np.stack([np.cos(angle), np.sin(angle)]), atol=1e-5)
    assert serve(llama(Sizes(layers=2)), "prefill", 3, 4, 32).inputs[0][1] == TensorType.of([3, 4], "i64")


def test_the_original_graph_is_left_alone() -> None:
    graph = llama(Sizes(layers=2))
    before, uses = graph.print(), [len(list(r.uses)) for op in graph.ops() for r in op.results]
    serve(graph, "prefill", context=32)
    assert graph.print() == before
    assert [len(list(r.uses)) for op in graph.ops() for r in op.results] == uses


def edited(graph: Graph, mnemonic: str, edit: Callable[[DataflowOp], None]) -> Graph:
    new = graph.clone()
    for op in new.ops():
        if op.mnemonic == mnemonic:
            edit(op)
    return new


def test_wrong_recognition_is_refused_by_probing() -> None:
    causal = llama(Sizes(layers=1))
    wrong = edited(causal, "attention", lambda op: op.set_attr("window", 2))
    with pytest.raises(UnsupportedModelError, match=r"layers.0/attention.*window 2"):
        serve(wrong)
    wrong = edited(causal, "attention", lambda op: op.set_attr("causal", False))
    with pytest.raises(UnsupportedModelError, match="not causal"):
        serve(wrong)
    wrong = edited(causal, "attention", lambda op: op.set_attr("slopes", (0.5,) * 4))
    with pytest.raises(UnsupportedModelError, match="as recognised"):
        serve(wrong)
    wrong = edited(causal, "rope", lambda op: op.set_attr("style", "interleaved"))
    with pytest.raises(UnsupportedModelError, match="two angles of a pair differ"):
        serve(wrong)


@pytest.mark.parametrize(("tuned", "axis"), [("queries", -2), ("before", -3), ("rows", -2)])
def test_a_factor_by_position_is_a_table(tuned: str, axis: int) -> None:
    """By the formula of the test model; one table for all layers, and no position read elsewhere."""
    served = serve(llama(Sizes(tuned=tuned)), "prefill", 2, 4, 32)
    found = [op for op in served.ops() if op.mnemonic == "scale_at"]
    assert {op.attr("axis") for op in found} == {axis}
    (name,) = {op.attr("table") for op in found}
    factors = 1 + 0.5 * np.log(1 + (np.arange(32) + 1) // 3)
    expected = 1 / factors if tuned == "rows" else factors
    np.testing.assert_allclose(served.weights[name].load(), expected, rtol=1e-6)
    assert served.weights[name].derived


def test_what_a_short_context_does_not_show_is_left_out() -> None:
    """Factors of 1 up to position 1, and one run."""
    served = serve(llama(Sizes(tuned="queries", chunk=8)), "decode", 1, 2, 2)
    assert not any(op.mnemonic == "scale_at" for op in served.ops())
    for context, chunk in ((8, 0), (9, 8)):
        served = serve(llama(Sizes(chunk=8)), "decode", 1, 4, context)
        assert {op.attr("chunk") for op in served.ops() if op.mnemonic == "cached_attention"} == {chunk}


def test_a_factor_of_more_than_the_position_is_refused() -> None:
    """position / total length, and a chunk that the mask does not have."""
    graph = llama(Sizes(layers=1))
    b = builder_like(graph)
    given = {n: b.input(n, kind, graph.roles["inputs"][n]) for n, kind in graph.inputs}
    values = {graph.input_values[n]: v for n, v in given.items()}
    total = b.add("shape_of", [given["attention_mask"]], {"start": 1, "end": 2})
    position = b.add("cast", [given["position_ids"]], {"dtype": "f32"})
    share = b.add("div", [position, b.add("cast", [total], {"dtype": "f32"})])
    for op in graph.top():
        made: list[SSAValue] = [*b.copy(op, values).results]
        if op.mnemonic == "embed":
            made = [b.add("mul", [made[0], b.add("unsqueeze", [share], {"axes": [2]})], node="/share")]
        values.update(zip(op.results, made, strict=True))
    odd = b.finish({n: values[v] for n, v in graph.output_values.items()}, graph.roles["outputs"])
    with pytest.raises(UnsupportedModelError, match=r"mul \(/share\): its factors depend on more than"):
        serve(odd)
    for before, after in ((0, 3), (3, 0), (3, 4)):
        wrong = llama(Sizes(layers=1, chunk=before))
        for op in (op for op in wrong.ops() if op.mnemonic == "attention"):
            op.set_attr("chunk", after)
        with pytest.raises(UnsupportedModelError, match="as recognised"):
            serve(wrong)


def test_what_is_no_decoder_with_a_cache_is_refused() -> None:
    b = GraphBuilder("none")
    x = b.input("x", TensorType.of(["batch", 4], "f32"))
    graph = b.finish({"y": b.add("neg", [x])})
    with pytest.raises(UnsupportedModelError, match="0 inputs of token ids"):
        serve(graph)
    ids = GraphBuilder("no cache")
    tokens = ids.input("ids", TensorType.of(["batch", "sequence"], "i64"), "token_ids")
    made = ids.add("one_hot", [tokens], {"depth": 4, "dtype": "f32"})
    with pytest.raises(UnsupportedModelError, match="no key/value cache"):
        serve(ids.finish({"logits": made}, {"logits": "logits"}))


def test_a_hidden_path_that_reads_positions_is_refused_by_name() -> None:
    b = GraphBuilder("odd")
    ids = b.input("ids", TensorType.of(["batch", "sequence"], "i64"), "token_ids")
    positions = b.input("position_ids", TensorType.of(["batch", "sequence"], "i64"), "position_ids")
    b.input("past", TensorType.of(["batch", 1, "past", 4], "f32"), "past.key.0")
    mixed = b.add("add", [ids, positions], node="/odd/Add")
    graph = b.finish(
        {"logits": b.add("one_hot", [mixed], {"depth": 4, "dtype": "f32"})}, {"logits": "logits"}
    )
    with pytest.raises(UnsupportedModelError, match=r"add \(/odd/Add\) reads input 'position_ids'"):
        serve(graph)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"phase": "both"}, "neither decode nor prefill"),
        ({"phase": "prefill", "prompt": 200}, "prompt <= context"),
        ({"batch": 0}, "batch 0"),
        ({"context": 0}, "context 0"),
    ],
)
def test_options_out_of_range_are_usage_errors(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        serve(llama(Sizes(layers=1)), **options)


def test_more_context_than_learned_positions_is_a_usage_error() -> None:
    assert serve(gpt2(), context=64).inputs[2][1].ints[2] == 64
    with pytest.raises(UsageError, match="context 65: the model has 64 positions"):
        serve(gpt2(), context=65)


def test_a_fixed_batch_that_differs_is_refused() -> None:
    graph = run(llama(Sizes(layers=1)), "specialise{batch=1}")
    assert serve(graph, batch=1).inputs[0][1].ints == (1, 1)
    with pytest.raises(UnsupportedModelError, match="fixed dimension 1"):
        serve(graph, batch=2)


@pytest.mark.parametrize("odd", [(0,), (5,), (0, 5), (0, 1)])
def test_layers_beside_the_repeat_keep_their_caches(odd: tuple[int, ...], tmp_path: Path) -> None:
    """Also where two of them are a repeat of their own."""
    layers = [Options(act="relu") if i in odd else Options() for i in range(6)]
    graph = load(saved(mixed(layers), tmp_path))
    assert shorten(graph) is not None
    for phase, tokens in (("decode", 1), ("prefill", 4)):
        short = serve(graph, phase, 1, 4, 32)
        unrolled = Unroll().apply(graph)
        assert shorten(unrolled) is None, "every layer is looked at"
        assert short.print() == serve(unrolled, phase, 1, 4, 32).print()
        assert short.inputs[0][1].ints == (1, tokens)
        assert len(short.inputs_with_role("state")) == 2 * len(layers)
