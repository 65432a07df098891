"""Recognition by meaning: spellings are found, near-misses are not, both compute what onnxruntime does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from tests.frontend.tiny import (
    HEAD,
    HEADS,
    INNER,
    KV,
    LOW,
    VOCAB,
    WIDTH,
    Options,
    decoder,
    feeds,
    oracle,
    saved,
    worst,
)

TOLERANCE = 1e-4


def checked(options: Options, folder: Path) -> Graph:
    """The loaded model, after comparing it with onnxruntime with and without cached tokens."""
    model = decoder(options)
    graph = load(saved(model, folder))
    for new, past in ((3, 4), (5, 0), (1, 6)):
        inputs = feeds(options.layers, 2, new, past)
        assert worst(evaluate(graph, inputs), oracle(model, inputs)) < TOLERANCE
    return graph


def count(graph: Graph) -> Counter[str]:
    """How often each op runs."""
    out: Counter[str] = Counter()
    for section in graph.sections():
        for op in section.ops:
            out[op.mnemonic] += section.count
    return out


SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved": {"rope": "interleaved"},
    "partial": {"partial": True},
    "scale on the query": {"scale": "query"},
    "scale on both": {"scale": "both"},
    "scale by division": {"scale": "divide"},
    "mask by where": {"mask": "where"},
    "layer norm": {"norm": "layer"},
    "layer norm by division": {"norm": "layer", "norm_form": "div"},
    "square by multiplication": {"norm_form": "mul"},
    "norm by division": {"norm_form": "div"},
    "one plus weight": {"weight_offset": True},
    "tied": {"tied": True},
    "rotation before the heads are transposed": {"tokens_first": True},
    "interleaved rotation of a part before the heads are transposed": {
        "tokens_first": True,
        "rope": "interleaved",
        "partial": True,
    },
    "scores clamped at the mask": {"mask": "add", "clamp": LOW},
    "scaled residuals": {"residual": "scaled"},
    "layer scale": {"residual": "layer_scale"},
    "gelu": {"act": "gelu"},
    "gelu_tanh": {"act": "gelu_tanh"},
    "relu, plain MLP": {"act": "relu", "gated": False},
    "gelu, plain MLP": {"act": "gelu", "gated": False},
}


@pytest.mark.parametrize("changes", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_is_recognised(changes: dict[str, Any], tmp_path: Path) -> None:
    options = Options(**changes)
    found = inspect(checked(options, tmp_path))
    assert found["primitives_left"] == {}
    assert found["recognised_fraction"] == 1.0
    assert (found["layers"], found["distinct_layers"]) == (2, 1)
    assert (found["hidden"], found["vocab"]) == (WIDTH, VOCAB)
    assert (found["heads"], found["kv_heads"], found["head_dim"]) == (HEADS, KV, HEAD)
    assert found["masks"] == [{"mask": "causal", "window": 0, "layers": 2}]
    width = HEAD // 2 if options.partial else HEAD
    style = {
        "style": options.rope,
        "rotary_dim": width,
        "theta": 10000.0,
        "factor": 1.0,
        "scaling": "none",
        "stretch": 1.0,
        "layers": 4,
    }
    assert found["rope"] == [style]
    offset = 1.0 if options.weight_offset else 0.0
    assert found["norms"] == [{"kind": options.norm, "eps": 1e-5, "weight_offset": offset, "layers": 5}]
    op = "gated_mlp" if options.gated else "mlp"
    assert found["mlp"] == [{"op": op, "act": options.act, "inner": INNER, "layers": 2}]
    assert found["tied_embeddings"] is options.tied
    assert found["attention"][0]["scale"] == pytest.approx(HEAD**-0.5, rel=1e-6)


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "rope without the negation": ({"negate": False}, "rope"),
    "interleaved rope without the negation": ({"negate": False, "rope": "interleaved"}, "rope"),
    "rope of [B, S, H, D] without the negation": ({"negate": False, "tokens_first": True}, "rope"),
    "cosine and sine swapped": ({"swapped": True}, "rope"),
    "softmax over another axis": ({"softmax_axis": 2}, "attention"),
    "scores clamped among the scores": ({"mask": "add", "clamp": -0.1}, "attention"),
    "a scale per head": ({"uneven_scale": True}, "attention"),
    "maximum instead of mean": ({"norm_reduce": "ReduceMax"}, "norm"),
    "sum instead of mean": ({"norm_reduce": "ReduceSum"}, "norm"),
    "mean over another axis": ({"norm_axis": 1}, "norm"),
    "another width of gelu": ({"act": "gelu", "act_factor": 1.05}, "gated_mlp"),
    "another cubic term": ({"act": "gelu_tanh", "act_factor": 1.05}, "gated_mlp"),
    "another sigmoid slope": ({"act_factor": 1.3}, "gated_mlp"),
}


@pytest.mark.parametrize(("changes", "absent"), NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_near_misses_stay_primitives(changes: dict[str, Any], absent: str, tmp_path: Path) -> None:
    graph = checked(Options(**changes), tmp_path)
    assert inspect(graph)["recognised_fraction"] < 1.0
    found = count(graph)
    assert found[absent] == 0
    others = {"rope": 4, "attention": 2, "norm": 5, "gated_mlp": 2}
    assert {k: found[k] for k in others if k != absent} == {k: v for k, v in others.items() if k != absent}


def test_a_bias_per_head_and_key_before_a_selected_mask(tmp_path: Path) -> None:
    graph = checked(Options(mask="where", alibi=True), tmp_path)
    assert count(graph)["attention"] == 2
    assert inspect(graph)["masks"] == [{"mask": "causal+alibi", "window": 0, "layers": 2}]


def test_a_scale_of_residuals_is_stated(tmp_path: Path) -> None:
    assert inspect(checked(Options(residual="scaled"), tmp_path))["ends"] == {"residual_scale": 0.5}


def test_a_symmetric_clip_of_projections_is_stated(tmp_path: Path) -> None:
    found = inspect(checked(Options(clip=(-0.5, 0.5)), tmp_path))
    assert (found["ends"], found["primitives_left"]) == ({"projection_clip": 0.5}, {})
    assert inspect(checked(Options(clip=(-0.5, 0.7)), tmp_path))["primitives_left"] == {"max": 2, "min": 2}


def test_weights_per_head_of_normalised_queries_are_accounted_for(tmp_path: Path) -> None:
    found = inspect(checked(Options(head_weight=True), tmp_path))
    assert found["primitives_left"] == {}
    assert sum(norm["layers"] for norm in found["norms"]) == 7


def test_without_recognition_there_are_primitives_alone(tmp_path: Path) -> None:
    model = decoder()
    graph = load(saved(model, tmp_path), recognise=False)
    assert not {"linear", "norm", "rope", "attention", "embed", "repeat"} & set(count(graph))
    inputs = feeds()
    assert worst(evaluate(graph, inputs), oracle(model, inputs)) < TOLERANCE


def test_roles_follow_use_and_not_names(tmp_path: Path) -> None:
    graph = load(saved(decoder(), tmp_path))
    assert graph.roles["inputs"] == {
        "ids": "token_ids",
        "mask": "attention_mask",
        "positions": "position_ids",
        "past_k0": "past.key.0",
        "past_v0": "past.value.0",
        "past_k1": "past.key.1",
        "past_v1": "past.value.1",
    }
    assert graph.roles["outputs"]["logits"] == "logits"
    assert graph.roles["outputs"]["new_v1"] == "present.value.1"


def test_tied_head_reads_the_embedding_in_place(tmp_path: Path) -> None:
    graph = load(saved(decoder(Options(tied=True)), tmp_path))
    (head,) = [op for op in graph.ops() if op.mnemonic == "lm_head"]
    (embed,) = [op for op in graph.ops() if op.mnemonic == "embed"]
    assert head.attr("weight") == embed.attr("table")
    assert head.attr("transposed") is True
