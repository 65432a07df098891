"""Low-bit weights are one weight each: products, experts and their bytes, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mapper
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.cost import total
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from mapper.lowbit import Scheme, dequantise, unpack
from tests.frontend.test_experts import CHOSEN, EXPERTS, INNER, MS, WIDTH, Writer, checked, fan_in, names

RNG = np.random.default_rng(17)


def packed(rows: int, columns: int, bits: int, block: int) -> tuple[Any, Any, Any]:
    """(values [rows, blocks, bytes], scales [rows, blocks], zeros packed per row) of a random matrix."""
    blocks = -(-columns // block)
    values = RNG.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    scales = (RNG.random((rows, blocks)) / (1 << bits) / np.sqrt(columns) * 8 + 1e-3).astype(np.float32)
    zeros = RNG.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
    return values, scales, zeros


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", ["none", "packed", "float"])
@pytest.mark.parametrize("accuracy", [0, 4])
@pytest.mark.parametrize("columns", [64, 80])
def test_matrix_of_low_bit_blocks(bits: int, zero: str, accuracy: int, columns: int, tmp_path: Path) -> None:
    block, rows = 32, 24
    if (bits == 2 and accuracy == 4) or (bits == 8 and zero == "float"):
        pytest.skip("onnxruntime's CPU kernels do not have this")
    values, scales, zeros = packed(rows, columns, bits, block)
    w = Writer()
    x = w.add("MatMul", "x", w.store(fan_in(columns, WIDTH).T.copy()))
    operands = [x, w.store(values), w.store(scales)]
    if zero == "packed":
        operands.append(w.store(zeros))
    elif zero == "float":
        operands.append(w.store(RNG.integers(1, 1 << bits, scales.shape).astype(np.float32)))
    attrs: dict[str, Any] = {
        "bits": bits,
        "block_size": block,
        "K": columns,
        "N": rows,
        "accuracy_level": accuracy,
    }
    out = w.add("MatMulNBits", *operands, domain=MS, **attrs)
    graph = checked(w.model(out, rows), tmp_path, 1e-3 if accuracy == 4 else 1e-5)
    assert names(graph) == ["linear", "linear"]
    assert inspect(graph)["weight_formats"] == {"f32": 1, f"int{bits}b32": 1}
    stored = (
        values.nbytes
        + scales.nbytes
        + (0 if zero == "none" else zeros.nbytes if zero == "packed" else scales.nbytes)
    )
    assert total(graph).weights.evaluate({"tokens": 1}) == stored + 4 * WIDTH * columns
    assert graph.params == rows * columns + WIDTH * columns


def test_packed_weights_are_printed_and_parsed(tmp_path: Path) -> None:
    values, scales, zeros = packed(24, 64, 4, 32)
    w = Writer()
    x = w.add("MatMul", "x", w.store(fan_in(64, WIDTH).T.copy()))
    attrs: dict[str, Any] = {"bits": 4, "block_size": 32, "K": 64, "N": 24}
    out = w.add("MatMulNBits", x, *map(w.store, (values, scales, zeros)), domain=MS, **attrs)
    graph = checked(w.model(out, 24), tmp_path)
    again = Graph.parse(graph.print(), graph.path, graph.folder)
    assert again.print() == graph.print()
    given = {"x": RNG.standard_normal((3, WIDTH)).astype(np.float32)}
    np.testing.assert_array_equal(evaluate(again, given)["y"], evaluate(graph, given)["y"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("zero", [False, True])
def test_experts_of_low_bits(bits: int, block: int, zero: bool, tmp_path: Path) -> None:
    w = Writer()
    x = w.add("MatMul", "x", w.store(fan_in(WIDTH, WIDTH)))
    logits = w.add("MatMul", x, w.store(3 * fan_in(EXPERTS, WIDTH).T.copy()))
    operands: list[str] = []
    points: list[str] = []
    for rows, columns in ((2 * INNER, WIDTH), (WIDTH, INNER)):
        values = RNG.integers(0, 256, (EXPERTS, rows, columns * bits // 8), np.uint8)
        blocks = columns // block if block else 1
        scales = (RNG.random((EXPERTS, rows, blocks)) / (1 << bits) / np.sqrt(columns) * 8).astype(np.float32)
        scales = scales if block else scales[:, :, 0]
        zeros = (EXPERTS, rows, -(-blocks * bits // 8)) if block else (EXPERTS, rows * bits // 8)
        operands += [w.store(values), w.store(scales), w.store(fan_in(EXPERTS, rows))]
        points.append(w.store(RNG.integers(0, 256, zeros, np.uint8)) if zero else "")
    attrs: dict[str, Any] = {
        "k": CHOSEN,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
    }
    attrs |= {"expert_weight_bits": bits} | ({"block_size": block} if block else {})
    out = w.add("QMoE", x, logits, *operands, "", "", "", *points, domain=MS, **attrs)
    graph = checked(w.model(out), tmp_path, 1e-3 if bits == 8 and block else 1e-5)
    assert names(graph) == ["linear", "linear", "route", "moe"]
    one = total(graph).weights.evaluate({"tokens": 1})
    assert (
        one
        < CHOSEN * (3 * WIDTH * INNER * bits // 8) * 2
        + 4 * WIDTH * (EXPERTS + WIDTH)
        + 4 * CHOSEN * 3 * INNER * 2
    )


def test_unpacking_is_low_bits_first() -> None:
    assert unpack(np.array([[0x21, 0x43]], np.uint8), 4).tolist() == [[1, 2, 3, 4]]
    assert unpack(np.array([0b11100100], np.uint8), 2).tolist() == [0, 1, 2, 3]


def test_blocks_in_another_order() -> None:
    values = np.arange(8, dtype=np.uint8)[None]
    order = np.array([1, 1, 0, 0, 1, 0, 1, 0], np.int32)
    made = dequantise(Scheme(8, 4), (1, 8), values, np.array([[1.0, 10.0]], np.float32), None, order)
    expected = (np.arange(8) - 128.0) * np.array([10, 10, 1, 1, 10, 1, 10, 1])
    np.testing.assert_allclose(made, expected[None])


def test_parts_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    values, scales, _ = packed(24, 64, 4, 32)
    w = Writer()
    x = w.add("MatMul", "x", w.store(fan_in(64, WIDTH).T.copy()))
    attrs: dict[str, Any] = {"bits": 4, "block_size": 32, "K": 64, "N": 24}
    out = w.add("MatMulNBits", x, w.store(values[:20]), w.store(scales), domain=MS, **attrs)
    path = tmp_path / "m.onnx"
    path.write_bytes(w.model(out, 24).SerializeToString())
    with pytest.raises(mapper.MapperError, match="operand 1"):
        load(path)


@pytest.mark.parametrize("form", ["tensor", "axis", "blocks", "axis and zeros"])
def test_stored_integers_with_scales_are_one_weight(form: str, tmp_path: Path) -> None:
    w = Writer()
    values = RNG.integers(-128, 128, (WIDTH, 24)).astype(np.int8)
    shape = {"tensor": (), "axis": (24,), "blocks": (WIDTH // 16, 24), "axis and zeros": (24,)}[form]
    scales = (RNG.random(shape) * 0.01 + 0.001).astype(np.float32)
    operands = [w.store(values), w.store(np.asarray(scales))]
    if form == "axis and zeros":
        operands.append(w.store(RNG.integers(-9, 9, 24).astype(np.int8)))
    attrs: dict[str, Any] = {"axis": 0, "block_size": 16} if form == "blocks" else {"axis": 1}
    matrix = w.add("DequantizeLinear", *operands, **attrs)
    model = w.model(w.add("MatMul", "x", matrix), 24)
    model.opset_import[0].version = 21
    graph = checked(model, tmp_path)
    assert names(graph) == ["linear"]
    assert total(graph).weights.evaluate({"tokens": 1}) < values.size * 2
