"""Models whose files store low-bit weights: MatMulNBits, with zero points of each kind, roundings, pads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mapper import driver
from mapper.errors import MapperError
from mapper.lowbit import Scheme, pack, quantise, unpack
from tests.frontend.corpus import FOLDER
from tests.gpu.common import EXAMPLE, built, h100


def packed(
    folder: Path, bits: int, block: int, zero: str = "none", accuracy: int = 0, of: Path = EXAMPLE
) -> Path:
    """A model with its products as MatMulNBits, as exporters write them: scales in float32."""
    model = onnx.load(of)
    graph = model.graph
    held = {t.name: t for t in graph.initializer}
    for at, node in enumerate(graph.node):
        if node.op_type != "MatMul" or node.input[1] not in held:
            continue
        weight = numpy_helper.to_array(held[node.input[1]]).T.astype(np.float32)
        n, k = weight.shape
        operands = [node.input[0], *_parts(graph, node.input[1], weight, bits, block, zero)]
        made = helper.make_node(
            "MatMulNBits", operands, node.output, node.name, domain="com.microsoft", K=k, N=n, bits=bits,
            block_size=block, accuracy_level=accuracy,
        )  # fmt: skip
        graph.node[at].CopyFrom(made)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path = folder / "packed.onnx"
    onnx.save(model, path)
    return path


def _parts(graph: Any, name: str, weight: Any, bits: int, block: int, zero: str) -> list[str]:
    """Names of initializers of codes, scales and, where there are any, zero points."""
    n, k = weight.shape
    blocks = -(-k // block)
    made = quantise(Scheme(bits, block), weight)
    zeros = np.random.default_rng(n + k).integers(110, 140, (n, blocks)).astype(np.uint8)
    zeros = unpack(made["zeros"], 4)[:, :blocks] if bits == 4 else zeros
    arrays = [made["values"].reshape(n, blocks, -1), made["scales"].astype(np.float32)]
    if zero == "packed":
        arrays.append(pack(zeros, bits))
    elif zero == "float":
        arrays.append(zeros.astype(np.float32))
    names = [f"{name}.{part}" for part in ("values", "scales", "zeros")][: len(arrays)]
    graph.initializer.extend(numpy_helper.from_array(a, x) for a, x in zip(arrays, names, strict=True))
    return names


@pytest.mark.parametrize(
    ("bits", "block", "zero", "chips"),
    [
        (4, 32, "none", 1),
        (4, 32, "packed", 2),
        (4, 16, "float", 2),
        (8, 64, "none", 1),
        (8, 16, "packed", 2),
        (4, 128, "packed", 1),
    ],
)
def test_stored_weights_are_read_as_they_are(
    bits: int, block: int, zero: str, chips: int, tmp_path: Path
) -> None:
    """Products in float32, as the file says: the comparison with onnxruntime is strict."""
    model = packed(tmp_path, bits, block, zero)
    done = built(model, chips=chips, prompt=5, context=12, out=tmp_path / "s")
    stored = [w.get("stored") for r in done.schedule.plan["blocks"].values() for b in r for k in b["kernels"]
              for w in k["weights"] if k["kind"] == "product"]  # fmt: skip
    assert stored.count(f"int{bits}b{block}") == 14  # of a layer of either phase; logits are float32
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures
    assert found.max_rel_err < 1e-4
    assert "against_original" not in found.record()


@pytest.mark.parametrize("megakernel", [False, True])
def test_activations_rounded_beside_them(megakernel: bool, tmp_path: Path) -> None:
    model = packed(tmp_path, 4, 32, "packed", accuracy=4)
    machine = h100(megakernel, sm__in_flight=512)
    done = built(model, machine=machine, prompt=5, context=12, out=tmp_path / "s")
    used = {i[0] for ps in done.schedule.plan["programs"].values() for p in ps for i in p["code"]}
    assert {"round_blocks", "dequantise"} <= used
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures


def test_blocks_that_chips_would_cut_are_refused(tmp_path: Path) -> None:
    model = packed(tmp_path, 4, 128, "packed")
    with pytest.raises(MapperError, match="2 chips would cut the blocks of 128 along its 704 columns"):
        driver.compile(model, "gpu", chips=2, prompt=4, context=8)


def dequantised(folder: Path, form: str, of: Path = EXAMPLE) -> Path:
    """A model with its products' integers behind a DequantizeLinear, [K, N] as it has them."""
    model = onnx.load(of)
    graph = model.graph
    held = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in held:
            name = node.input[1]
            weight = numpy_helper.to_array(held[name]).astype(np.float64)
            parts, attrs = _plain(weight, form)
            names = [f"{name}.{i}" for i in range(len(parts))]
            graph.initializer.extend(parts_of(parts, names, form))
            nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}.made"], f"{name}.dq", **attrs))
            node.input[1] = f"{name}.made"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for opset in model.opset_import:
        opset.version = 21 if opset.domain == "" else opset.version
    path = folder / "plain.onnx"
    onnx.save(model, path)
    return path


