"""Each pass keeps the meaning of a graph, and does what it is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper.errors import ModelError, UsageError
from mapper.ir.builder import GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from mapper.ir.types import TensorType
from mapper.ir.weights import WeightSymbol
from mapper.passes.cse import Cse
from mapper.passes.dce import Dce
from mapper.passes.fold import Fold
from mapper.passes.pipeline import parse, registry, run
from mapper.passes.repeat import Repeat
from mapper.passes.serve import Serve
from mapper.passes.specialise import Specialise, specialise
from mapper.passes.unroll import Unroll
from tests.ir.models import Sizes, gpt2, llama, run_inputs

Array = npt.NDArray[Any]


def names(graph: Graph) -> list[str]:
    return [op.mnemonic for op in graph.ops()]


def same_outputs(a: Graph, b: Graph, inputs: dict[str, Array]) -> None:
    first, second = evaluate(a, inputs), evaluate(b, inputs)
    assert list(first) == list(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def padded_inputs(graph: Graph) -> dict[str, Array]:
    """A step after two cached tokens, with the first token of the second sequence being padding."""
    rng = np.random.default_rng(3)
    empty = run_inputs(graph, rng.integers(0, 61, (2, 2)))
    caches = {n: v for n, v in evaluate(graph, empty).items() if n != "logits"}
    inputs = run_inputs(graph, rng.integers(0, 61, (2, 3)), caches)
    inputs["attention_mask"][1, 0] = 0
    return inputs


PIPELINES = ["dce", "cse", "fold", "fold,cse,dce", "repeat", "fold,cse,dce,repeat", "repeat,unroll",
             "fold,cse,dce,repeat,unroll", "repeat,fold,dce", "specialise{batch=2}",
             "repeat,specialise{batch=2,sequence=3,past=2}"]  # fmt: skip


@pytest.mark.parametrize("text", PIPELINES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_pipelines_keep_the_meaning(text: str, build: Any) -> None:
    graph = build(Sizes(layers=3, groups=4, vocab=61))
    same_outputs(graph, run(graph, text), padded_inputs(graph))


def test_fold_computes_constants_and_shapes() -> None:
    b = GraphBuilder("f")
    x = b.input("x", TensorType.of(["n", 6], "f32"))
    lead = b.add("shape_of", [x], {"end": 1})
    shape = b.add("concat", [lead, b.add("mul", [b.constant([1, 1]), b.constant([2, 3])])], {"axis": 0})
    y = b.add("reshape", [b.add("reshape", [x, shape]), b.constant([-1, 3])])
    three = b.add("exp", [b.add("log", [b.constant(3.0)])])
    graph = b.finish({"y": b.add("mul", [y, three])})
    folded = run(graph, "fold,dce")
    assert names(folded) == ["reshape", "constant", "mul"]
    assert [str(d) for d in folded.top()[0].attr("dims")] == ["2*n", "3"]
    same_outputs(graph, folded, {"x": np.arange(12, dtype=np.float32).reshape(2, 6)})


def test_fold_leaves_large_results_and_weights_alone() -> None:
    b = GraphBuilder("f")
    b.weight(WeightSymbol.of("w", np.ones((4, 4), np.float32)))
    big = b.add("expand", [b.constant(1.0)], {"dims": (200, 200)})
    flipped = b.add("transpose", [b.load("w")], {"perm": (1, 0)})
    graph = b.finish({"a": big, "b": flipped})
    assert names(Fold().apply(graph)) == ["constant", "expand", "load", "transpose"]
    assert "expand" not in names(run(graph, "fold{largest=1000000},dce"))


def test_fold_removes_views_that_change_nothing() -> None:
    b = GraphBuilder("f")
    x = b.input("x", TensorType.of(["n", 6], "f32"))
    y = b.add("transpose", [b.add("cast", [x], {"dtype": "f32"})], {"perm": (0, 1)})
    y = b.add("slice", [y], {"axes": (1,), "starts": (0,), "ends": (2**63 - 1,)})
    square = b.input("s", TensorType.of([3, 3], "f32"))
    turned = b.add("transpose", [square], {"perm": (1, 0)})
    graph = b.finish({"y": b.add("neg", [y]), "t": turned})
    assert names(run(graph, "fold,dce")) == ["transpose", "neg"]


def test_fold_never_takes_a_slice_backwards_for_a_view() -> None:
    b = GraphBuilder("f")
    x = b.input("x", TensorType.of([4], "f32"))
    y = b.add("slice", [x], {"axes": (0,), "starts": (-1,), "ends": (-(2**62),), "steps": (-1,)})
    graph = b.finish({"y": y})
    same_outputs(graph, run(graph, "fold,dce"), {"x": np.arange(4, dtype=np.float32)})


def test_cse_merges_equal_ops_whatever_node_they_stem_from() -> None:
    b = GraphBuilder("c")
    x = b.input("x", TensorType.of([3], "f32"))
    first, second = b.add("neg", [x], node="/a"), b.add("neg", [x], node="/b")
    other = b.add("norm", [x], {"kind": "rms", "eps": 1e-5}), b.add("norm", [x], {"kind": "rms", "eps": 1e-6})
    graph = b.finish({"y": b.add("add", [first, second]), "a": other[0], "b": other[1]})
    assert sorted(names(Cse().apply(graph))) == ["add", "neg", "norm", "norm"]


def test_dce_removes_ops_and_weights_that_nothing_needs() -> None:
    b = GraphBuilder("d")
    x = b.input("x", TensorType.of([3], "f32"))
    for name in ("used", "unused", "dead"):
        b.weight(WeightSymbol.of(name, np.ones(3, np.float32)))
    b.add("add", [b.load("dead"), x])
    graph = b.finish({"y": b.add("add", [b.load("used"), x])})
    assert list(Dce().apply(graph).weights) == ["used"]
    assert names(Dce(weights=False).apply(graph)) == ["load", "add"]
    assert len(Dce(weights=False).apply(graph).weights) == 3


def test_specialise_folds_all_shape_arithmetic() -> None:
    graph = llama()
    static = specialise(graph, {"input_ids": (2, 3), "past": 4})
    assert all(t.is_static for _, t in static.inputs + static.outputs)
    assert not {"shape_of", "concat", "range"} & set(names(static)) - {"concat"}
    assert dict(static.outputs)["present.0.key"].ints == (2, 2, 7, 12)
    with pytest.raises(ModelError, match="no input of that name"):
        specialise(graph, {"nobody": (2, 3)})
    with pytest.raises(ModelError, match="both 2 and 3"):
        specialise(graph, {"input_ids": (2, 3), "position_ids": (3, 3)})


def test_repeat_and_unroll_are_inverse() -> None:
    graph = run(llama(), "fold,cse,dce")
    grouped = Repeat().apply(graph)
    assert [(s.count, len(s.ops)) for s in grouped.sections()][1] == (3, 22)
    assert len(names(Unroll().apply(grouped))) == len(names(graph))
    again = Repeat().apply(Unroll().apply(grouped))
    assert again.print() == grouped.print()
    assert Repeat().apply(grouped) is grouped


def chain(kinds: str) -> Graph:
    """One op per letter on the hidden path, each with its own weight: l linear, n norm, e activation."""
    b = GraphBuilder("chain")
    x = b.input("x", TensorType.of(["n", 4], "f32"), "token_ids")
    x = b.add("neg", [x])
    rng = np.random.default_rng(0)
    for i, kind in enumerate(kinds):
        if kind == "e":
            x = b.add("activation", [x], {"kind": "silu"})
            continue
        shape = (4, 4) if kind == "l" else (4,)
        symbol = b.weight(WeightSymbol.of(f"w{i}", rng.standard_normal(shape).astype(np.float32)))
        plain: dict[str, Any] = {"weight": symbol}
        x = (
            b.add("linear", [x], plain)
            if kind == "l"
            else b.add("norm", [x], {**plain, "kind": "rms", "eps": 1e-5})
        )
    return b.finish({"y": x})


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("lllll", [(1, 1), (5, 1)]),
        ("lnlnlne", [(1, 1), (3, 2), (1, 1)]),
        ("llnllnlln", [(1, 1), (3, 3)]),
        ("enlnln", [(1, 2), (2, 2), (1, 1)]),
        ("lllnnn", [(1, 1), (3, 1), (3, 1)]),
        ("lne", [(1, 4)]),
    ],
)
def test_repeat_finds_the_period(kinds: str, expected: list[tuple[int, int]]) -> None:
    graph = chain(kinds)
    grouped = Repeat().apply(graph)
    grouped.verify()
    found = [(s.count, len(s.ops)) for s in grouped.sections()]
    assert found == expected
    same_outputs(graph, grouped, {"x": np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)})


def test_hidden_states_of_every_layer_can_be_outputs() -> None:
    b = GraphBuilder("h")
    x = b.add("neg", [b.input("x", TensorType.of(["n", 4], "f32"), "token_ids")])
    outputs = {}
    for i in range(3):
        b.weight(WeightSymbol.of(f"w{i}", np.full((4, 4), i + 1, np.float32)))
        x = outputs[f"hidden.{i}"] = b.add("linear", [x], {"weight": f"w{i}"})
    graph = b.finish(outputs)
    grouped = Repeat().apply(graph)
    _, body = grouped.sections()
    assert body.count == 3 and [o.names for o in body.outputs] == [tuple(outputs)]
    same_outputs(graph, grouped, {"x": np.ones((2, 4), np.float32)})


def test_repeat_keeps_shared_weights_shared_and_layer_constants_apart() -> None:
    b = GraphBuilder("r")
    x = b.input("x", TensorType.of(["n", 4], "f32"), "token_ids")
    b.weight(WeightSymbol.of("shared", np.eye(4, dtype=np.float32) * 2))
    per_layer = [b.input(f"bias.{i}", TensorType.of([4], "f32")) for i in range(3)]
    x = b.add("neg", [x])
    for i in range(3):
        x = b.add("linear", [x], {"weight": "shared"})
        x = b.add("add", [x, per_layer[i]])
        x = b.add("mul", [x, b.constant(np.float32(0.5))])
    graph = b.finish({"y": x})
    grouped = Repeat().apply(graph)
    _, body = grouped.sections()
    assert body.count == 3 and dict(body.table) == {}
    assert [slot.names for slot in body.inputs] == [("bias.0", "bias.1", "bias.2")]
    assert [op.mnemonic for op in body.ops] == ["linear", "add", "constant", "mul"]
    inputs = {"x": np.ones((2, 4), np.float32), **{f"bias.{i}": np.full(4, i, np.float32) for i in range(3)}}
    same_outputs(graph, grouped, inputs)


def test_layers_with_different_constants_are_not_grouped() -> None:
    b = GraphBuilder("r")
    x = b.add("neg", [b.input("x", TensorType.of(["n", 4], "f32"), "token_ids")])
    for i in range(3):
        x = b.add("mul", [x, b.constant(np.float32(i))])
    graph = b.finish({"y": x})
    assert Repeat().apply(graph) is graph


def test_pipelines_are_parsed_into_frozen_dataclasses() -> None:
    assert parse("fold, cse ,dce{weights=false}") == [Fold(), Cse(), Dce(weights=False)]
    served = Serve(phase="prefill", context=64)
    assert parse("serve{phase=prefill, context=64}") == [served]
    assert parse("specialise{batch=1,input_ids=2x16}") == [Specialise((("batch", 1), ("input_ids", (2, 16))))]
    assert set(registry()) == {
        "cse",
        "dce",
        "fold",
        "quantise",
        "repeat",
        "serve",
        "specialise",
        "unflatten",
        "unroll",
    }
    with pytest.raises(AttributeError):
        served.phase = "decode"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty pipeline"),
        ("fold,,dce", "cannot read"),
        ("quux", "unknown pass 'quux'; passes: cse"),
        ("fold{largest=big}", "not a number"),
        ("fold{size=3}", "no option 'size'; options: largest"),
        ("dce{weights}", "not key=value"),
        ("dce{weights=maybe}", "neither true nor false"),
        ("fold{largest=3", "cannot read"),
        ("specialise{batch=x}", "not a number"),
    ],
)
def test_bad_pipelines_are_usage_errors(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse(text)


def test_a_pass_that_breaks_the_ir_is_named() -> None:
    class Breaking:
        name = "breaking"

        def apply(self, graph: Graph) -> Graph:
            """A graph whose first op misses its weight."""
            new = graph.clone()
            next(new.ops()).set_attr("table", "nowhere")
            return new

    b = GraphBuilder("b")
    b.weight(WeightSymbol.of("w", np.ones((3, 2), np.float32)))
    ids = b.input("ids", TensorType.of(["n"], "i64"))
    graph = b.finish({"y": b.add("embed", [ids], {"table": "w"})})
    with pytest.raises(ModelError, match="after pass breaking: no weight is called 'nowhere'"):
        run(graph, [Breaking()])


def test_unflatten_lifts_token_wise_ops() -> None:
    b = GraphBuilder("u")
    x = b.input("x", TensorType.of([2, 3, 4], "f32"))
    rng = np.random.default_rng(2)
    for name, shape in (("w", (4, 5)), ("b", (5,)), ("g", (5,))):
        b.weight(WeightSymbol.of(name, rng.standard_normal(shape).astype(np.float32)))
    flat = b.add("reshape", [x], {"dims": (6, 4)})
    y = b.add("linear", [flat], {"weight": "w", "bias": "b"})
    y = b.add("add", [y, b.add("norm", [y], {"kind": "rms", "eps": 1e-5, "weight": "g"})])
    y = b.add("mul", [y, b.constant(2.0)])
    other = b.add("softmax", [y], {"axis": 0})
    graph = b.finish({"y": b.add("reshape", [y], {"dims": (2, 3, 5)}), "other": other})
    lifted = run(graph, "unflatten{batch=2,seq=3}")
    assert names(lifted) == ["linear", "norm", "add", "constant", "mul", "reshape", "softmax"]
    assert all(
        op.result_shape()[:2] == (2, 3) for op in lifted.ops() if op.mnemonic in ("linear", "norm", "mul")
    )
    same_outputs(graph, lifted, {"x": rng.standard_normal((2, 3, 4)).astype(np.float32)})
