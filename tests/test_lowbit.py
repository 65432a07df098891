"""Quantising: errors within what the formats say, exactness, and what onnxruntime makes of the same parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from mapper import lowbit
from mapper.lowbit import FORMATS, Scheme, dequantise, format_name, pack, quantise, unpack

Array = npt.NDArray[Any]
SCHEMES = {name: how for name, how in FORMATS.items() if isinstance(how, Scheme)}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP MX v1.0, table of FP4 values
rng = np.random.default_rng


def blocks_of(scheme: Scheme, weight: Array) -> Array:
    """Per element the number of its block in its row."""
    return np.broadcast_to(np.arange(weight.shape[-1]) // (scheme.block or weight.shape[-1]), weight.shape)


def scale_of(scheme: Scheme, weight: Array, scales: Array) -> Array:
    """Per element its block's scale in float64."""
    wide = np.exp2(scales.astype(np.float64) - 127) if scales.dtype == np.uint8 else scales.astype(np.float64)
    return np.take_along_axis(wide, blocks_of(scheme, weight), -1)


def allowed(name: str, weight: Array, scale: Array) -> Array:
    """The largest error that the format's definition leaves, per element, in float64."""
    if name.startswith("int"):
        return scale * 0.5
    magnitude = np.abs(weight.astype(np.float64)) / np.where(scale > 0, scale, 1)
    if name == "f8e4m3":  # 3 bits of mantissa: half a step is 2^-4 of the binade; subnormals go in 2^-9
        binade = np.exp2(np.floor(np.log2(np.maximum(magnitude, 2.0**-6))))
        return scale * binade * 2.0**-4
    step = np.select([magnitude < 2, magnitude < 4], [0.5, 1.0], 2.0)
    return scale * np.where(magnitude > 6, magnitude - 6, step / 2)


@st.composite
def weights(draw: st.DrawFn) -> Array:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 80)))
    scale = 10.0 ** draw(st.integers(-6, 4))
    values = draw(arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    return (values * np.float32(scale)).astype(np.float32)


@pytest.mark.parametrize("name", SCHEMES)
@given(weight=weights())
def test_the_error_is_within_what_the_format_leaves(name: str, weight: Array) -> None:
    scheme = SCHEMES[name]
    parts = quantise(scheme, weight)
    made = dequantise(scheme, weight.shape, **parts)
    scale = scale_of(scheme, weight, parts["scales"])
    error = np.abs(made.astype(np.float64) - weight)
    slack = np.abs(weight) * 2.0**-22 + scale * 2.0**-16 + 2.0**-149  # of quotients and products in float32
    assert np.isfinite(made).all()
    assert (error <= allowed(name, weight, scale) + slack).all()


@pytest.mark.parametrize("name", SCHEMES)
@given(weight=weights())
def test_what_a_format_gives_it_gives_again(name: str, weight: Array) -> None:
    """Dequantised values lie on a grid: what they are quantised to is off by no more than the first was, and
    is on it exactly where the grid stays the same."""
    scheme = SCHEMES[name]
    first = quantise(scheme, weight)
    made = dequantise(scheme, weight.shape, **first)
    second = quantise(scheme, made)
    if np.array_equal(first["scales"], second["scales"]) and np.array_equal(
        first.get("zeros", 0), second.get("zeros", 0)
    ):
        np.testing.assert_array_equal(dequantise(scheme, weight.shape, **second), made)


def test_representable_values_are_exact() -> None:
    r = rng(1)
    scale = np.float32(0.0123).astype(np.float16).astype(np.float32)
    q = r.integers(0, 16, (5, 64))
    q[:, ::32], q[:, 1::32] = 0, 15
    four = (q - 6).astype(np.float32) * scale
    parts = quantise(SCHEMES["int4"], four)
    np.testing.assert_array_equal(unpack(parts["values"], 4), q)
    assert set(unpack(parts["zeros"], 4).ravel()) == {6}
    np.testing.assert_array_equal(dequantise(SCHEMES["int4"], four.shape, **parts), four)

    for name, base in (("int8", scale), ("int8row", np.float32(0.0123))):
        q = r.integers(-127, 128, (3, 64))
        q[:, ::32] = 127
        eight = q.astype(np.float32) * base
        parts = quantise(SCHEMES[name], eight)
        np.testing.assert_array_equal(parts["values"], q + 128)
        np.testing.assert_array_equal(dequantise(SCHEMES[name], eight.shape, **parts), eight)

    values = np.array([*E2M1, *(-v for v in E2M1)] * 4, np.float32).reshape(2, 32)
    for power in (-100, -3, 0, 90):
        there = np.ldexp(values, power)
        np.testing.assert_array_equal(
            dequantise(SCHEMES["mxfp4"], there.shape, **quantise(SCHEMES["mxfp4"], there)), there
        )


def test_ties_go_to_even() -> None:
    row = np.zeros((1, 32), np.float32)
    row[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127]
    got = quantise(SCHEMES["int8"], row)["values"][0, :8].astype(int) - 128
    assert got.tolist() == [127, 0, 2, 2, 0, -2, 126, -127]
    row[0, :9] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5]
    made = dequantise(SCHEMES["mxfp4"], row.shape, **quantise(SCHEMES["mxfp4"], row))
    assert made[0, :9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -4]


