"""Families of models beside the example's, at toy widths: executed on poisoned memories, equal to
onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mapper import driver
from mapper.machine import parse, read
from mapper_gpu import BACKEND, flash
from tests.frontend import tiny
from tests.frontend.corpus import FOLDER
from tests.gpu.common import MACHINES, built, h100, toy

CORPUS = sorted(p for kind in ("bloom__ts17", "gptneox__dyn18") for p in FOLDER.glob(f"{kind}-kv.onnx"))
EXPERTS = sorted(
    p
    for kind in ("mixtral", "qwen3moe", "gptoss", "deepseekv3")
    for p in FOLDER.glob(f"{kind}__dyn*-kv*.onnx")
)


def agrees(model: Path, folder: Path, **options: object) -> driver.Compiled:
    done = built(model, prompt=4, context=12, out=folder / "s", **options)
    found = driver.verify(folder / "s", tokens=5)
    assert found.ok, found.failures
    assert found.max_rel_err < 1e-4
    for phase, estimate in done.result.phases.items():
        assert estimate.ratio >= 1, (phase, estimate.bound)
    return done


@pytest.mark.parametrize("chips", [1, 2])
def test_slopes_of_alibi(chips: int, tmp_path: Path) -> None:
    model = tiny.saved(tiny.decoder(tiny.Options(alibi=True)), tmp_path)
    agrees(model, tmp_path, chips=chips)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_norm_that_every_lane_repeats(layers: int, tmp_path: Path) -> None:
    """In a model of one layer no later repetition hides that all lanes of a product start at once."""
    model = toy("qwen3-0.6b", layers, tmp_path)
    done = built(model, batch=2, prompt=3, context=300)
    several = [v for v in done.schedule.plan["fused"].values() if isinstance(v, list)]
    assert several, "no kernel has lanes that share a prologue"


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("megakernel", [False, True])
@pytest.mark.parametrize("model", CORPUS, ids=lambda p: p.stem)
def test_heads_of_one_matrix(model: Path, megakernel: bool, chips: int, tmp_path: Path) -> None:
    """Queries, keys and values whose rows of the weight alternate, head by head. In one of them MLP and
    attention run side by side, so that no collective stands between the last one and the next layer's
    partial sums."""
    agrees(model, tmp_path, chips=chips, machine=h100(megakernel))


MIXTURES = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b")
"""Two experts of eight; shares that are normalised; biases, a clamp, gate and up in alternating columns."""


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("megakernel", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name: str, megakernel: bool, chips: int, tmp_path: Path) -> None:
    done = agrees(toy(name, 2, tmp_path), tmp_path, chips=chips, machine=h100(megakernel))
    for phase, tokens in (("decode", 1), ("prefill", 4)):
        found = [
            k["experts"] for b in done.schedule.plan["blocks"][phase] for k in b["kernels"] if "experts" in k
        ]
        assert len(found) in (2, 4) and all(e["tokens"] == tokens for e in found)
        assert all(e["blocks"] == min(e["count"], tokens * e["chosen"]) for e in found)


@pytest.mark.parametrize(("batch", "prompt"), [(5, 4), (1, 70)])
def test_several_rows_of_one_expert(batch: int, prompt: int, tmp_path: Path) -> None:
    """Few SMs make a task work through several blocks; blocks are shorter than an expert's rows may be."""
    model = toy("qwen3-30b-a3b", 1, tmp_path)
    few = parse(h100().text.replace("count = { value = 132", "count = { value = 2"))
    built(model, batch=batch, prompt=prompt, context=prompt + 4, out=tmp_path / "s", machine=few)
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures
    plan = driver.describe(tmp_path / "s").schedule.plan["blocks"]["prefill"]
    experts = [k["experts"] for b in plan for k in b["kernels"] if "experts" in k]
    assert any(e["tile"]["run"] > 1 for e in experts)
    assert all(e["rows"] < e["tokens"] for e in experts)


def test_explain_says_what_experts_read() -> None:
    done = built("zoo:mixtral-8x7b", phase="decode", context=64, chips=2)
    tables = BACKEND.explain(done.schedule, h100())["decode"]
    kernels = next(t for t in tables if t.columns[0] == "kernel" and "limit" in t.columns)
    assert {"experts expert_up", "experts expert_down"} <= {str(r[0]) for r in kernels.rows}
    experts = next(t for t in tables if "experts read" in t.columns)
    up = dict(zip(experts.columns, next(r for r in experts.rows if r[0] == "expert_up"), strict=True))
    assert (up["tokens"], up["chosen"], up["blocks"]) == (1, "2 of 8", "2 of 2")
    assert up["experts read"] == pytest.approx(2)
    assert up["MB each"] == pytest.approx(2 * 4096 * 14336 / 2 * 2 / 1e6)


