"""Graphs: exact round trip through text, verification, sections, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdsl.ir import SSAValue

from mapper.errors import ModelError, WeightsMissingError
from mapper.ir.builder import GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.types import BITS, TensorType
from mapper.ir.weights import WeightSymbol
from mapper.passes.pipeline import run
from mapper.passes.repeat import Repeat
from tests.ir.models import Sizes, gpt2, llama

NAMES = st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=8)
FLOATS = st.floats(allow_nan=False, width=64)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random graphs: odd names, any float attribute, all dtypes of constants, inline and file weights."""
    b = GraphBuilder(draw(NAMES), sha256="0" * 64)
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    for i, name in enumerate(names):
        offset, data = draw(st.integers(0, 2**40)), draw(st.booleans())
        array = np.arange(6, dtype=np.float32) + i
        inline = WeightSymbol.of(name, array, derived=draw(st.booleans()))
        b.weight(inline if data else WeightSymbol(name, (6,), "f32", "m.bin", offset, 24))
    first = draw(st.sampled_from(["batch", "a - 1", "2*n", "'odd name'", "x", "3"]))
    dims: list[int | str] = [first, 6]
    values: list[SSAValue] = [b.input(draw(NAMES), TensorType.of(dims, "f32"))]
    for _ in range(draw(st.integers(1, 6))):
        x = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["norm", "add", "slice", "constant", "topk"]))
        node = draw(st.one_of(st.just(""), NAMES))
        if kind == "norm":
            attrs: dict[str, Any] = {
                "kind": "rms",
                "eps": draw(FLOATS),
                "weight": draw(st.sampled_from(names)),
            }
            values.append(b.add("norm", [x], attrs, node=node))
        elif kind == "add":
            values.append(b.add("add", [x, x], node=node))
        elif kind == "slice":
            bounds = {"axes": (0,), "starts": (draw(st.integers(0, 5)),), "ends": ("limit + 3",)}
            b.add("slice", [x], bounds)
        elif kind == "constant":
            dtype = draw(st.sampled_from([d for d in BITS if d not in ("i4", "u4")]))
            b.constant(draw(st.lists(st.integers(0, 1), max_size=4)), dtype)
        else:
            b.add_op("topk", [x], {"k": 2})
    roles = {"out": draw(NAMES)}
    return b.finish({"out": values[-1], draw(NAMES) + "!": values[0]}, roles, kv_layout="BHLD")


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_random_graphs_round_trip_exactly(graph: Graph) -> None:
    text = graph.print()
    again = Graph.parse(text)
    assert again.print() == text
    assert again.module.is_structurally_equivalent(graph.module)
    assert again.roles == graph.roles and again.inputs == graph.inputs and again.name == graph.name
    for name, weight in graph.weights.items():
        other = again.weights[name]
        assert (other.file, other.offset, other.type, other.derived) == (
            weight.file, weight.offset, weight.type, weight.derived)  # fmt: skip
        if weight.data is not None:
            np.testing.assert_array_equal(other.load(), weight.load())


def test_a_weight_may_be_called_as_the_graph_is() -> None:
    b = GraphBuilder("f")
    b.weight(WeightSymbol.of("main", np.ones(3, np.float32)))
    x = b.input("x", TensorType.of([2, 3], "f32"))
    text = b.finish({"y": b.add("norm", [x], {"kind": "rms", "eps": 0.0, "weight": "main"})}).print()
    assert Graph.parse(text).print() == text


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 5e-324, -0.0])
def test_special_floats_round_trip(special: float) -> None:
    b = GraphBuilder("f")
    x = b.input("x", TensorType.of([2], "f32"))
    text = b.finish({"y": b.add("pad", [x], {"pads": (1, 0), "value": special})}).print()
    again = Graph.parse(text)
    assert again.print() == text
    np.testing.assert_equal(again.top()[0].attr("value"), special)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_decoders_round_trip_with_and_without_repeat(build: Any) -> None:
    graph = build(Sizes(vocab=5, width=4, heads=2, groups=2, head=4, inner=3, positions=8))
    assert Graph.parse(graph.print()).print() == graph.print()
    grouped = Repeat().apply(graph)
    assert Graph.parse(grouped.print()).print() == grouped.print()
    assert [s.count for s in grouped.sections()] == [1, 3, 1]
    assert grouped.layers == graph.layers == 3
    assert grouped.params == graph.params == sum(w.elements for w in graph.weights.values())


def test_sections_resolve_slots_to_names() -> None:
    graph = run(llama(Sizes(layers=2)), "fold,cse,dce,repeat")
    _, body, _ = graph.sections()
    assert body.repeat is not None and body.count == 2
    assert body.table["linear0.weight"] == ("layers.0.q", "layers.1.q")
    names = {slot.names for slot in body.inputs}
    assert names == {tuple(f"past_key_values.{i}.{w}" for i in range(2)) for w in ("key", "value")}
    outputs = {slot.names for slot in body.outputs}
    assert outputs == {tuple(f"present.{i}.{w}" for i in range(2)) for w in ("key", "value")}
    assert len(body.carried) == 1
    linear = next(op for op in body.ops if op.mnemonic == "linear")
    weight = graph.weight(linear, "weight", 1)
    assert weight is not None and weight.name == "layers.1.q"
    assert graph.weight(linear, "bias", 1) is None


def test_shared_weights_count_once() -> None:
    b = GraphBuilder("s")
    b.weight(WeightSymbol("a", (2, 3), "f32", "m.bin", 8, 24))
    b.weight(WeightSymbol("b", (3, 2), "f32", "m.bin", 8, 24))
    b.weight(WeightSymbol.of("table", np.zeros((4, 4), np.float32), derived=True))
    graph = b.finish({"y": b.input("x", TensorType.of([1], "f32"))})
    assert graph.params == 6
    assert graph.files == ["m.bin"]


