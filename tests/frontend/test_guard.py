"""Hostile and malformed files: a named one-line error, quickly, before any data is read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mapper.errors import MapperError, ModelError, UnsupportedModelError
from mapper.frontend.guard import read_model
from mapper.frontend.load import load
from tests.frontend.tiny import Options, decoder, saved

F = TensorProto.FLOAT


def model(
    nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto] | None = None, opset: int = 17
) -> onnx.ModelProto:
    """A graph from x [2, 3] to y."""
    x, y = (helper.make_tensor_value_info(n, F, [2, 3]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], tensors or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def node(op: str, ins: list[str], outs: list[str], **attrs: Any) -> onnx.NodeProto:
    """A node named after its first result."""
    return helper.make_node(op, ins, outs, name=f"node_{outs[0]}", **attrs)


def add_w(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """y = x + w."""
    tensor.name = "w"
    return model([node("Add", ["x", "w"], ["y"])], [tensor])


def raw(dims: list[int], data: bytes) -> onnx.TensorProto:
    """A float tensor whose raw data may lie."""
    return TensorProto(dims=dims, data_type=F, raw_data=data)


def external(location: str, dims: tuple[int, ...] = (2, 3), **entries: str) -> onnx.TensorProto:
    """A float tensor in another file."""
    tensor = TensorProto(dims=dims, data_type=F, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def nested(depth: int) -> onnx.ModelProto:
    """If in If in If ..."""
    body = helper.make_graph(
        [node("Identity", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", F, None)]
    )
    flag = numpy_helper.from_array(np.array(True), "flag")
    for level in range(depth):
        inner = (
            node("If", ["flag"], [f"z{level}"], then_branch=body, else_branch=body)
            if level < 2
            else node("If", ["flag"], [f"z{level}"], then_branch=body)
        )
        out = helper.make_tensor_value_info(f"z{level}", F, None)
        body = helper.make_graph([inner], "b", [], [out])
    return model([node("If", ["flag"], ["y"], then_branch=body)], [flag])


BROKEN: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "assigned twice": (
        lambda: model([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])]),
        "'y' is assigned twice",
    ),
    "an input assigned": (lambda: model([node("Relu", ["x"], ["x"])]), "'x' is assigned twice"),
    "undefined operand": (
        lambda: model([node("Add", ["x", "nowhere"], ["y"])]),
        "'nowhere', which nothing defines",
    ),
    "undefined output": (lambda: model([node("Relu", ["x"], ["z"])]), "gives 'y', which nothing defines"),
    "cycle": (
        lambda: model(
            [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Neg", ["b"], ["y"])]
        ),
        "cycle",
    ),
    "product overflow": (lambda: add_w(raw([1 << 31, 1 << 31, 64], b"abcd")), "overflows"),
    "data too short": (lambda: add_w(raw([2, 3], b"\0" * 20)), "needs 24 bytes, its data has 20"),
    "data too long": (lambda: add_w(raw([2, 3], b"\0" * 28)), "needs 24 bytes, its data has 28"),
    "negative dimension": (lambda: add_w(raw([-2, 3], b"")), "negative dimension"),
    "typed data too short": (
        lambda: add_w(TensorProto(dims=[2, 3], data_type=F, float_data=[1.0] * 5)),
        "needs 6 elements, its data has 5",
    ),
    "typed data of another type": (
        lambda: add_w(TensorProto(dims=[2], data_type=F, int64_data=[1, 2])),
        "of another type",
    ),
    "upward path": (lambda: add_w(external("../w.bin")), "outside the model's folder"),
    "absolute path": (lambda: add_w(external("/etc/hostname")), "no relative path"),
    "no path": (lambda: add_w(external("")), "no relative path"),
    "the folder itself": (lambda: add_w(external(".")), "outside the model's folder"),
    "bad offset": (lambda: add_w(external("w.bin", offset="-4")), "offset '-4'"),
    "huge offset": (lambda: add_w(external("w.bin", offset="9" * 30)), "offset"),
    "wrong length": (lambda: add_w(external("w.bin", length="25")), "needs 24 bytes"),
    "deep sub-graphs": (lambda: nested(20), "nested deeper than 16"),
}


@pytest.mark.parametrize(("make", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_rejected(make: Callable[[], onnx.ModelProto], text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=text.replace("(", r"\(")) as caught:
        load(saved(make(), tmp_path))
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "old opset": (lambda: model([node("Relu", ["x"], ["y"])], opset=10), "opset 10"),
    "future opset": (lambda: model([node("Relu", ["x"], ["y"])], opset=29), "opset 29"),
    "unknown operator": (
        lambda: model([node("Frobnicate", ["x"], ["y"])]),
        r"'node_y' \(Frobnicate\): this operator is not supported",
    ),
    "unknown domain": (
        lambda: model([node("Relu", ["x"], ["y"], domain="org.example")]),
        r"'node_y' \(org.example.Relu\): unknown domain",
    ),
    "recurrence": (
        lambda: model(
            [node("LSTM", ["x", "w", "w"], ["y"], hidden_size=1)],
            [raw([1], b"\0" * 4).__class__(name="w", dims=[1], data_type=F, raw_data=b"\0" * 4)],
        ),
        r"'node_y' \(LSTM\): recurrence",
    ),
    "convolution": (
        lambda: model(
            [node("Reshape", ["x", "s"], ["i"]), node("Conv", ["i", "w"], ["y"])],
            [
                numpy_helper.from_array(np.array([1, 1, 6]), "s"),
                numpy_helper.from_array(np.ones((1, 1, 3), np.float32), "w"),
            ],
        ),
        r"'node_y' \(Conv\): .* not a transformer",
    ),
    "data-dependent size": (lambda: model([node("NonZero", ["x"], ["y"])]), r"\(NonZero\): the size .* data"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_foreign_models_are_refused_by_name(
    make: Callable[[], onnx.ModelProto], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        load(saved(make(), tmp_path))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a directory"):
        load(tmp_path)
    with pytest.raises(ModelError, match="no such"):
        load(tmp_path / "absent.onnx")
    for name, data, text in (
        ("empty.onnx", b"", "is empty"),
        ("text.json", b"{}", "text formats"),
        ("garbage.onnx", b"\xff" * 100, "malformed|truncated"),
        ("zeros.onnx", b"\0" * 100, "field number 0"),
        ("words.onnx", b"not a model at all, just words", "protobuf|no ONNX model"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ModelError, match=text):
            load(path)


def test_links_out_and_odd_files(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "w.bin").write_bytes(b"\0" * 24)
    (inside / "link.bin").symlink_to(outside / "w.bin")
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "folder").mkdir()
    os.mkfifo(inside / "pipe")
    (inside / "short.bin").write_bytes(b"\0" * 23)
    for name, text in (
        ("link.bin", "outside"),
        ("loop", "cannot be re|outside"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("short.bin", "has 23|of 23"),
    ):
        with pytest.raises(ModelError, match=text):
            load(saved(add_w(external(name)), inside))
    os.mkfifo(inside / "model.pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        load(inside / "model.pipe")


def test_external_data_may_be_absent_and_is_located_exactly(tmp_path: Path) -> None:
    graph = load(saved(add_w(external("weights/w.bin", offset="128", length="24")), tmp_path))
    weight = graph.weights["w"]
    assert (weight.file, weight.offset, weight.bytes) == ("weights/w.bin", 128, 24)
    with pytest.raises(MapperError):
        weight.load()


def test_weights_inside_the_file_are_symbols_with_their_offset(tmp_path: Path) -> None:
    made = decoder(Options(layers=1))
    path = saved(made, tmp_path)
    graph = load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    assert graph.weights
    for name, weight in graph.weights.items():
        assert weight.file == "model.onnx" and weight.data is None
        bytes_there = path.read_bytes()[weight.offset : weight.offset + weight.bytes]
        assert bytes_there == stored[name].tobytes()
        assert np.array_equal(weight.load(), stored[name])


def message(number: int, body: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, out = len(body), b""
    while length >= 0x80:
        out += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + out + bytes([length]) + body


def hostile() -> dict[str, bytes]:
    """Files made to take long or to need much memory."""
    deep = b""
    for _ in range(3000):
        deep = message(1, message(5, message(6, deep)))
    chain = b"".join(
        message(1, message(1, f"v{i}".encode()) + message(2, f"v{i + 1}".encode()) + message(4, b"Relu"))
        for i in range(20_000)
    )
    powers = message(1, message(2, b"((((a+b+c+d)**8)**8)**8)**8"))
    return {
        "empty nodes": message(7, message(1, b"") * 8_000_000),
        "empty names": message(7, message(1, message(1, b"") * 8_000_000)),
        "deep": message(7, deep),
        "many dims": message(7, message(5, b"\x08\x02" * 4_000_000)),
        "many attributes": message(7, message(1, message(5, message(8, b"\x01" * 5_000_000)))),
        "long name": message(7, message(1, message(3, b"n" * 50_000_000))),
        "long chain": message(7, chain),
        "powers": message(7, message(11, message(1, b"x") + message(2, message(1, message(2, powers))))),
    }  # fmt: skip


@pytest.mark.parametrize("kind", hostile())
def test_hostile_files_are_answered(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.onnx"
    path.write_bytes(hostile()[kind])
    start = time.process_time()
    try:
        load(path)
    except MapperError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    assert time.process_time() - start < 60, "as good as a hang"


SMALL = decoder(Options(layers=1)).SerializeToString()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_never_crash(data: st.DataObject, tmp_path: Path) -> None:
    mutant = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "repeat", "byte"]))
        if kind == "flip":
            mutant[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "byte":
            mutant[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del mutant[at : at + data.draw(st.integers(1, 40))]
        else:
            mutant[at:at] = mutant[at : at + data.draw(st.integers(1, 40))]
    path = tmp_path / "mutant.onnx"
    path.write_bytes(bytes(mutant))
    try:
        load(path)
    except MapperError as error:
        assert "\n" not in str(error)


def test_reading_a_model_reads_no_weights(tmp_path: Path) -> None:
    tensor = external("big.bin", (1 << 20, 1 << 12))
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(4 << 32)  # sparse: reading it would take minutes
    path = saved(add_w(tensor), tmp_path)
    start = time.process_time()
    assert read_model(path).locations
    assert time.process_time() - start < 60, "it read the weights"
