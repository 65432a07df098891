"""Every op has inference, reference semantics and a place in the README; both agree on shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper.errors import ModelError
from mapper.ir.builder import GraphBuilder
from mapper.ir.dialect import OPS, op_class
from mapper.ir.document import README, rewritten
from mapper.ir.graph import Graph
from mapper.ir.infer_rules import RULES
from mapper.ir.op import fields
from mapper.ir.reference import evaluate
from mapper.ir.reference_meanings import MEANINGS
from mapper.ir.types import TensorType, type_of
from mapper.ir.weights import WeightSymbol

Array = npt.NDArray[Any]
STRUCTURAL = {"weight", "graph", "output", "yield", "repeat"}
RNG = np.random.default_rng(5)


def one_op(
    name: str, operands: list[Array | None], attrs: dict[str, Any], weights: dict[str, Array] | None = None
) -> tuple[Graph, dict[str, Array], list[Array]]:
    """A graph of one op on inputs of the operands' types, the inputs, and the results by the reference."""
    b = GraphBuilder("one")
    for symbol, data in (weights or {}).items():
        b.weight(WeightSymbol.of(symbol, data))
    inputs = {f"x{i}": a for i, a in enumerate(operands) if a is not None}
    values = {n: b.input(n, type_of(a)) for n, a in inputs.items()}
    given = [None if a is None else values[f"x{i}"] for i, a in enumerate(operands)]
    made = b.add_op(name, given, attrs)
    graph = b.finish({f"y{i}": r for i, r in enumerate(made.results)})
    results = list(evaluate(graph, inputs).values())
    return graph, inputs, results


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*shape: int, low: int = 0, high: int = 3) -> Array:
    return RNG.integers(low, high, shape)