def test_what_only_makes_positions_is_no_parameter() -> None:
    b = GraphBuilder("p")
    ids = b.input("ids", TensorType.of(["n"], "i64"), "token_ids")
    positions = b.input("positions", TensorType.of(["n", 1], "f32"), "position_ids")
    for name, shape in (("table", (5, 4)), ("frequencies", (4,)), ("scale", (4,)), ("unused", (7,))):
        b.weight(WeightSymbol.of(name, np.ones(shape, np.float32)))
    angle = b.add("cos", [b.add("mul", [positions, b.load("frequencies")])])
    doubled = b.add("add", [b.load("scale"), b.load("scale")])
    y = b.add("mul", [b.add("embed", [ids], {"table": "table"}), doubled])
    graph = b.finish({"y": b.add("mul", [y, angle])})
    assert graph.params == 5 * 4 + 4


def test_weights_are_read_at_their_offset(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.float32).reshape(3, 4)
    (tmp_path / "m.bin").write_bytes(b"head" + data.tobytes())
    weight = WeightSymbol("w", (3, 4), "f32", "m.bin", 4, 48, folder=tmp_path)
    np.testing.assert_array_equal(weight.load(), data)
    short = WeightSymbol("w", (3, 4), "f32", "m.bin", 8, 48, folder=tmp_path)
    with pytest.raises(WeightsMissingError, match="does not hold"):
        short.load()


def test_four_bit_weights_unpack_low_first(tmp_path: Path) -> None:
    (tmp_path / "q.bin").write_bytes(bytes([0x2F, 0x81, 0x07]))
    signed = WeightSymbol("q", (5,), "i4", "q.bin", 0, 3, folder=tmp_path).load()
    assert signed.astype(int).tolist() == [-1, 2, 1, -8, 7]
    unsigned = WeightSymbol("q", (5,), "u4", "q.bin", 0, 3, folder=tmp_path).load()
    assert unsigned.astype(int).tolist() == [15, 2, 1, 8, 7]


TEXT = """builtin.module attributes {dataflow.model = {name = "m"}} {
  dataflow.weight @w : !dataflow.tensor<[3 x 4], f32> {bytes = 48 : i64, file = "m.bin"}
  dataflow.graph @main {input_names = ["x"], output_names = ["y"]} {
  ^bb0(%0: !dataflow.tensor<[n x 3], f32>):
    %1 = dataflow.linear %0 {weight = @w} : (!dataflow.tensor<[n x 3], f32>) -> !dataflow.tensor<[n x 4], f32>
    dataflow.output %1 : (!dataflow.tensor<[n x 4], f32>) -> ()
  }
}
"""
WEIGHT = TEXT[TEXT.index("  dataflow.weight") : TEXT.index("  dataflow.graph")]
GRAPH = TEXT[TEXT.index("  dataflow.graph") : TEXT.rindex("}")]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("", "", ""),
        ("n x 4], f32", "n x 5], f32", "result types"),
        ("weight = @w}", "weight = @v}", "no weight is called 'v'"),
        ("weight = @w}", "weight = 3 : i64}", "WeightKind"),
        (" {weight = @w}", "", "weight"),
        ("bytes = 48", "bytes = 44", "44 bytes"),
        ('["x"]', '["x", "z"]', "input_names"),
        ("dataflow.output %1 :", "dataflow.output %7 :", "not a dataflow module"),
        ("dataflow.linear", "dataflow.quux", "not a dataflow module"),
        ("n x 4], f32", "n x 4], f17", "not a dataflow module"),
        ("[n x 3], f32>):", "[n x 'a', f32>):", "not a dataflow module"),
        ("dataflow.graph", "dataflow.grape", "not a dataflow module"),
        ("  dataflow.graph", WEIGHT + "  dataflow.graph", "Redefinition of symbol"),
        (GRAPH, "", "0 graphs"),
        (GRAPH, GRAPH + GRAPH, "Redefinition of symbol"),
    ],
)  # fmt: skip
def test_broken_text_is_a_model_error(old: str, new: str, why: str) -> None:
    if not old:
        assert Graph.parse(TEXT).inputs[0][0] == "x"
        return
    assert old in TEXT
    with pytest.raises(ModelError, match=why):
        Graph.parse(TEXT.replace(old, new))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutilated_text_is_a_model_error_or_a_graph(data: st.DataObject) -> None:
    text = TEXT
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        stop = start + data.draw(st.integers(0, 6))
        filler = data.draw(
            st.sampled_from(["", "-", "0", "9" * 30, '"', "}", "<", "%0", "@w", "f16", " x ", "\x00"])
        )
        text = text[:start] + filler + text[stop:]
    try:
        graph = Graph.parse(text)
    except ModelError:
        return
    assert Graph.parse(graph.print()).print() == graph.print()


@pytest.mark.parametrize("broken", ['"', '\\x"', "\n"])
def test_a_long_string_that_is_not_closed_is_answered(broken: str) -> None:
    # quantifiers inside quantifiers would take 2^2000 steps
    with pytest.raises(ModelError, match="string"):
        Graph.parse(TEXT + ' "' + "a\\n" * 2000 + broken.replace('"', "", 1) + "\n")


def test_a_repeat_reads_nothing_from_outside_but_its_operands() -> None:
    grouped = Repeat().apply(run(llama(Sizes(layers=2, width=8, vocab=5)), "fold,cse,dce")).clone()
    _, body, _ = grouped.sections()
    assert body.repeat is not None
    norm = body.ops[0]
    norm.operands[0] = body.carried[0].initial
    with pytest.raises(ModelError, match="malformed"):
        grouped.verify()