def test_mxfp4_is_the_nearest_value_by_search() -> None:
    """Against a search through the published table, with the published choice of the scale."""
    weight = (rng(2).standard_normal((7, 96)) * np.exp2(rng(3).integers(-20, 20, (7, 1)))).astype(np.float32)
    made = dequantise(SCHEMES["mxfp4"], weight.shape, **quantise(SCHEMES["mxfp4"], weight))
    table = np.array([s * v for v in E2M1 for s in (1, -1)])
    for row, got in zip(weight.reshape(-1, 32), made.reshape(-1, 32), strict=True):
        scale = 2.0 ** (np.floor(np.log2(np.abs(row).max())) - 2)
        nearest = table[np.abs(row[:, None] / scale - table).argmin(-1)] * scale
        np.testing.assert_array_equal(got, nearest)


@pytest.mark.parametrize("name", SCHEMES)
def test_blocks_of_zeros_are_zeros(name: str) -> None:
    weight = np.zeros((3, 70), np.float32)
    weight[1, 40] = 1.0
    made = dequantise(SCHEMES[name], weight.shape, **quantise(SCHEMES[name], weight))
    assert not made[weight == 0].any()
    assert made[1, 40] == pytest.approx(1, rel=2e-3)  # its scale has 11 bits


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e-7, 1e4, 1e38])
def test_magnitudes(name: str, size: float) -> None:
    weight = (rng(4).uniform(-1, 1, (2, 64)) * size).astype(np.float32)
    scheme = SCHEMES[name]
    if size > 1e30 and scheme.block and scheme.kind == "int":
        with pytest.raises(ValueError, match="beyond float16"):
            quantise(scheme, weight)
        return
    parts = quantise(scheme, weight)
    made = dequantise(scheme, weight.shape, **parts)
    scale = scale_of(scheme, weight, parts["scales"])
    assert np.isfinite(made).all()
    slack = np.abs(weight).astype(np.float64) * 2.0**-20 + scale * 2.0**-16 + 2.0**-149
    assert (np.abs(made.astype(np.float64) - weight) <= allowed(name, weight, scale) + slack).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    weight = np.ones((2, 40), np.float32)
    weight[1, 35] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(SCHEMES[name], weight)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 64), (3, 65), (5, 33), (1, 1), (2, 3, 40)])
def test_parts_are_as_declared_and_padding_is_zero(name: str, shape: tuple[int, ...]) -> None:
    scheme, weight = SCHEMES[name], rng(5).standard_normal(shape).astype(np.float32)
    parts = quantise(scheme, weight)
    types = {"u8": np.uint8, "f16": np.float16, "f32": np.float32}
    declared = {n: (s, types[kind]) for n, (s, kind) in scheme.parts(shape).items()}
    assert {n: (a.shape, a.dtype.type) for n, a in parts.items()} == declared
    whole = (*shape[:-1], parts["values"].shape[-1] * 8 // scheme.bits)
    padded = dequantise(scheme, whole, **parts)
    np.testing.assert_array_equal(padded[..., : shape[-1]], dequantise(scheme, shape, **parts))
    assert not padded[..., shape[-1] :].any()
    for part in parts:
        np.testing.assert_array_equal(quantise(scheme, weight, (part,))[part], parts[part])


@pytest.mark.parametrize("name", SCHEMES)
def test_working_on_few_rows_at_a_time_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight = SCHEMES[name], rng(6).standard_normal((2, 9, 70)).astype(np.float32)
    parts = quantise(scheme, weight)
    made = dequantise(scheme, weight.shape, **parts)
    monkeypatch.setattr(lowbit, "_CHUNK", 100)
    again = quantise(scheme, weight.swapaxes(-1, -2).copy().swapaxes(-1, -2))
    for part, array in parts.items():
        np.testing.assert_array_equal(again[part], array)
    np.testing.assert_array_equal(dequantise(scheme, weight.shape, **parts), made)


@pytest.mark.parametrize(("name", "columns"), [("int4", 96), ("int4", 70), ("int8", 64), ("int8", 33)])
def test_onnxruntime_reads_the_parts_as_we_do(name: str, columns: int) -> None:
    """MatMulNBits on the identity gives the weight that onnxruntime makes of the parts."""
    scheme, rows = SCHEMES[name], 5
    weight = rng(7).standard_normal((rows, columns)).astype(np.float32)
    parts = quantise(scheme, weight)
    blocks = -(-columns // scheme.block)
    held = {
        "b": parts["values"].reshape(rows, blocks, -1),
        "scales": parts["scales"].astype(np.float32).reshape(-1),
        **({"zeros": parts["zeros"].reshape(-1)} if "zeros" in parts else {}),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *held], ["y"], domain="com.microsoft", K=columns, N=rows, bits=scheme.bits,
        block_size=scheme.block,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        [onnx.numpy_helper.from_array(a, n) for n, a in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
    np.testing.assert_allclose(y.T, dequantise(scheme, weight.shape, **parts), rtol=1e-6, atol=1e-6)


@given(arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 3)))
def test_packing_is_the_inverse_of_unpacking(values: Array) -> None:
    for bits in (2, 4, 8):
        assert np.array_equal(unpack(pack(values, bits), bits)[..., : values.shape[-1]], values)


def test_names() -> None:
    assert format_name("fp16") == "f16"
    assert {how.name for how in SCHEMES.values()} == {"int8b32", "int8", "int4b32", "f8e4m3", "mxfp4"}
    with pytest.raises(
        ValueError, match=r"'int3'; formats: f32, f16, bf16, int8, int8row, int4, f8e4m3, mxfp4"
    ):
        format_name("int3")
    for scheme in (Scheme(4), Scheme(8, layout="plain"), Scheme(8, axis=0)):
        with pytest.raises(ValueError, match="not known"):
            quantise(scheme, np.ones((2, 2), np.float32))
