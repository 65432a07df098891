"""Every convention of the key-value cache: same numbers as onnxruntime, recognised, and named."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import mapper
from mapper.errors import UnsupportedModelError
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.reference import evaluate
from tests.frontend import cached, decoders
from tests.frontend.test_variants import renamed, shuffle, structure
from tests.frontend.tiny import HEAD, KV, oracle, saved, worst

STACKED = {
    "2BHLD": (cached.layer_stack, ["past.kv.0", "past.kv.1"]),
    "N2BHLD": (cached.full_stack(False), ["past.kv"]),
    "NBHLD": (cached.full_stack(True), ["past.key", "past.value"]),
}
PAIRS = ["past.key.0", "past.key.1", "past.value.0", "past.value.1"]


def compared(
    case: decoders.Case, folder: Path, *sizes: dict[str, int], tolerance: float = 1e-5
) -> dict[str, Any]:
    """The inspection of a case, whose graph computes what onnxruntime does, recognised or not."""
    model = case.model()
    path = saved(model, folder)
    graph, plain = load(path), load(path, recognise=False)
    for given in sizes or ({}, {"new": 1, "past": 6}, {"new": 4, "past": 0, "batch": 1}):
        feeds = decoders.inputs(case, **given)
        want = oracle(model, feeds)
        assert worst(evaluate(graph, feeds), want) < tolerance
        assert worst(evaluate(plain, feeds), want) < tolerance
    assert worst(mapper.run(graph, feeds), want) < tolerance
    return inspect(graph)


def roles(record: dict[str, Any], prefix: str = "past") -> list[str]:
    """The roles of inputs (or outputs) that start so."""
    place = "inputs" if prefix == "past" else "outputs"
    return sorted(v["role"] for v in record[place].values() if v["role"].startswith(prefix))


def recognised(record: dict[str, Any], mask: str = "causal") -> bool:
    """Whether all attention is recognised and nothing is left."""
    return record["primitives_left"] == {} and [m["mask"] for m in record["masks"]] == [mask]


@pytest.mark.parametrize("layout", cached.PERMS)
def test_growing_caches_of_any_layout(layout: str, tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.growing(layout)), tmp_path)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert roles(record, "present") == [p.replace("past", "present") for p in PAIRS]
    assert record["kv_cache"]["convention"] == "concat"
    assert record["kv_cache"]["layout"] == layout


def test_heads_stored_in_the_batch(tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.merged_heads), tmp_path)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert record["kv_cache"]["layout"] == "(BH)DL/(BH)LD"


@pytest.mark.parametrize("written", [False, True])
def test_heads_stored_in_the_rows(written: bool, tmp_path: Path) -> None:
    case = decoders.decoder(cached.flat_rows(1, written), opset=24 if written else 18)
    record = compared(case, tmp_path)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert record["kv_cache"]["layout"] == "BL(HD)"


@pytest.mark.parametrize("layout", STACKED)
def test_stacked_caches(layout: str, tmp_path: Path) -> None:
    attend, expected = STACKED[layout]
    record = compared(decoders.decoder(attend), tmp_path)
    assert recognised(record)
    assert roles(record) == expected
    found = record["kv_cache"]
    assert (found["convention"], found["layout"], found["tensors"]) == ("stacked", layout, len(expected))


def test_stacks_of_packed_attention(tmp_path: Path) -> None:
    record = compared(decoders.packed(), tmp_path)
    assert recognised(record)
    assert roles(record) == ["past.kv.0", "past.kv.1"]
    assert record["inputs"]["packed_mask"]["role"] == "attention_mask"
    assert record["kv_cache"]["layout"] == "2BHLD"
    assert record["kv_cache"]["operator"] == "Attention"


def test_half_precision_caches(tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.half), tmp_path, tolerance=1e-3)
    assert recognised(record)
    assert roles(record) == PAIRS


def test_beams_are_chosen_before_the_append(tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.beams), tmp_path)
    assert roles(record) == PAIRS
    assert record["inputs"]["beams"]["role"] == "beam_index"


def test_rolling_caches(tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.rolling), tmp_path)
    assert roles(record) == PAIRS
    assert record["kv_cache"]["convention"] == "rolling"


@pytest.mark.parametrize("kind", ["ScatterND", "ScatterElements"])
def test_static_caches(kind: str, tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.static(kind)), tmp_path)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert record["inputs"]["rows"]["role"] == "cache_position"
    assert record["kv_cache"]["convention"] == "static"


def test_a_counter_says_where_rows_go(tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.counter, positions=False), tmp_path)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert record["inputs"]["counter"]["role"] == "write_index"
    assert len(record["rope"]) == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter_caches(mode: str, fused: bool, tmp_path: Path) -> None:
    case = decoders.decoder(cached.tensor_scatter(mode, fused), opset=24)
    record = compared(case, tmp_path)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert record["inputs"]["starts"]["role"] == "write_index"
    assert record["inputs"].get("lengths", {"role": "total_length"})["role"] == "total_length"
    assert record["kv_cache"]["convention"] == "tensor_scatter"


def test_each_sequence_has_its_own_length(tmp_path: Path) -> None:
    case = decoders.decoder(cached.tensor_scatter("linear", True), opset=24)
    path = saved(case.model(), tmp_path)
    feeds = decoders.inputs(case)
    feeds["starts"][:], feeds["lengths"][:] = [4, 2], [7, 5]
    want = oracle(case.model(), feeds)
    graph = load(path)
    assert worst(evaluate(graph, feeds), want) < 1e-5
    assert worst(mapper.run(graph, feeds), want) < 1e-5


def test_rows_wrap_around(tmp_path: Path) -> None:
    case = decoders.decoder(cached.tensor_scatter("circular", False), opset=24)
    path = saved(case.model(), tmp_path)
    feeds = decoders.inputs(case)
    feeds["starts"][:] = [10, 11]
    assert worst(evaluate(load(path), feeds), oracle(case.model(), feeds)) < 1e-5
    assert np.ptp(feeds["starts"]) == 1


@pytest.mark.parametrize("kind", ["MultiHeadAttention", "DecoderMaskedMultiHeadAttention"])
def test_buffers_of_fused_attention(kind: str, tmp_path: Path) -> None:
    one = kind.startswith("Decoder")
    sizes = [{"new": 1 if one else n, "past": p} for n, p in ((3, 4), (1, 7), (2, 0))]
    record = compared(decoders.decoder(cached.buffered(kind)), tmp_path, *sizes)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert record["inputs"]["used"]["role"] == "write_index"
    assert record["kv_cache"]["convention"] == "shared_buffer"
    assert record["kv_cache"]["operator"] == kind


LENGTHS = ["mask", "inputs"]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_grouped_attention_takes_caches_that_grow_and_buffers(lengths: str, tmp_path: Path) -> None:
    case = decoders.decoder(cached.grouped(lengths))
    sizes: list[dict[str, int]] = [{"batch": 1}, {"new": 1, "past": 6}, {"new": 4, "past": 0}]
    record = compared(case, tmp_path, *sizes)
    assert recognised(record)
    assert roles(record) == PAIRS
    assert record["kv_cache"]["convention"] == "concat"
    assert record["kv_cache"]["operator"] == "GroupQueryAttention"
    model, graph = case.model(), load(tmp_path / "model.onnx")
    for given in sizes:
        feeds = _in_a_buffer(decoders.inputs(case, **given))
        want = oracle(model, feeds)
        assert worst(evaluate(graph, feeds), want) < 1e-5
        assert worst(mapper.run(graph, feeds), want) < 1e-5


def _in_a_buffer(feeds: dict[str, Any]) -> dict[str, Any]:
    """The inputs with caches of more rows than are used, noise behind the past."""
    rng = np.random.default_rng(3)
    longer = {}
    for name, array in feeds.items():
        if array.ndim == 4:
            rest = rng.standard_normal((*array.shape[:2], decoders.ROOM - array.shape[2], array.shape[3]))
            longer[name] = np.concatenate([array, rest.astype(array.dtype)], axis=2)
    return feeds | longer


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sequences_of_unequal_length_in_grouped_attention(lengths: str, buffer: bool, tmp_path: Path) -> None:
    case = decoders.decoder(cached.grouped(lengths))
    model = case.model()
    graph = load(saved(model, tmp_path))
    feeds = decoders.inputs(case, new=1, past=6)
    if lengths == "mask":
        feeds["tokens"][1, :2] = 0
    else:
        feeds["last"][1] -= 2
    feeds = _in_a_buffer(feeds) if buffer else feeds
    want = oracle(model, feeds)
    assert worst(evaluate(graph, feeds), want) < 1e-5
    assert worst(mapper.run(graph, feeds), want) < 1e-5


def test_shapes_that_declare_a_buffer(tmp_path: Path) -> None:
    case = decoders.decoder(cached.grouped("inputs", rows="M"))
    model = case.model()
    for value in model.graph.output[1:]:
        value.CopyFrom(helper.make_tensor_value_info(value.name, decoders.FLOAT, ["B", 2, "M", 8]))
    record = inspect(load(saved(model, tmp_path)))
    assert recognised(record)
    assert record["kv_cache"]["convention"] == "shared_buffer"
    assert record["inputs"]["last"]["role"] == "last_index"
    assert record["inputs"]["past_k0"]["shape"] == ["batch", 2, "capacity", 8]


def test_a_cache_indirection_is_refused(tmp_path: Path) -> None:
    case = decoders.decoder(cached.buffered("DecoderMaskedMultiHeadAttention"))
    case.given("beam", TensorProto.INT32, 1)
    case.given("indirection", TensorProto.INT32, "B", 1, "M")
    node = next(n for n in case.nodes if n.op_type.startswith("DecoderMasked"))
    node.input.extend(["beam", "indirection"])
    with pytest.raises(UnsupportedModelError, match=r"DecoderMasked.*cache indirection"):
        load(saved(case.model(), tmp_path))


def _turned_flat(c: decoders.Case, i: int, q: str, k: str, v: str) -> str:
    """Keys turned while batch and heads are one axis, as older opsets spell fused attention."""
    del q, v
    joined = c.op("Concat", c.given(f"past_k{i}", decoders.FLOAT, "B", KV, "P", HEAD), k, axis=2)
    whole = c.out(joined, f"new_k{i}")
    total = c.op("Shape", whole, start=2, end=3)
    flat = c.op("Reshape", whole, c.op("Concat", c.ints(-1), total, c.ints(HEAD), axis=0))
    turned = c.op("Transpose", flat, perm=[0, 2, 1])
    back = c.op("Reshape", turned, c.op("Concat", c.ints(-1, KV, HEAD), total, axis=0))
    hidden = decoders.future(c, whole)
    scores = c.op("Where", hidden, c.const(-1e30), c.op("Mul", c.op("MatMul", k, back), c.const(0.2)))
    y = c.op("MatMul", c.op("Softmax", scores, axis=-1), whole)
    return c.op("Concat", y, y, axis=1)


def test_keys_turned_with_batch_and_heads_in_one_axis(tmp_path: Path) -> None:
    record = compared(decoders.decoder(_turned_flat), tmp_path)
    assert recognised(record)


CROSS = ["cross_key.0", "cross_key.1", "cross_value.0", "cross_value.1"]


def test_keys_of_the_encoder_are_given(tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.crossed(False)), tmp_path, {}, {"new": 1, "past": 6})
    assert record["primitives_left"] == {}
    assert roles(record) == sorted([*(f"past.{c}" for c in CROSS), *PAIRS])
    assert roles(record, "present") == sorted(f"present.{c.removeprefix('past.')}" for c in [*CROSS, *PAIRS])
    assert record["kv_cache"]["cross_tensors"] == record["kv_cache"]["tensors"] == 4
    assert record["inputs"]["encoder_mask"]["role"] == "encoder_mask"


def test_keys_of_the_encoder_are_made(tmp_path: Path) -> None:
    record = compared(decoders.decoder(cached.crossed(True)), tmp_path, {"past": 0}, {"new": 5, "past": 0})
    assert record["primitives_left"] == {}
    assert record["inputs"]["encoder"]["role"] == "encoder_states"
    assert roles(record, "present") == sorted(f"present.{c.removeprefix('past.')}" for c in [*CROSS, *PAIRS])


CONVENTIONS = {
    **{layout: cached.growing(layout) for layout in cached.PERMS},
    "heads in the batch": cached.merged_heads,
    "heads in the rows": cached.flat_rows(-2),
    "stack of a layer": cached.layer_stack,
    "stack of all": cached.full_stack(False, 3),
    "stacks of keys and of values": cached.full_stack(True, 3),
    "half": cached.half,
    "beams": cached.beams,
    "rolling": cached.rolling,
    "static": cached.static("ScatterND"),
    "scatter elements": cached.static("ScatterElements"),
    "scatter": cached.tensor_scatter("circular", True),
    "grouped": cached.grouped("inputs"),
    "buffer": cached.buffered("MultiHeadAttention"),
    "crossed": cached.crossed(False),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_names_and_order_do_not_matter(name: str, tmp_path: Path) -> None:
    case = decoders.decoder(CONVENTIONS[name], opset=24 if name == "scatter" else 18, layers=3)
    model, rng = case.model(), random.Random(name)
    feeds = decoders.inputs(case)
    if name == "grouped":
        feeds = decoders.inputs(case, new=1, past=6)
    want = oracle(model, feeds)
    original = load(saved(model, tmp_path))
    new = renamed(model, rng)
    shuffle(model.graph.node, rng)
    for values in (model.graph.input, model.graph.output):
        shuffled = rng.sample(list(values), len(values))
        del values[:]
        values.extend(shuffled)
    graph = load(saved(model, tmp_path, "variant.onnx"))
    assert structure(inspect(graph)) == structure(inspect(original))
    roles = original.roles["inputs"] | original.roles["outputs"]
    assert {new[k]: v for k, v in roles.items()} == graph.roles["inputs"] | graph.roles["outputs"]
    got = evaluate(graph, {new[k]: v for k, v in feeds.items()})
    tolerance = 1e-3 if name == "half" else 1e-5
    assert worst({k: got[new[k]] for k in want}, want) < tolerance


def _reversed(c: decoders.Case, i: int, q: str, k: str, v: str) -> str:
    """New rows before the past."""
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", decoders.FLOAT, "B", KV, "P", HEAD)
        whole.append(c.out(c.op("Concat", new, past, axis=2), f"new_{n}{i}"))
    return decoders.scores(c, q, whole, decoders.future(c, whole[0]))


def _by_head(c: decoders.Case, i: int, q: str, k: str, v: str) -> str:
    """Rows that differ from head to head."""
    rows = c.op("Reshape", c.given("rows", decoders.INT, "S"), c.ints(1, 1, -1, 1))
    rows = c.op(
        "Mod", c.op("Add", rows, c.const(np.arange(2).reshape(1, 2, 1, 1), np.int64)), c.ints(decoders.ROOM)
    )
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", decoders.FLOAT, "B", KV, decoders.ROOM, HEAD)
        index = c.op("Expand", rows, c.op("Shape", new))
        whole.append(c.out(c.op("ScatterElements", past, index, new, axis=2), f"new_{n}{i}"))
    return decoders.scores(c, q, whole, decoders.later(c, "rows"))


def _added(c: decoders.Case, i: int, q: str, k: str, v: str) -> str:
    """New rows added to those that are there."""
    whole = []
    rows = c.op("Reshape", c.given("rows", decoders.INT, "S"), c.ints(1, 1, -1, 1))
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", decoders.FLOAT, "B", KV, decoders.ROOM, HEAD)
        index = c.op("Expand", rows, c.op("Shape", new))
        made = c.op("ScatterElements", past, index, new, axis=2, reduction="add")
        whole.append(c.out(made, f"new_{n}{i}"))
    return decoders.scores(c, q, whole, decoders.later(c, "rows"))


@pytest.mark.parametrize("attend", [_reversed, _by_head, _added])
def test_near_misses_stay_primitives(attend: decoders.Attend, tmp_path: Path) -> None:
    record = compared(decoders.decoder(attend), tmp_path)
    graph = load(tmp_path / "model.onnx")
    assert not {op.mnemonic for op in graph.ops()} & {"kv_append", "kv_update"}
    assert record["kv_cache"]["convention"] == "none"
