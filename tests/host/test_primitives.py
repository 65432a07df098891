"""Every primitive on the host's kernels against NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mapper.errors import ExecutionFault
from mapper.ir.builder import GraphBuilder
from mapper.ir.types import type_of
from tests.host.graphs import run

Array = npt.NDArray[Any]
RNG = np.random.default_rng(7)
BF16 = ml_dtypes.bfloat16


def apply(name: str, arrays: Sequence[Array], attrs: dict[str, Any] | None = None) -> list[Array]:
    """The results of one op on arrays that enter as inputs of the graph."""
    builder = GraphBuilder("one")
    operands = [builder.input(f"x{i}", type_of(a)) for i, a in enumerate(arrays)]
    made = builder.add_op(name, operands, attrs)
    graph = builder.finish({f"y{i}": r for i, r in enumerate(made.results)})
    found = run(graph, {f"x{i}": a for i, a in enumerate(arrays)})
    return [found[f"y{i}"] for i in range(len(made.results))]


def floats(*shape: int, dtype: Any = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def ints(low: int, high: int, *shape: int, dtype: Any = np.int64) -> Array:
    return RNG.integers(low, high, shape).astype(dtype)


Function = Callable[..., Any]

UNARY: dict[str, Function] = {
    "neg": np.negative, "abs": np.abs, "exp": np.exp, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "atan": np.arctan,
    "tanh": np.tanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softplus": lambda x: np.log1p(np.exp(x)),
    "relu": lambda x: np.maximum(x, 0), "floor": np.floor, "ceil": np.ceil, "round": np.rint, "sign": np.sign,
    "isnan": np.isnan, "isinf": np.isinf, "log": lambda x: np.log(np.abs(x)),
    "sqrt": lambda x: np.sqrt(np.abs(x)),
    "rsqrt": lambda x: 1 / np.sqrt(np.abs(x)), "reciprocal": lambda x: 1 / x,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(UNARY))
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BF16])
def test_unary(name: str, dtype: Any) -> None:
    x = floats(3, 5, dtype=dtype)
    x = np.abs(x) if name in ("log", "sqrt", "rsqrt") else x
    (y,) = apply(name, [x])
    expected = UNARY[name](x.astype(np.float64))
    assert y.dtype == (bool if name.startswith("is") else x.dtype)
    error = {"float64": 1e-15, "float32": 2e-7, "float16": 1e-3, "bfloat16": 8e-3}[x.dtype.name]
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=error, atol=error / 10)


def test_special_values() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32)
    assert apply("isnan", [x])[0].tolist() == [True, False, False, False, False, False]
    assert apply("isinf", [x])[0].tolist() == [False, True, True, False, False, False]
    with np.errstate(all="ignore"):
        special: dict[str, Function] = {
            "exp": np.exp,
            "sqrt": np.sqrt,
            "log": np.log,
            "reciprocal": np.reciprocal,
        }
        for name, function in special.items():
            np.testing.assert_allclose(apply(name, [x])[0], function(x), rtol=1e-6)
        np.testing.assert_array_equal(apply("max", [x, x[::-1].copy()])[0], np.maximum(x, x[::-1]))
        np.testing.assert_array_equal(apply("div", [x, np.zeros(1, np.float32)])[0], x / np.float32(0))


@pytest.mark.parametrize(
    "shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((4, 1), (3, 1, 5)), ((), (2, 2)), ((2, 3), ())]
)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "min", "max"])
def test_binary_broadcasts(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    functions: dict[str, Function] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.minimum,
        "max": np.maximum,
    }  # fmt: skip
    a, b = (floats(*s) for s in shapes)
    np.testing.assert_allclose(apply(name, [a, b])[0], functions[name](a, b), rtol=1e-6)
    c, d = (ints(-9, 9, *s) for s in shapes)
    d = np.where(d == 0, 3, d)
    expected = np.trunc(c / d).astype(np.int64) if name == "div" else functions[name](c, d)
    np.testing.assert_array_equal(apply(name, [c, np.asarray(d)])[0], expected)


def test_integers_and_logic() -> None:
    a, b = ints(-7, 8, 40), ints(1, 5, 40)
    np.testing.assert_array_equal(apply("mod", [a, b])[0], np.mod(a, b))
    np.testing.assert_array_equal(apply("mod", [a, b], {"fmod": True})[0], np.fmod(a, b))
    np.testing.assert_array_equal(apply("pow", [a, b])[0], a**b)
    f = np.abs(floats(5))
    np.testing.assert_allclose(apply("pow", [f, np.array([0.5], np.float32)])[0], np.sqrt(f), rtol=1e-6)
    compare: dict[str, Function] = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal,
    }  # fmt: skip
    for name, function in compare.items():
        np.testing.assert_array_equal(apply(name, [a, b])[0], function(a, b))
        np.testing.assert_array_equal(apply(name, [a / 2, b / 2])[0], function(a / 2, b / 2))
    p, q = a > 0, b > 2
    logic: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    for name, function in logic.items():
        np.testing.assert_array_equal(apply(name, [p, q])[0], function(p, q))
        np.testing.assert_array_equal(apply(name, [a, b])[0], getattr(np, f"bitwise_{name}")(a, b))
    np.testing.assert_array_equal(apply("not", [p])[0], ~p)
    np.testing.assert_array_equal(apply("select", [p[:, None], a, b])[0], np.where(p[:, None], a, b))


@pytest.mark.parametrize("to", ["f32", "f64", "f16", "bf16", "i64", "i32", "i8", "u8", "bool"])
@pytest.mark.parametrize("source", [np.float32, np.int64, np.int32, np.uint8, np.bool_, np.float16])
def test_cast(source: Any, to: str) -> None:
    from mapper.ir.types import numpy_dtype

    x = (RNG.uniform(0, 100, 20)).astype(source)
    np.testing.assert_array_equal(apply("cast", [x], {"dtype": to})[0], x.astype(numpy_dtype(to)))


def test_views_and_moves() -> None:
    x = floats(2, 3, 4)
    np.testing.assert_array_equal(apply("reshape", [x], {"dims": (4, 6)})[0], x.reshape(4, 6))
    np.testing.assert_array_equal(apply("transpose", [x], {"perm": (2, 0, 1)})[0], x.transpose(2, 0, 1))
    (wide,) = apply("expand", [x[:, :1]], {"dims": (2, 3, 4)})
    np.testing.assert_array_equal(wide, np.broadcast_to(x[:, :1], (2, 3, 4)))
    np.testing.assert_array_equal(apply("tile", [x], {"repeats": (2, 1, 3)})[0], np.tile(x, (2, 1, 3)))
    for axis in (0, 1, -1):
        np.testing.assert_array_equal(
            apply("concat", [x, x, x], {"axis": axis})[0], np.concatenate([x] * 3, axis)
        )
    a, b = apply("split", [x], {"axis": -1, "sizes": (1, 3)})
    np.testing.assert_array_equal(a, x[..., :1])
    np.testing.assert_array_equal(b, x[..., 1:])


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.float16, np.uint8])
def test_slice_and_pad(dtype: Any) -> None:
    x = ints(0, 99, 4, 7, dtype=dtype)
    cut = {"axes": (0, 1), "starts": (1, -1), "ends": (4, -99), "steps": (2, -2)}
    np.testing.assert_array_equal(apply("slice", [x], cut)[0], x[1:4:2, ::-2])
    (y,) = apply("pad", [x], {"pads": (1, -2, 0, 3), "value": 5.0})
    np.testing.assert_array_equal(y, np.pad(x[:, 2:], ((1, 0), (0, 3)), constant_values=5))
    np.testing.assert_array_equal(apply("trilu", [x], {"upper": False, "k": 1})[0], np.tril(x, 1))
    np.testing.assert_array_equal(apply("trilu", [x], {"k": -1})[0], np.triu(x, -1))


def test_gathers() -> None:
    x, i = floats(3, 4, 5), np.array([[0, -1], [2, 1]])
    for axis in (0, 1, 2):
        np.testing.assert_array_equal(apply("gather", [x, i], {"axis": axis})[0], np.take(x, i, axis))
    j = ints(0, 4, 3, 2, 5, dtype=np.int32)
    np.testing.assert_array_equal(
        apply("gather_elements", [x, j], {"axis": 1})[0], np.take_along_axis(x, j, 1)
    )
    k = np.array([[0, 1], [2, -1]])
    np.testing.assert_array_equal(apply("gather_nd", [x, k])[0], x[k[:, 0], k[:, 1]])
    with pytest.raises(ExecutionFault, match="out of range"):
        apply("gather", [x, np.array([5])])


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatters(reduction: str) -> None:
    known: dict[str, Function] = {
        "none": lambda a, b: b, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    }  # fmt: skip
    combine = known[reduction]
    x, i, u = floats(4, 3), np.array([[3], [1]]), floats(2, 3)
    expected = x.copy()
    expected[[3, 1]] = combine(x[[3, 1]], u)
    np.testing.assert_allclose(
        apply("scatter_nd", [x, i, u], {"reduction": reduction})[0], expected, rtol=1e-6
    )
    j = np.array([[1, 2, 0], [0, 0, 3]])
    expected = x.copy()
    for r in range(2):
        for c in range(3):
            expected[j[r, c], c] = combine(expected[j[r, c], c], u[r, c])
    (y,) = apply("scatter_elements", [x, j, u], {"axis": 0, "reduction": reduction})
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("axes", [None, (0,), (-1,), (0, 2)])
@pytest.mark.parametrize("keepdims", [True, False])
def test_reduce(axes: tuple[int, ...] | None, keepdims: bool) -> None:
    x = floats(3, 4, 5)
    z = x.astype(np.float64)
    expected: dict[str, Function] = {
        "sum": z.sum, "mean": z.mean, "max": z.max, "min": z.min, "prod": z.prod, "sum_square": (z * z).sum,
        "l1": np.abs(z).sum, "l2": lambda axis, keepdims: np.sqrt((z * z).sum(axis=axis, keepdims=keepdims)),
        "log_sum_exp": lambda axis, keepdims: np.log(np.exp(z).sum(axis=axis, keepdims=keepdims)),
    }  # fmt: skip
    for kind, function in expected.items():
        (y,) = apply("reduce", [x], {"kind": kind, "axes": axes, "keepdims": keepdims})
        np.testing.assert_allclose(
            y, function(axis=axes, keepdims=keepdims), rtol=1e-6, atol=1e-6, err_msg=kind
        )


def test_scans_and_sorts() -> None:
    x = floats(3, 6, 2)
    soft = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True)
    np.testing.assert_allclose(apply("softmax", [x], {"axis": 1})[0], soft, rtol=1e-6)
    np.testing.assert_allclose(
        apply("softmax", [x], {"axis": 1, "log": True})[0], np.log(soft), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(apply("cumsum", [x], {"axis": 1})[0], np.cumsum(x, 1), rtol=1e-5, atol=1e-6)
    i = ints(0, 9, 3, 6)
    (back,) = apply("cumsum", [i], {"axis": -1, "reverse": True, "exclusive": True})
    np.testing.assert_array_equal(back, np.cumsum(i[:, ::-1], 1)[:, ::-1] - i)
    np.testing.assert_array_equal(apply("argmax", [x], {"axis": 1})[0], x.argmax(1))
    ties = np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)
    assert apply("argmax", [ties])[0].tolist() == [1]
    values, at = apply("topk", [ties], {"k": 3})
    assert values.tolist() == [[3.0, 3.0, 2.0]] and at.tolist() == [[1, 2, 3]]
    values, at = apply("topk", [x], {"k": 2, "axis": 1, "largest": False})
    np.testing.assert_array_equal(at, np.argsort(x, 1, kind="stable")[:, :2])
    np.testing.assert_array_equal(values, np.sort(x, 1)[:, :2])


def test_makers() -> None:
    builder = GraphBuilder("range")
    made = builder.add("range", [builder.constant(v) for v in (2, 11, 3)])
    assert run(builder.finish({"y": made}), {})["y"].tolist() == [2, 5, 8]
    (hot,) = apply("one_hot", [np.array([0, -1, 2])], {"depth": 4, "dtype": "f32"})
    np.testing.assert_array_equal(hot, np.eye(4, dtype=np.float32)[[0, -1, 2]])
    builder = GraphBuilder("fill")
    filled = builder.add("fill", [], {"dims": (2, 3), "value": 2.5, "dtype": "f32"})
    assert (run(builder.finish({"y": filled}), {})["y"] == 2.5).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 4), (4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((4,), (4, 5)), ((2, 3, 4), (4,)), ((2, 7, 33), (33, 65))],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.float16])
def test_matmul(a: tuple[int, ...], b: tuple[int, ...], dtype: Any) -> None:
    x, w = ((floats(*shape) * 3).astype(dtype) for shape in (a, b))
    exact = np.matmul(x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(
        apply("matmul", [x, w])[0], exact, rtol=2e-3 if dtype == np.float16 else 1e-5, atol=1e-3
    )


@pytest.mark.parametrize("group", [1, 2])
def test_conv(group: int) -> None:
    x, w, bias = floats(2, 4, 6, 5), floats(6, 4 // group, 3, 2), floats(6)
    strides, pads, dilations = (2, 1), (1, 0, 2, 1), (1, 2)
    attrs = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
    (y,) = apply("conv", [x, w, bias], attrs)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2), (0, 1))).astype(np.float64)
    expected = np.zeros(y.shape)
    for f in range(6):
        channels = slice(f // (6 // group) * (4 // group), (f // (6 // group) + 1) * (4 // group))
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                patch = padded[:, channels, 2 * i : 2 * i + 3, j : j + 3 : 2]
                expected[:, f, i, j] = (patch * w[f]).sum((1, 2, 3)) + bias[f]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    x1, w1 = floats(1, 2, 9), floats(3, 2, 4)
    (y1,) = apply("conv", [x1, w1], {"strides": (2,), "pads": (0, 0), "dilations": (1,)})
    windows = np.lib.stride_tricks.sliding_window_view(x1, 4, 2)[:, :, ::2].astype(np.float64)
    np.testing.assert_allclose(y1, np.einsum("bcok,fck->bfo", windows, w1), rtol=1e-5, atol=1e-5)


def test_empty_arrays() -> None:
    none = np.zeros((2, 0, 3), np.float32)
    x = floats(2, 4, 3)
    np.testing.assert_array_equal(apply("concat", [none, x], {"axis": 1})[0], x)
    assert (apply("reduce", [none], {"kind": "sum", "axes": (1,)})[0] == 0).all()
