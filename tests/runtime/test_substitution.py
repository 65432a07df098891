"""onnxruntime with other weights than the file's: as if a file with those weights had been written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

from mapper import driver, execution
from mapper.errors import SubstitutionError
from mapper.frontend.load import load
from mapper.passes.quantise import Quantise
from mapper.runtime.deviation import Deviation
from mapper.runtime.inputs import interface
from mapper.runtime.oracle import Oracle, Substitute, oracle, substituted

Array = npt.NDArray[Any]
CACHES = {(kind, layer): (1, 4, 16, 32) for layer in range(4) for kind in ("key", "value")}
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.MatMul.weight"
IDS = np.arange(100, 106)[None]


@pytest.fixture(scope="module")
def plain(example_model: Path) -> Oracle:
    return oracle(example_model, interface(load(example_model).roles), CACHES)


def inline(model: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The model with its weights inside, changed, in a folder of its own."""
    proto = onnx.load(str(model))
    for tensor in proto.graph.initializer:
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    change(proto)
    path = folder / "changed.onnx"
    onnx.save(proto, str(path))
    return path


def test_it_is_as_if_the_file_had_other_weights(example_model: Path, plain: Oracle, tmp_path: Path) -> None:
    """The embedding is looked up with its own values and multiplied by others."""
    made = Quantise("int4").apply(load(example_model))
    found = execution.substitutes(made)
    assert {n for n, one in found.items() if one.looked_up} == {EMBEDDING}
    arrays = {name: np.ascontiguousarray(one.load(), np.float32) for name, one in found.items()}

    def change(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.name in arrays and tensor.name != EMBEDDING:
                tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
        proto.graph.initializer.append(numpy_helper.from_array(arrays[EMBEDDING], "head"))
        (turn,) = [n for n in proto.graph.node if EMBEDDING in n.input and n.op_type == "Transpose"]
        turn.input[0] = "head"

    other = oracle(inline(example_model, tmp_path, change), plain.model, CACHES)
    with substituted(example_model, plain, found, "int4 weights") as beside:
        assert beside.name.endswith(" on int4 weights")
        assert beside.sha256 == plain.sha256
        got, caches = beside.step(IDS, 0, {})
        want, wanted = other.step(IDS, 0, {})
        again, _ = beside.step(IDS[:, :1], 6, caches)
        later, _ = other.step(IDS[:, :1], 6, wanted)
    largest = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(again, later, rtol=0, atol=1e-5 * largest)
    assert np.abs(want - plain.step(IDS, 0, {})[0]).max() > 1e-2 * largest


def test_nothing_is_left_behind(
    example_model: Path, plain: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {p: p.read_bytes() for p in example_model.parent.glob("tiny-llama*")}
    found = execution.substitutes(Quantise("int8").apply(load(example_model)))
    with substituted(example_model, plain, found, "int8 weights") as beside:
        beside.step(IDS, 0, {})
        with pytest.raises(ZeroDivisionError), substituted(example_model, plain, found, ""):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert {p: p.read_bytes() for p in before} == before


def test_weights_inside_the_model_file(example_model: Path, tmp_path: Path) -> None:
    model = inline(example_model, tmp_path, lambda _: None)
    driver.compile(model, "host", prompt=4, context=8, weights="int4", out=tmp_path / "out")
    found = driver.verify(tmp_path / "out", tokens=2)
    assert found.ok, found.failures
    assert found.oracle.endswith("on int4 weights")


def test_a_product_of_no_initializer_is_compared_with_the_reference(
    example_model: Path, tmp_path: Path
) -> None:
    def change(proto: onnx.ModelProto) -> None:
        (tensor,) = [t for t in proto.graph.initializer if t.name == QUERY]
        constant = helper.make_node("Constant", [], [QUERY], "constant_q", value=tensor)
        proto.graph.initializer.remove(tensor)
        proto.graph.node.insert(0, constant)

    model = inline(example_model, tmp_path, change)
    driver.compile(model, "host", prompt=4, context=8, weights="int4", out=tmp_path / "out")
    found = driver.verify(tmp_path / "out", tokens=2)
    assert found.ok, found.failures
    assert found.oracle.startswith("the graph's reference semantics in float64 (weight ")
    assert "is no initializer of the model file" in found.oracle
    assert found.max_rel_err < 2e-4
    assert found.against_original is not None
    assert found.against_original.relative_rms > 1e-3


@pytest.mark.parametrize(
    ("name", "one", "says"),
    [
        ("none", {"shape": (256, 256)}, "no initializer"),
        (QUERY, {"shape": (256, 128)}, "no initializer"),
        (QUERY, {"shape": (256, 256), "offset": 64}, "lies elsewhere"),
        (QUERY, {"shape": (256, 256), "file": "other.bin"}, "lies elsewhere"),
    ],
)
def test_what_is_not_in_the_file_is_named(
    name: str, one: dict[str, Any], says: str, example_model: Path, plain: Oracle
) -> None:
    place = load(example_model).weights[QUERY]
    given = {"file": place.file, "offset": place.offset, "load": lambda: np.zeros(one["shape"])} | one
    with pytest.raises(SubstitutionError, match=f"weight '{name}' .*{says}"):  # noqa: SIM117
        with substituted(example_model, plain, {name: Substitute(**given)}, ""):
            pass


def test_a_look_up_behind_the_same_view_is_refused(example_model: Path, tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            node.input[:] = ["table" if i == EMBEDDING else i for i in node.input]
        proto.graph.node.insert(0, helper.make_node("Identity", [EMBEDDING], ["table"], "view"))

    model = inline(example_model, tmp_path, change)
    graph = load(model)
    beside = oracle(model, interface(graph.roles), CACHES)
    found = execution.substitutes(Quantise("int4").apply(graph))
    assert found[EMBEDDING].looked_up
    with pytest.raises(SubstitutionError, match="behind one Identity"):  # noqa: SIM117
        with substituted(model, beside, found, ""):
            pass


class Fixed:
    """An original that gives the logits it was made with, one after the other."""

    name = "fixed"
    sha256 = ""

    def __init__(self, *logits: Array) -> None:
        self.logits = list(logits)

    def step(self, ids: Array, past: int, caches: Any) -> Any:
        return self.logits.pop(0), {("key", 0): np.full(1, past + ids.shape[1])}


def test_the_deviation_is_numpys() -> None:
    r = np.random.default_rng(0)
    wanted = [r.standard_normal((2, n, 9)) for n in (4, 1, 1)]
    got = [w + 0.1 * r.standard_normal(w.shape) for w in wanted]
    got[1][0, 0] = -wanted[1][0, 0]  # another token
    found = Deviation(Fixed(*wanted), {})
    for past, one in zip((0, 4, 5), got, strict=True):
        found.add(np.zeros(one.shape[:2], np.int64), past, one)
    record = found.record()
    flat = [np.concatenate([a.ravel() for a in arrays]) for arrays in (got, wanted)]
    assert record["relative_rms"] == pytest.approx(
        np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
    )
    worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, wanted, strict=True))
    assert record["max_relative"] == pytest.approx(worst)
    differing = sum(
        int(a[i, -1].argmax() != b[i, -1].argmax()) for a, b in zip(got, wanted, strict=True) for i in (0, 1)
    )
    assert differing >= 1
    assert (record["tokens"], record["tokens_differing"], record["tokens_equal"]) == (6, differing, False)
    assert found.caches["key", 0].tolist() == [6]
