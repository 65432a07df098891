"""Quantising a graph changes the weights of its products, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper import driver
from mapper.backend import weight_source
from mapper.errors import ModelError, ScheduleError, UsageError
from mapper.execution import substitutes
from mapper.frontend.load import load
from mapper.ir.builder import GraphBuilder
from mapper.ir.cost import costs, total
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from mapper.ir.structure import RepeatOp
from mapper.ir.types import TensorType
from mapper.ir.weights import Packing, WeightSymbol
from mapper.lowbit import FORMATS, Scheme, dequantise, quantise
from mapper.passes.pipeline import run
from mapper.passes.quantise import PRODUCTS, Quantise
from mapper.schedule.values import evaluate as value_of
from tests.frontend import cached, decoders
from tests.frontend.tiny import saved
from tests.ir.models import Sizes, gpt2, llama, run_inputs

Array = npt.NDArray[Any]
LOW = [name for name, how in FORMATS.items() if isinstance(how, Scheme)]
ODD = Sizes(layers=3, vocab=61, width=48, heads=4, groups=4, head=12, inner=41)


def experts() -> Graph:
    """A product, a router, and routed experts: one stack [E, D, F], one [E, F, D] by rows."""
    r = np.random.default_rng(1)
    b = GraphBuilder("experts")
    x = b.input("x", TensorType.of(["tokens", 40], "f32"))

    def stack(name: str, *shape: int) -> str:
        data = r.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-2]))
        return b.weight(WeightSymbol.of(name, data))

    logits = b.add("linear", [x], {"weight": stack("router", 40, 4)})
    index, share = b.add_op("route", [logits], {"top_k": 2, "normalise": True}).results
    attrs: dict[str, Any] = {"act": "silu", "gate": stack("gate", 4, 40, 33), "up": stack("up", 4, 40, 33)}
    attrs |= {"down": stack("down", 4, 40, 33), "down_transposed": True}
    return b.finish({"y": b.add("moe", [x, index, share], attrs)})


def substituted(graph: Graph, name: str) -> Graph:
    """The graph with each product's weight but a router's replaced in place by what the format makes of it,
    found apart from the pass: rows are output rows, whichever way the product has the matrix."""
    how = FORMATS[name]
    made = dict(graph.weights)
    for op in graph.ops():
        for attribute, flag in PRODUCTS.get(op.mnemonic, {}).items():
            symbol = op.attr(attribute)
            if symbol is None or (symbol == "router" and not isinstance(how, str)):
                continue
            array = graph.weights[symbol].load()
            if isinstance(how, str):
                new = array.astype(TensorType.of([], how).numpy).astype(np.float32)
            else:
                rows = array if op.attr(flag) else np.swapaxes(array, -1, -2)
                new = grid(how, np.ascontiguousarray(rows))
                new = new if op.attr(flag) else np.swapaxes(new, -1, -2)
            made[symbol] = WeightSymbol.of(symbol, np.ascontiguousarray(new))
    other = graph.clone()
    other.know(made)
    return other


def grid(scheme: Scheme, rows: Array) -> Array:
    return dequantise(scheme, rows.shape, **quantise(scheme, rows))


@pytest.mark.parametrize("name", [*LOW, "f16", "bf16"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_meaning_is_that_of_the_weights_put_in_their_place(name: str, build: Any) -> None:
    graph = build(ODD)
    inputs = run_inputs(graph, np.random.default_rng(3).integers(0, 61, (2, 5)))
    made = Quantise(name).apply(graph)
    made.verify()
    got = evaluate(made, inputs, precision="f64")
    if build is gpt2:  # its embedding is its head: the look-up keeps the values
        assert made.weights["wte"].load() is graph.weights["wte"].load()
        head = next(op for op in made.ops() if op.mnemonic == "lm_head")
        assert made.weights[head.attr("weight")].root.name == "wte"
        return
    want = evaluate(substituted(graph, name), inputs, precision="f64")
    original = evaluate(graph, inputs, precision="f64")
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12, err_msg=key)
    assert np.abs(original["logits"] - want["logits"]).max() > 1e-5


@pytest.mark.parametrize("name", LOW)
def test_experts(name: str) -> None:
    graph = experts()
    x = np.random.default_rng(2).standard_normal((5, 40)).astype(np.float32)
    got = evaluate(Quantise(name).apply(graph), {"x": x}, precision="f64")["y"]
    want = evaluate(substituted(graph, name), {"x": x}, precision="f64")["y"]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def routed(through: str, other: bool = False) -> Graph:
    """Logits that an op leads to the choice of experts; `other`: which are a result besides."""
    b = GraphBuilder("routed")
    x = b.input("x", TensorType.of([2, 3, 40], "f32"))
    w = WeightSymbol.of("w", np.random.default_rng(1).standard_normal((40, 4)).astype(np.float32))
    logits = b.add("linear", [x], {"weight": b.weight(w)})
    attrs: dict[str, Any] = {"cast": {"dtype": "f16"}, "reshape": {"dims": [6, 4]}, "softmax": {"axis": -1}}
    ready = b.add(through, [logits], attrs[through]) if through else logits
    index, share = b.add_op("route", [ready], {"top_k": 2, "scoring": "none"}).results
    return b.finish({"index": index, "share": share} | ({"logits": logits} if other else {}))


@pytest.mark.parametrize(
    ("through", "other", "stays"),
    [
        ("", False, True),
        ("reshape", False, True),
        ("cast", False, True),
        ("", True, False),
        ("softmax", False, False),
    ],
)
def test_what_only_chooses_experts_stays(through: str, other: bool, stays: bool) -> None:
    graph = routed(through, other)
    made = Quantise("int4").apply(graph)
    assert (made.print() == graph.print()) == stays
    cast = Quantise("bf16").apply(graph)
    assert [op.attr("weight") for op in cast.ops() if op.mnemonic == "linear"] == ["w:bf16"]


def test_routers_of_a_model_stay(tmp_path: Path) -> None:
    from tests.zoo.test_zoo import small

    graph = run(load(small("qwen3-30b-a3b", tmp_path)), "repeat")
    made = Quantise("int4").apply(graph)
    formats = {
        (op.mnemonic, made.weight(op, a).format)  # type: ignore[union-attr]
        for op in made.ops()
        for a in PRODUCTS.get(op.mnemonic, {})
        if op.attr(a) is not None
    }
    assert formats == {("linear", "f32"), ("linear", "int4b32"), ("lm_head", "int4b32"), ("moe", "int4b32")}


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("build", [llama, gpt2])
def test_everything_else_stays(name: str, build: Any) -> None:
    graph = run(build(ODD), "repeat")
    made = run(graph, f"quantise{{format={name}}}")
    assert [op.mnemonic for op in made.ops()] == [op.mnemonic for op in graph.ops()]
    assert made.roles == graph.roles
    assert made.params == graph.params
    for old, new in zip(graph.ops(), made.ops(), strict=True):
        products = PRODUCTS.get(old.mnemonic, {})
        changed = {*products, *products.values()} | ({"table"} if isinstance(old, RepeatOp) else set())
        before, after = old.attrs(), new.attrs()
        assert {a for a in before if before[a] != after[a]} <= changed
        assert [r.type for r in old.results] == [r.type for r in new.results]
        if isinstance(FORMATS[name], Scheme):
            assert all(new.attr(flag) for a, flag in products.items() if new.attr(a) is not None)
    repeats = [op for op in made.top() if isinstance(op, RepeatOp)]
    assert [op.attr("count") for op in repeats] == [3]
    text = made.print()
    assert Graph.parse(text).print() == text
    again = Graph.parse(text)
    if name != "f32":
        used = [n for n, w in again.weights.items() if w.packing or w.derivation]
        assert used
        for symbol in used[:8]:
            np.testing.assert_array_equal(again.weights[symbol].load(), made.weights[symbol].load())


def test_bytes_are_those_of_the_parts() -> None:
    graph = llama(ODD)
    made = Quantise("int4").apply(graph)
    products = {op: op for op in made.ops() if op.mnemonic in PRODUCTS}
    symbol = next(
        w for w in made.weights.values() if w.packing is not None and w.root.name == "layers.0.down"
    )
    n, k, blocks = 48, 41, 2
    assert symbol.shape == (n, k)
    assert symbol.bytes == n * (blocks * 16 + blocks * 2 + 1)
    assert (
        symbol.bytes == sum(p.load().nbytes for p in symbol.packing.parts.values())
        if symbol.packing
        else False
    )
    weights = sum(c.weights.value for op, _, c in costs(made) if op in products)
    assert weights < total(graph).weights.evaluate({"batch": 1, "sequence": 1, "past": 0}) / 5


def test_no_weight_is_read_and_layers_stay_folded() -> None:
    graph = driver.load("zoo:llama-3.1-405b")
    assert not any(w.data is not None and w.elements > 1 << 20 for w in graph.weights.values())
    made = run(graph, "quantise{format=int4},serve{phase=decode,context=64}")
    assert [op.attr("count") for op in made.top() if isinstance(op, RepeatOp)] == [126]
    linear = [op for op in made.ops() if op.mnemonic in PRODUCTS]
    assert Counter(made.weight(op, a).format for op in linear for a in op.weights()) == {"int4b32": 8}  # type: ignore[union-attr]


def test_a_weight_that_the_model_stores_packed_stays() -> None:
    b = GraphBuilder("packed")
    r = np.random.default_rng(0)
    parts = {
        "values": WeightSymbol.of("w.values", r.integers(0, 256, (3, 16), np.uint8)),
        "scales": WeightSymbol.of("w.scales", np.ones((3, 1), np.float32)),
    }
    packed = WeightSymbol("w", (3, 32), "f32", bytes=60, packing=Packing(Scheme(4, 32), **parts))
    x = b.input("x", TensorType.of([2, 32], "f32"))
    graph = b.finish({"y": b.add("linear", [x], {"weight": b.weight(packed), "transposed": True})})
    assert Quantise("int8").apply(graph).print() == graph.print()


def test_one_matrix_by_rows_and_by_columns_becomes_two_symbols() -> None:
    b = GraphBuilder("both")
    w = b.weight(WeightSymbol.of("w", np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)))
    x = b.input("x", TensorType.of([2, 32], "f32"))
    y = b.add("linear", [b.add("linear", [x], {"weight": w})], {"weight": w, "transposed": True})
    made = Quantise("int4").apply(b.finish({"y": y}))
    assert [op.attr("weight") for op in made.top()] == ["w:t:int4", "w:int4"]
    rows, columns = (made.weights[n].load() for n in ("w:int4", "w:t:int4"))
    assert np.abs(rows - columns.T).max() > 0
    with pytest.raises(ModelError, match="by rows and by columns"):
        substitutes(made)


def test_both_graphs_of_a_merged_decoder(tmp_path: Path) -> None:
    model, case = cached.merged()
    graph = load(saved(model, tmp_path))
    made = Quantise("int4").apply(graph)
    for past, new in ((0, 4), (4, 3)):
        feeds = decoders.inputs(case, new, past)
        feeds |= (
            {} if past else {n: a for n, a in decoders.inputs(case, 1, 1).items() if n.startswith("past")}
        )
        apart = Quantise("int4").apply(graph.chosen(feeds))
        got, want, plain = (evaluate(g, feeds)["logits"] for g in (made, apart, graph))
        np.testing.assert_array_equal(got, want)
        assert np.abs(got - plain).max() > 1e-4


def absent(name: str) -> Array:
    raise KeyError(name)


@pytest.mark.parametrize("name", [*LOW, "bf16"])
def test_value_expressions_give_what_the_symbols_do(name: str) -> None:
    graph = Quantise(name).apply(llama(ODD))
    for symbol in (w for w in graph.weights.values() if w.packing or w.derivation):
        source = weight_source(symbol)
        assert not source.files
        got = value_of(source.expression, absent, source.constants.__getitem__)
        np.testing.assert_array_equal(got, symbol.load())
        assert got.shape == symbol.shape
        assert got.dtype == symbol.type.numpy


def test_malformed_expressions_are_one_line_errors() -> None:
    ones = ["full", [2, 64], "float32", 1.0]
    for bad in (
        ["quantise", [4, 32, -1, "rows", "int"], "order", ones],
        ["quantise", [4, 32, -1, "rows", "nan"], "values", ones],
        ["quantise", [3, 32, -1, "rows", "int"], "values", ones],
        ["quantise", [4, 32, -1, "rows", "int"], "values", ["full", [], "float32", 1.0]],
        ["quantise", [4, 32, -1], ones],
        ["quantise", [4, 1 << 40, -1, "rows", "int"], "values", ones],
        ["quantise", [4, -32, -1, "rows", "int"], "values", ones],
    ):
        with pytest.raises(ScheduleError) as caught:
            value_of(bad, absent, absent)
        assert "\n" not in str(caught.value)


def test_a_source_must_give_what_the_text_says() -> None:
    text = Quantise("int4").apply(llama(ODD)).print()
    line = next(
        row
        for row in text.splitlines()
        if "@layers.0.gate:t:int4.values" in row.replace('"', "") and "source" in row
    )
    for old, new in (
        ("[41 x 32], u8", "[41 x 31], u8"),
        ('part = "values"', 'part = "scales"'),
        (", turned = true", ""),
    ):
        assert old in line, line
        with pytest.raises(ModelError, match="is not what"):
            Graph.parse(text.replace(line, line.replace(old, new)))


def test_sources_that_cannot_be_are_refused() -> None:
    kind = "!dataflow.tensor<[48], f32>"
    text = Quantise("int4").apply(llama(ODD)).print()
    first = text.index("  dataflow.weight")

    def refused(line: str, says: str) -> None:
        with pytest.raises(ModelError, match=says):
            Graph.parse(f"{text[:first]}{line}{text[first:]}")

    refused(f"  dataflow.weight @a : {kind} {{source = @b}}\n", "not declared before it")
    refused(f"  dataflow.weight @a : {kind} {{source = @a}}\n", "not declared before it")
    vector = f"  dataflow.weight @v : {kind}\n"
    refused(f"{vector}  dataflow.weight @a : {kind} {{source = @v, turned = true}}\n", "is no matrix")
    refused(f'{vector}  dataflow.weight @a : {kind} {{source = @v, part = "values"}}\n', "is no matrix")
    chain = "".join(f"  dataflow.weight @v{i + 1} : {kind} {{source = @v{i}}}\n" for i in range(2000))
    refused(f"{vector.replace('@v', '@v0')}{chain}", "made of too many")


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match="unknown weight format 'int5'; formats: f32, f16, bf16, int8, int8row"
    ):
        run(llama(), "quantise{format=int5}")