SHAPES = {
    "w": (6, 5), "t": (5, 6), "v5": (5,), "v6": (6,), "table": (7, 6), "rope": (2, 9, 3), "e": (3, 6, 4),
    "d": (3, 4, 6), "b4": (3, 4), "p": (3, 2, 6), "w6": (6, 6), "t3": (3, 6), "w10": (6, 10),
}  # fmt: skip
W = {name: f(*shape) for name, shape in SHAPES.items()}
UNARY = ["neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "atan"]
UNARY += ["tanh", "erf", "sigmoid", "softplus", "relu", "floor", "ceil", "round", "sign", "isnan", "isinf"]
BINARY = ["add", "sub", "mul", "div", "pow", "min", "max", "eq", "ne", "lt", "le", "gt", "ge", "mod"]

Case = tuple[str, list[Array | None], dict[str, Any]]


def many(names: list[str], operands: list[Array | None]) -> list[Case]:
    return [(name, operands, {}) for name in names]


def reduction(kind: str) -> Case:
    return "reduce", [f(2, 3, 4)], {"kind": kind, "axes": (0, -1), "keepdims": kind == "sum"}


CONV1 = {"strides": (2,), "pads": (1, 1), "dilations": (1,), "group": 2}
CONV2 = {"strides": (1, 2), "pads": (0, 1, 2, 0), "dilations": (2, 1)}
BACKWARDS = {"axes": (0, 1), "starts": (1, -1), "ends": (2**63 - 1, -(2**62)), "steps": (2, -1)}
CACHED_LATENT = {"weight": "w10", "nope_dim": 3, "scale": 0.3}
LATENT = {**CACHED_LATENT, "causal": True}
EXPERTS = {"act": "silu", "gate": "e", "up": "e", "down": "d", "up_bias": "b4"}
PACKED = {"act": "silu", "up": "d", "up_transposed": True, "down": "p", "packing": "halves"}
GROUPED = {"top_k": 2, "correction": "v6", "groups": 3, "top_groups": 2, "group_score": "top2"}
CASES: list[Case] = [
    *many(UNARY, [f(2, 3)]),
    *many(BINARY, [np.abs(f(2, 1, 3)) + 1, f(4, 1)]),
    *many(["and", "or", "xor"], [ints(2, 3) > 1, ints(3) > 0]),
    ("not", [ints(2, 3) > 1], {}),
    ("cast", [f(3)], {"dtype": "i32"}),
    ("select", [ints(3, 1) > 0, f(4), f(3, 1)], {}),
    ("constant", [], {}),
    ("load", [], {"weight": "w"}),
    ("reshape", [f(2, 6)], {"dims": (3, -1)}),
    ("squeeze", [f(2, 1, 3, 1)], {"axes": (1, -1)}),
    ("unsqueeze", [f(2, 3)], {"axes": (0, -1)}),
    ("transpose", [f(2, 3, 4)], {"perm": (2, 0, 1)}),
    ("expand", [f(3, 1)], {"dims": (2, 1, 4)}),
    ("concat", [f(2, 3), f(2, 1)], {"axis": -1}),
    ("split", [f(2, 5)], {"axis": 1, "sizes": (2, 3)}),
    ("slice", [f(5, 6)], BACKWARDS),
    ("gather", [f(4, 3), ints(2, 2)], {"axis": 1}),
    ("gather_elements", [f(4, 3), ints(2, 3)], {"axis": 0}),
    ("gather_nd", [f(2, 4, 3, 5), ints(2, 6, 2)], {"batch_dims": 1}),
    ("scatter_nd", [f(4, 3), ints(2, 1), f(2, 3)], {"reduction": "add"}),
    ("scatter_elements", [f(4, 3), ints(2, 3), f(2, 3)], {"axis": 0}),
    ("pad", [f(3, 4)], {"pads": (1, -1, 0, 2), "value": 7.0}),
    ("tile", [f(2, 3)], {"repeats": (2, 1)}),
    ("shape_of", [f(2, 3, 4)], {"start": -2}),
    ("fill", [], {"dims": (2, 3), "value": 4.0, "dtype": "i64"}),
    ("trilu", [f(4, 4)], {"upper": False, "k": -1}),
    ("one_hot", [ints(2, 3)], {"depth": 4, "dtype": "f32"}),
    ("matmul", [f(2, 1, 3, 4), f(5, 4, 6)], {}),
    ("conv", [f(2, 4, 9), f(6, 2, 3), f(6)], CONV1),
    ("conv", [f(1, 3, 8, 9), f(2, 3, 3, 2), None], CONV2),
    *[reduction(k) for k in ("sum", "mean", "max", "min", "prod", "sum_square", "l2", "l1", "log_sum_exp")],
    ("softmax", [f(2, 3)], {"axis": 0}),
    ("round_blocks", [f(2, 5)], {"block": 3}),
    ("softmax", [f(2, 3)], {"log": True}),
    ("cumsum", [f(2, 3)], {"axis": 1, "exclusive": True, "reverse": True}),
    ("argmax", [f(2, 3)], {"axis": 0, "keepdims": True}),
    ("topk", [f(2, 5)], {"k": 2, "axis": 1}),
    ("embed", [ints(2, 3)], {"table": "table"}),
    ("linear", [f(2, 3, 6)], {"weight": "t", "bias": "v5", "transposed": True}),
    ("lm_head", [f(2, 3, 6)], {"weight": "w"}),
    ("norm", [f(2, 6)], {"kind": "layer", "eps": 1e-5, "weight": "v6", "bias": "v6", "weight_offset": 1.0}),
    ("rope", [f(2, 4, 3, 8), f(2, 3, 6), f(2, 3, 6)], {"rotary_dim": 6, "style": "interleaved"}),
    ("attention", [f(2, 4, 3, 8), f(2, 2, 5, 8), f(2, 2, 5, 6), None, f(4)], {"scale": 0.3, "causal": True}),
    ("latent_attention", [f(2, 2, 3, 5), f(2, 1, 4, 6), f(2, 1, 4, 2)], LATENT),
    ("kv_append", [f(2, 2, 5, 8), f(2, 2, 3, 8)], {}),
    ("kv_update", [f(2, 2, 5, 8), f(2, 2, 3, 8), np.array([[1, 2, 3], [4, 0, 1]])], {}),
    ("activation", [f(2, 6)], {"kind": "gelu"}),
    ("mlp", [f(2, 6)], {"act": "relu", "up": "w", "down": "w", "down_transposed": True, "up_bias": "v5"}),
    ("gated_mlp", [f(2, 6)], {"act": "silu", "gate": "w", "up": "w", "down": "t"}),
    ("packed_mlp", [f(2, 6)], {"act": "silu", "gate_up": "w6", "down": "t3", "packing": "interleaved"}),
    ("route", [f(2, 3, 6)], GROUPED),
    ("moe", [f(2, 3, 6), ints(2, 3, 2), f(2, 3, 2)], EXPERTS),
    ("moe", [f(3, 6), ints(3, 2), f(3, 2)], PACKED),
    ("sample", [f(2, 3, 6)], {}),
    ("rope_at", [f(2, 4, 3, 8), np.array(5)], {"table": "rope", "rotary_dim": 6}),
    ("scale_at", [f(2, 3, 4, 8), np.array(1)], {"table": "v6", "axis": -3}),
    ("embed_at", [np.array(2)], {"table": "table", "batch": 2, "seq": 3, "offset": 1}),
    ("cache_append", [f(2, 2, 9, 8), f(2, 2, 3, 8), np.array(5)], {}),
    ("cached_attention", [f(2, 4, 3, 8), f(2, 2, 9, 8), f(2, 2, 9, 6), np.array(5)], {"scale": 0.3}),
    ("cached_latent_attention", [f(2, 2, 2, 5), f(2, 1, 9, 6), f(2, 1, 9, 2), np.array(5)], CACHED_LATENT),
]  # fmt: skip
DATA_DEPENDENT = {"nonzero", "range"}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_inferred_types_are_those_of_the_reference(case: Case) -> None:
    name, operands, attrs = case
    if name == "constant":
        b = GraphBuilder("one")
        graph = b.finish({"y0": b.constant(f(2, 3))})
        results = list(evaluate(graph, {}).values())
    else:
        graph, _, results = one_op(name, operands, attrs, W)
    assert [type_of(r) for r in results] == [t for _, t in graph.outputs]
    assert Graph.parse(graph.print()).print() == graph.print()


def test_every_op_is_covered() -> None:
    assert {c[0] for c in CASES} == set(OPS) - STRUCTURAL - DATA_DEPENDENT
    assert set(MEANINGS) == set(OPS) - STRUCTURAL
    typed = {n for n, cls in OPS.items() if any(c in RULES for c in cls.__mro__)}
    assert typed == set(OPS) - STRUCTURAL - {"constant"}


def test_data_dependent_shapes_get_fresh_symbols() -> None:
    graph, _, (found,) = one_op("nonzero", [np.array([[0, 3], [5, 0]])], {})
    assert found.tolist() == [[0, 1], [1, 0]]
    assert str(graph.outputs[0][1]) == "i64[2 x '?0']"
    b = GraphBuilder("r")
    n = b.add(
        "squeeze",
        [b.add("shape_of", [b.input("x", TensorType.of(["n", 2], "f32"))], {"end": 1})],
        {"axes": (0,)},
    )
    graph = b.finish({"y": b.add("range", [b.constant(1), n, b.constant(2)])})
    assert (
        str(graph.outputs[0][1]) == "i64[n//2]" or str(graph.outputs[0][1].shape[0].evaluate({"n": 6})) == "3"
    )
    assert evaluate(graph, {"x": np.zeros((6, 2), np.float32)})["y"].tolist() == [1, 3, 5]


def test_readme_table_is_up_to_date() -> None:
    text = README.read_text()
    assert rewritten(text) == text, "run python -m mapper.ir.document"


def test_every_op_says_what_it_means() -> None:
    assert all(cls.__doc__ and vars(cls).get("__doc__") for cls in OPS.values())


@pytest.mark.parametrize(
    ("name", "operands", "attrs", "why"),
    [
        ("add", [f(2, 3), f(4)], {}, "do not broadcast"),
        ("add", [f(2), ints(2)], {}, "operand types differ"),
        ("matmul", [f(2, 3), f(4, 5)], {}, "inner dimensions differ"),
        ("linear", [f(2, 5)], {"weight": "w"}, "inner dimensions differ"),
        ("linear", [f(2, 6)], {"weight": "nowhere"}, "no weight is called"),
        ("linear", [f(2, 6)], {"weight": "w", "bias": "v6"}, "another length"),
        ("norm", [f(2, 6)], {"kind": "batch", "eps": 1e-5}, "none of rms, layer"),
        ("norm", [f(2, 6)], {"kind": "rms"}, "attribute eps is missing"),
        ("neg", [f(2)], {"eps": 1}, "has no attribute eps"),
        ("neg", [f(2), f(2)], {}, "operands too many"),
        ("add", [f(2)], {}, "operand b must be one value"),
        ("reshape", [f(2, 6)], {"dims": (5, -1)}, "elements"),
        ("reshape", [f(2, 6)], {"dims": (5, 2)}, "12 elements into 10"),
        ("transpose", [f(2, 6)], {"perm": (0, 0)}, "perm"),
        (
            "attention",
            [f(1, 3, 2, 4), f(1, 2, 2, 4), f(1, 2, 2, 4)],
            {"scale": 1.0},
            "2 key/value heads for 3",
        ),
        ("softmax", [f(2)], {"axis": 5}, "axis"),
    ],
)
def test_misfits_are_model_errors(
    name: str, operands: list[Array | None], attrs: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        one_op(name, operands, attrs, W)


def test_attributes_are_python_values() -> None:
    b = GraphBuilder("attrs")
    b.weight(WeightSymbol.of("g", np.ones(6, np.float32)))
    x = b.input("x", TensorType.of(["n", 6], "f32"))
    made = b.add_op("norm", [x], {"kind": "rms", "eps": 9.999999974752427e-07, "weight": "g"}, node="/n")
    assert made.attr("eps") == 9.999999974752427e-07
    assert made.attrs() == {
        "kind": "rms",
        "eps": 9.999999974752427e-07,
        "weight": "g",
        "bias": None,
        "weight_offset": 0.0,
    }
    assert made.weights() == {"weight": "g"}
    assert made.node == "/n" and made.mnemonic == "norm"
    with pytest.raises(ModelError, match="has no attribute"):
        made.attr("epsilon")
    for name in OPS:
        assert fields(op_class(name)) is not None
    with pytest.raises(ModelError, match="no dataflow op"):
        op_class("quux")