def parts_of(arrays: list[Any], names: list[str], form: str) -> list[Any]:
    """Initializers; integers of 4 bits are packed two to a byte."""
    kind = {"i4": onnx.TensorProto.INT4, "u4": onnx.TensorProto.UINT4}.get(form[:2])
    found = []
    for array, name in zip(arrays, names, strict=True):
        if kind is None or array.dtype.kind == "f":
            found.append(numpy_helper.from_array(array, name))
        else:
            raw = pack(array.astype(np.int16).reshape(-1).astype(np.uint8) & np.uint8(15), 4).tobytes()
            found.append(helper.make_tensor(name, kind, array.shape, raw, raw=True))
    return found


def _plain(weight: Any, form: str) -> tuple[list[Any], dict[str, Any]]:
    """(integers, scales, zero points; attributes) of a matrix [K, N]."""
    low, high = {"i8": (-127, 127), "u8": (0, 255), "i4": (-7, 7)}[form[:2]]
    block = 32 if "block" in form else 0
    grouped = weight.reshape(-1, block or weight.shape[0], weight.shape[1])
    top = np.abs(grouped).max(1)
    top = np.full_like(top, top.max()) if "tensor" in form else top
    scale = (2 * top / (high - low)).astype(np.float32)
    zero = 0 if low < 0 else 128
    q = np.clip(np.rint(grouped / scale[:, None]) + zero, low, high).reshape(weight.shape)
    kind = np.uint8 if form[0] == "u" else np.int8
    parts = [q.astype(kind), scale if block else scale[0]]
    if "tensor" in form:
        parts[1] = parts[1][0]
    if zero:
        parts.append(np.full(parts[1].shape, zero, kind))
    return parts, {"axis": 0, "block_size": block} if block else {} if "tensor" in form else {"axis": 1}


@pytest.mark.parametrize(
    ("form", "chips", "stored"),
    [
        ("i8 axis", 2, "int8"),
        ("i8 tensor", 1, "int8"),
        ("u8 axis", 2, "int8"),
        ("i8 block", 1, "int8b32"),
        ("u8 block", 2, "int8b32"),
        ("i4 block", 2, "int4b32"),
    ],
)
def test_integers_of_a_matrix_are_held_as_integers(
    form: str, chips: int, stored: str, tmp_path: Path
) -> None:
    model = dequantised(tmp_path, form)
    done = built(model, chips=chips, prompt=5, context=12, out=tmp_path / "s")
    found = [w.get("stored") for r in done.schedule.plan["blocks"].values() for b in r for k in b["kernels"]
             for w in k["weights"] if k["kind"] == "product"]  # fmt: skip
    assert found.count(stored) == 14
    verified = driver.verify(tmp_path / "s", tokens=4)
    assert verified.ok, verified.failures
    assert verified.max_rel_err < 1e-4


ALTERNATING = sorted(p for n in ("bloom__ts17-kv", "gptneox__dyn18-kv") for p in FOLDER.glob(f"{n}.onnx"))
"""Models whose queries, keys and values alternate in one matrix, head by head."""


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("form", ["i8 axis", "u8 block", "packed", "float"])
@pytest.mark.parametrize("of", ALTERNATING, ids=lambda p: p.stem)
def test_rows_in_another_order_are_held_as_stored(of: Path, form: str, chips: int, tmp_path: Path) -> None:
    """Rows of codes, scales and zero points are taken apart alike, and no part is held as values."""
    if form in ("packed", "float"):
        model = packed(tmp_path, 4, 16, form, of=of)
    else:
        model = dequantised(tmp_path, form, of)
    done = built(model, chips=chips, prompt=5, context=12, out=tmp_path / "s")
    picked = {w["name"]: w.get("stored") for r in done.schedule.plan["blocks"].values() for b in r
              for k in b["kernels"] for w in k["weights"] if "[" in w["name"]}  # fmt: skip
    assert len(picked) == 3 and all(picked.values())
    verified = driver.verify(tmp_path / "s", tokens=4)
    assert verified.ok, verified.failures
    assert verified.max_rel_err < 1e-4
