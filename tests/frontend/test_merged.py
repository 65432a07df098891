"""Merged decoders: one file, two graphs, chosen by an input."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import mapper
from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.reference import evaluate
from tests.frontend import cached, decoders
from tests.frontend.tiny import oracle, saved, worst


@pytest.mark.parametrize("negated", [False, True])
def test_both_branches_run(negated: bool, tmp_path: Path) -> None:
    model, case = cached.merged(negated)
    graph = load(saved(model, tmp_path))
    for past, new in ((0, 4), (4, 3), (2, 1)):
        feeds = decoders.inputs(case, new, past)
        if not past:  # exporters feed a row of zeros that nothing reads
            feeds |= {n: a for n, a in decoders.inputs(case, 1, 1).items() if n.startswith("past")}
        want = oracle(model, feeds)
        assert worst(evaluate(graph, feeds), want) < 1e-5
        assert worst(mapper.run(graph, feeds), want) < 1e-5


def test_both_phases_are_described(tmp_path: Path) -> None:
    model, _ = cached.merged()
    record = inspect(load(saved(model, tmp_path)))
    assert record["kv_cache"]["merged"]
    assert record["inputs"]["use_cache"]["role"] == "use_cache"
    prefill, decode = record["phases"]["prefill"], record["phases"]["decode"]
    for phase in (record, prefill, decode):
        assert phase["layers"] == 2
        assert phase["primitives_left"] == {}
        assert phase["params"] == record["params"]
    assert decode["kv_cache"]["convention"] == "concat"
    assert prefill["kv_cache"]["convention"] == "none"
    made = [v["role"] for v in prefill["outputs"].values()]
    assert made == ["logits", "present.key.0", "present.key.1", "present.value.0", "present.value.1"]


def test_keys_that_are_outputs_as_well(tmp_path: Path) -> None:
    def attend(c: decoders.Case, i: int, q: str, k: str, v: str) -> str:
        c.out(v, f"new_v{i}")  # an equal view of what the scores read turned
        half = c.op("Slice", q, c.ints(0), c.ints(2), c.ints(1))
        scores = c.op("MatMul", half, c.op("Transpose", v, perm=[0, 1, 3, 2]))
        y = c.op("MatMul", c.op("Softmax", c.op("Mul", scores, c.const(0.3)), axis=-1), v)
        return c.op("Concat", y, y, axis=1)

    case = decoders.decoder(attend)
    graph = load(saved(case.model(), tmp_path))
    assert inspect(graph)["attention"][0]["layers"] == 2
    feeds = decoders.inputs(case)
    assert worst(evaluate(graph, feeds), oracle(case.model(), feeds)) < 1e-5


def test_branches_that_are_no_phases_are_refused(tmp_path: Path) -> None:
    model, _ = cached.merged(first=cached.growing("BHLD"))
    with pytest.raises(UnsupportedModelError, match=r"'split' \(If\).*depends on the data"):
        load(saved(model, tmp_path))


def test_an_output_that_is_an_input(tmp_path: Path) -> None:
    model, case = cached.merged()
    model.graph.node.append(helper.make_node("Identity", ["positions"], ["same"]))
    model.graph.output.append(helper.make_tensor_value_info("same", TensorProto.INT64, None))
    feeds = decoders.inputs(case)
    got = evaluate(load(saved(model, tmp_path)), feeds)
    assert worst(got, oracle(model, feeds)) < 1e-5


def test_an_if_inside_stays_refused(tmp_path: Path) -> None:
    model, _ = cached.merged()
    model.graph.output[0].name = "doubled"
    model.graph.node.append(helper.make_node("Add", ["logits", "logits"], ["doubled"]))
    with pytest.raises(UnsupportedModelError, match=r"'split' \(If\)"):
        load(saved(model, tmp_path))


def test_an_if_without_a_condition_is_an_error(tmp_path: Path) -> None:
    model, _ = cached.merged()
    del model.graph.node[-1].input[:]
    with pytest.raises(ModelError, match=r"'split' \(If\) lacks a condition"):
        load(saved(model, tmp_path))


def test_a_condition_made_from_data_stays_refused(tmp_path: Path) -> None:
    model, _ = cached.merged()
    nodes = [
        helper.make_node("ReduceMax", ["ids"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["any"], to=TensorProto.BOOL),
    ]
    chosen: onnx.NodeProto = model.graph.node[-1]
    chosen.input[0] = "any"
    del model.graph.node[:]
    model.graph.node.extend([*nodes, chosen])
    with pytest.raises(UnsupportedModelError, match=r"'split' \(If\).*depends on the data"):
        load(saved(model, tmp_path))


def test_encoder_decoder_with_caches_of_both_kinds(tmp_path: Path) -> None:
    model, case = cached.merged(first=cached.crossed(True), then=cached.crossed(False))
    graph = load(saved(model, tmp_path))
    for past, new in ((0, 4), (4, 1)):
        feeds = decoders.inputs(case, new, past)
        want = oracle(model, feeds)
        assert worst(evaluate(graph, feeds), want) < 1e-5
        assert worst(mapper.run(graph, feeds), want) < 1e-5
    phases = inspect(graph)["phases"]
    assert phases["decode"]["kv_cache"]["cross_tensors"] == 4
    made = {v["role"] for v in phases["prefill"]["outputs"].values()}
    assert made == {v["role"] for v in phases["decode"]["outputs"].values()}