def test_experts_of_an_even_routing() -> None:
    """Expected counts against a simulation, and the most blocks against an exhaustive search."""
    from itertools import product

    from mapper_gpu.routing import Routing, routing_of

    rng = np.random.default_rng(0)
    for rows, count, chosen in ((1, 8, 2), (7, 8, 2), (40, 16, 4), (300, 32, 4)):
        r = routing_of(rows, count, chosen)
        seen, blocks = [], []
        for _ in range(400):
            load = np.zeros(count, int)
            for _ in range(rows):
                load[rng.choice(count, chosen, replace=False)] += 1
            seen.append((load > 0).sum())
            blocks.append(np.ceil(load / r.tile).sum())
        assert np.mean(seen) == pytest.approx(r.distinct, rel=0.02)
        assert np.mean(blocks) == pytest.approx(r.blocks, abs=1.02)
        assert max(blocks) <= r.most
    for rows, tile in ((4, 2), (5, 3), (6, 2)):
        loads = (x for x in product(range(rows + 1), repeat=3) if sum(x) == 2 * rows)
        worst = max(sum(-(-n // tile) for n in x) for x in loads)
        assert Routing(rows, 3, 2, tile).most >= worst


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("megakernel", [False, True])
def test_latent_attention(megakernel: bool, chips: int, tmp_path: Path) -> None:
    """Absorbed: the cache holds latent rows on every chip, and pairs of the rotation are pulled apart."""
    done = agrees(toy("deepseek-v3", 4, tmp_path), tmp_path, chips=chips, machine=h100(megakernel))
    caches = [p for p in done.schedule.ports if p.kind == "state"]
    assert len(caches) == 8 and all(p.shape[1] == 1 for p in caches)
    attention = [k for b in done.schedule.plan["blocks"]["decode"] for k in b["kernels"] if "attention" in k]
    assert all(k["attention"]["heads"] == 4 // chips and k["attention"]["kv_heads"] == 1 for k in attention)


def test_a_split_cache_of_latent_rows(tmp_path: Path) -> None:
    done = built(toy("deepseek-v3", 4, tmp_path), prompt=40, context=2048, out=tmp_path / "s", batch=2)
    kernels = [k for b in done.schedule.plan["blocks"]["decode"] for k in b["kernels"] if "split" in k]
    assert all(k["split"]["splits"] > 1 for k in kernels)
    found = driver.verify(tmp_path / "s", tokens=3)
    assert found.ok, found.failures


@pytest.mark.parametrize("splits", [1, 2])
def test_latent_heads_in_parts(splits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SM with room for one head's running result: each head is a task, all read the same rows."""
    monkeypatch.setattr(flash, "ACCUMULATORS", 32)
    monkeypatch.setattr(flash, "KEY_SPLITS", (splits,))
    flash.choose.cache_clear()
    model = toy("deepseek-v3", 4, tmp_path)
    done = built(model, prompt=7, context=200, out=tmp_path / "s", batch=2)
    flash.choose.cache_clear()
    kernels = [k for b in done.schedule.plan["blocks"]["decode"] for k in b["kernels"] if "attention" in k]
    assert {(k["attention"]["kv_heads"], k["split"]["splits"]) for k in kernels} == {(4, splits)}
    found = driver.verify(tmp_path / "s", tokens=3)
    assert found.ok, found.failures


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("model", EXPERTS, ids=lambda p: p.stem)
def test_other_exporters_graphs(model: Path, chips: int, tmp_path: Path) -> None:
    agrees(model, tmp_path, chips=chips)


def test_deepseek_v3_fits_sixteen_chips() -> None:
    """In bf16, all checks held; identical layers are two blocks, and no chip has a row per expert."""
    machine = read(MACHINES / "b200.toml")
    done = built("zoo:deepseek-v3", machine=machine, chips=16, phase="decode", context=2048)
    blocks = done.schedule.programs["decode"].blocks
    assert [b.repeat for b in blocks] == [1, 3, 58, 1]
    assert max(len(b.steps) for b in blocks) / 16 < 8 * 256
    assert done.result.phases["decode"].ratio >= 1


LOOKED_AT = sorted(
    p
    for n in ("falcon__dyn18-kv", "falcon__ts17-kv", "qwen3__genai-fp32", "bloom__dyn18-kv")
    for p in FOLDER.glob(f"{n}.onnx")
)
"""Heads of one matrix taken in other orders of axes and several times; tokens and heads in one axis; a table
that the file has the other way round; an input that nothing reads."""


@pytest.mark.parametrize("weights", [None, "bf16"])
@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("model", LOOKED_AT, ids=lambda p: p.stem)
def test_spellings_of_heads_and_tables(model: Path, chips: int, weights: str | None, tmp_path: Path) -> None:
    if weights is None:
        agrees(model, tmp_path, chips=chips, batch=2)
        return
    built(model, prompt=4, context=12, out=tmp_path / "s", chips=chips, weights=weights)
    found = driver.verify(tmp_path / "s", tokens=5)
    assert found.ok, found.failures


@pytest.mark.parametrize(
    ("perm", "shape", "still"),
    [((0, 1, 2, 3), (1, 6), True), ((0, 2, 1, 3), (1, 6), True), ((0, 2, 1, 3), (2, 3), False)],
)
def test_axes_that_move_elements_are_not_reshaped_away(
    perm: tuple[int, ...], shape: tuple[int, int], still: bool
) -> None:
    """Whether [B, S, ...] behind a transpose still lies as it did, against NumPy."""
    from mapper_gpu import extract_cut

    b, s = 2, 4
    array = np.arange(b * s * 6).reshape(b, s, *shape)
    axes = "".join("bsii"[p] for p in perm)
    assert extract_cut.still(axes, [shape[p - 2] for p in perm if p > 1], b, s) == still
    assert np.array_equal(array.transpose(perm).reshape(-1), array.reshape(-1)) == still
