"""ONNX's own node test cases of the operators that a transformer may hold, by reference and by host kernels.

Inputs that steer shapes are stored in the file where the operator needs to know them. Expected outputs are
those of the ONNX package.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from mapper.driver import run
from mapper.errors import UnsupportedModelError
from mapper.frontend.load import load
from mapper.ir.reference import evaluate

Array = npt.NDArray[Any]
FAMILIES = (
    "attention_", "rotary_embedding", "rms_normalization", "layer_normalization", "tensorscatter", "swish",
    "swiglu", "gelu", "mish", "hardswish", "hardsigmoid", "elu", "selu", "celu", "prelu",
    "group_normalization",
    "instancenorm", "mvn", "l1normalization", "l2normalization", "batchnorm_e", "reduce_", "argmax", "argmin",
    "cumsum", "cumprod", "tril", "triu", "einsum", "quantizelinear", "dequantizelinear", 
    "matmulinteger",
    "qlinearmatmul", "onehot", "hardmax", "top_k", "scatter", "gather", "split_", "maxpool", "averagepool",
    "globalaveragepool", "globalmaxpool", "depthtospace", "spacetodepth", "bitwise", "where", "isinf",
    "isnan",
    "mod_", "acos", "asin", "atan", "sinh", "cosh", "edge_pad", "reflect_pad", "wrap_pad", "softmax_", "clip",
    "slice", "squeeze", "unsqueeze", "range_int",
)  # fmt: skip
REFUSED = re.compile(
    r"float4e2m1|_u?int2$|_expanded|split_to_sequence|maxpool_with_argmax|training_mode|top_k_uint64|"
    r"reduce_(max|min)_empty_set"  # of an empty tensor: the reference has no such maximum
)
NAMES = re.compile(rf"test_({'|'.join(FAMILIES)})")
RECURRENT = ("test_linear_attention_linear", "test_causal_conv_with_state_b1_c1_degenerate")


@cache
def cases() -> dict[str, Any]:
    """All node test cases by name."""
    with np.errstate(all="ignore"):
        return {c.name: c for c in collect_testcases(None) if c.model is not None}


def chosen() -> list[str]:
    """The cases that are run."""
    found = [n for n in cases() if NAMES.match(n) and not REFUSED.search(n)]
    oldest = 11
    return [n for n in found if all(o.version >= oldest or o.domain for o in cases()[n].model.opset_import)]


def array(value: Any) -> Array:
    """An expected or given tensor."""
    made = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
    return np.asarray(made)


def written(case: Any, folder: Path) -> Path:
    """The case as a file, its steering inputs stored."""
    model, inputs = onnx.ModelProto(), [array(a) for a in case.data_sets[0][0]]
    model.CopyFrom(case.model)
    del model.graph.input[:]
    for info, given in zip(case.model.graph.input, inputs, strict=False):
        steers = given.dtype.kind in "iu" and given.ndim <= 1 and info.name != case.model.graph.input[0].name
        known = info.name in ("axis", "depth") or case.name.startswith("test_range")
        if (steers and given.dtype == np.int64) or known:
            model.graph.initializer.append(numpy_helper.from_array(given, info.name))
        else:
            model.graph.input.append(info)
    path = folder / "m.onnx"
    onnx.save(model, path)
    return path


def differs(got: Array, want: Array, name: str) -> str:
    """What is wrong with one output; empty where nothing is."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype}{got.shape} for {want.dtype}{want.shape}"
    near = {"float16": 4e-3, "bfloat16": 4e-2}.get(want.dtype.name, 1e-4)
    a, b = (v.astype(np.float64) for v in (got, want))
    return "" if np.allclose(a, b, rtol=near, atol=near, equal_nan=True) else f"{name} differs"


@pytest.mark.parametrize("name", chosen())
def test_node_case(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    graph = load(written(case, tmp_path))
    inputs = {i.name: array(a) for i, a in zip(case.model.graph.input, case.data_sets[0][0], strict=False)}
    given = {k: v for k, v in inputs.items() if k in dict(graph.inputs)}
    small = any(v.dtype.name in ("int4", "uint4") for v in given.values())  # no host interface has them
    for made in (evaluate(graph, given), *([] if small else [run(graph, given)])):
        for info, want in zip(case.model.graph.output, case.data_sets[0][1], strict=True):
            assert not differs(made[info.name], array(want), info.name)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrence_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="recurrence is not supported"):
        load(written(cases()[name], tmp_path))
