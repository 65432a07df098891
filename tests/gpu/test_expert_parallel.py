"""Replicas and whole experts per chip: executed on poisoned memories, equal to onnxruntime."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper import driver
from mapper.errors import MapperError
from mapper.runtime.mutation import MutationTest, decoder_case
from mapper.schedule.edit import Place, step_at, with_step
from mapper.schedule.tables import Schedule
from mapper_gpu import BACKEND
from mapper_gpu.check_exchange import ExchangesHold, ExpertsOwned
from mapper_gpu.collective import exchange
from mapper_gpu.hardware import gpu
from mapper_gpu.routing import routing_of
from tests.gpu.common import EXAMPLE, built, domains, h100, toy

DEGREES = (
    ("tp=2,ep=2", 2, 1), ("tp=4,ep=2", 4, 1), ("dp=2,ep=2", 2, 2), ("tp=2,dp=2,ep=2", 4, 2),
    ("tp=2,dp=2,ep=4", 4, 4), ("dp=4,ep=4", 4, 4), ("tp=2,dp=2", 4, 2),
)  # fmt: skip
"""Groups inside of a replica, whole and cut; in all replicas, likewise; replicas that hold all experts."""


def agrees(model: Path, folder: Path, **options: object) -> driver.Compiled:
    done = built(model, prompt=5, context=16, out=folder / "s", **options)
    found = driver.verify(folder / "s", tokens=4)
    assert found.ok, found.failures
    assert "weights" in options or found.max_rel_err < 1e-4
    return done


@pytest.mark.parametrize(("parallel", "chips", "batch"), DEGREES)
@pytest.mark.parametrize("megakernel", [False, True])
def test_equal_to_onnxruntime(
    parallel: str, chips: int, batch: int, megakernel: bool, tmp_path: Path
) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    agrees(model, tmp_path, machine=h100(megakernel), parallel=parallel, chips=chips, batch=batch)


@pytest.mark.parametrize(
    ("name", "layers", "parallel", "chips", "batch"),
    [
        ("gpt-oss-20b", 2, "tp=2,dp=2,ep=4", 4, 2),
        ("deepseek-v3", 4, "tp=2,dp=2,ep=2", 4, 2),
        ("qwen3-30b-a3b", 2, "dp=2,ep=2", 2, 4),
        ("mixtral-8x7b", 2, "tp=2,dp=2,ep=2,pp=2", 8, 2),
    ],
)
def test_other_models(name: str, layers: int, parallel: str, chips: int, batch: int, tmp_path: Path) -> None:
    """Biases of experts, shared experts and latent attention, many experts; a pipeline of such groups."""
    agrees(toy(name, layers, tmp_path), tmp_path, parallel=parallel, chips=chips, batch=batch)


@pytest.mark.parametrize(("parallel", "chips", "batch"), [("dp=2", 2, 2), ("tp=2,dp=2,pp=2", 8, 4)])
def test_replicas_of_a_dense_model(parallel: str, chips: int, batch: int, tmp_path: Path) -> None:
    agrees(EXAMPLE, tmp_path, parallel=parallel, chips=chips, batch=batch)


@pytest.mark.parametrize("weights", ["int4", "f8e4m3"])
def test_experts_in_low_bits(weights: str, tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    done = agrees(model, tmp_path, parallel="tp=2,dp=2,ep=4", chips=4, batch=2, weights=weights)
    assert any("bits" in p.layout and "experts" in p.layout for p in done.schedule.ports)


def _stored(schedule: Schedule) -> float:
    """Bytes of stacks of experts, of all chips."""
    size = schedule.buffers.column("bytes").to_numpy()
    return float(sum(size[list(p.buffers)].sum() for p in schedule.ports if p.layout["kind"] == "stack"))


def test_experts_are_held_once_and_by_each_replica(tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    one, owned, copied = (
        _stored(built(model, prompt=4, context=8, parallel=p, chips=c, batch=2).schedule)
        for p, c in (("", 1), ("tp=2,dp=2,ep=4", 4), ("dp=2", 2))
    )
    assert one == owned > 0
    assert copied == 2 * one


def test_replicas_have_sequences_of_their_own(tmp_path: Path) -> None:
    """A replica's caches hold its share of the batch, and one replica takes as long as two."""
    one, two = (
        built(parallel=p, chips=c, batch=b, prompt=4, context=16).schedule
        for p, c, b in (("tp=1", 1, 2), ("dp=2", 2, 4))
    )
    size = [s.buffers.column("bytes").to_numpy() for s in (one, two)]
    states = [[p for p in s.ports if p.kind == "state"] for s in (one, two)]
    for a, b in zip(*states, strict=True):
        assert b.shape[0] == 2 * a.shape[0]
        assert set(size[1][list(b.buffers)]) == set(size[0][list(a.buffers)])
    assert one.programs["decode"].cycles == two.programs["decode"].cycles


@pytest.mark.parametrize(
    ("rows", "count", "chosen", "owners"),
    [
        (1, 256, 8, 16), (1, 8, 2, 4), (3, 32, 4, 8), (16, 64, 6, 64), (40, 64, 8, 4), (600, 32, 4, 8),
    ],
)  # fmt: skip
def test_the_fullest_group(rows: int, count: int, chosen: int, owners: int) -> None:
    """Against draws. Rows of a group, and blocks of more than one per expert, are taken as independent from
    group to group, which makes the fullest a few percent different."""
    r = routing_of(rows, count, chosen).shared(rows, owners)
    rng = np.random.default_rng(0)
    choice = np.argsort(rng.random((2000 if rows < 100 else 60, rows, count)), -1)[..., :chosen]
    load = np.zeros((len(choice), count), int)
    np.add.at(load, (np.arange(len(choice))[:, None, None], choice), 1)
    each = load.reshape(len(choice), owners, -1)
    blocks = (-(-each // r.tile)).sum(-1).max(-1)
    assert (each > 0).sum(-1).max(-1).mean() == pytest.approx(r.distinct, rel=0.03)
    assert each.sum(-1).max(-1).mean() == pytest.approx(r.fullest, rel=0.08)
    assert blocks.mean() == pytest.approx(r.blocks, abs=1.1)
    assert blocks.max() <= r.most


def test_exchanges_between_domains_pass_the_network(tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    near, far = (
        agrees(model, tmp_path / str(d), machine=domains(d), parallel="tp=2,dp=2,ep=4", chips=4, batch=2)
        for d in (8, 2)
    )
    slower = 3 * 2 * h100().value("network.latency") * near.schedule.clock_hz
    cycles = [d.schedule.programs["decode"].cycles for d in (near, far)]
    assert cycles[1] - cycles[0] >= int(slower)


def test_bytes_of_an_exchange() -> None:
    """In one domain all but the own share at the link's rate; beyond it the slower of both ways counts."""
    chip = gpu(h100())
    one = exchange(chip, 8, 1, 8e9)
    assert one.seconds == pytest.approx(7e9 / chip.link + chip.link_latency)
    two = exchange(chip, 4, 4, 8e9)
    slower = max(2e9 / chip.link, 4e9 / chip.network)
    assert two.across and two.seconds == pytest.approx(slower + chip.link_latency + chip.network_latency)


def test_degrees_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"chips": 2, "parallel": "dp=2"}, "do not share 1 sequences evenly"),
        ({"chips": 4, "parallel": "tp=4,ep=3"}, "do not divide tp=4"),
        ({"chips": 4, "parallel": "tp=2,dp=2,ep=3", "batch": 2}, "in dp=2 replicas evenly"),
        ({"chips": 16, "parallel": "dp=16,ep=16", "batch": 16}, "8 experts do not divide among ep=16"),
        ({"chips": 2, "parallel": "tp=2,ep=x"}, "takes tp=N,pp=N,ep=N,dp=N"),
        ({"chips": 4, "parallel": "tp=2,dp=3", "batch": 3}, "are 6 chips"),
    )
    for options, reason in refused:
        with pytest.raises(MapperError, match=reason):
            driver.build(model, "gpu", prompt=4, context=8, **options)
    straddling: dict[str, Any] = {"chips": 8, "batch": 2, "parallel": "tp=2,dp=2,pp=2,ep=2"}
    with pytest.raises(MapperError, match="not whole link domains of 6"):
        driver.build(model, "gpu", machine=domains(6), prompt=4, context=8, **straddling)
    with pytest.raises(MapperError, match="without experts"):
        driver.build(EXAMPLE, "gpu", prompt=4, context=8, chips=2, parallel="tp=2,ep=2")


def test_explain_says_what_the_fullest_group_reads(tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    done = built(model, prompt=4, context=16, parallel="tp=4,ep=4", chips=4)
    (found,) = (f for f in BACKEND.explain(done.schedule, h100())["decode"] if f.title.startswith("experts"))
    row = dict(zip(found.columns, found.rows[0], strict=True))
    # 2 of 8 experts in 4 groups of 2: one group has both with probability 1/7
    assert row["experts read"] == pytest.approx(0.5) and row["of the fullest"] == pytest.approx(8 / 7)
    assert BACKEND.retime(done.schedule, h100())["decode"] == pytest.approx(
        done.schedule.programs["decode"].cycles / done.schedule.clock_hz
    )


def _edited(schedule: Schedule, edit: Callable[[Any], bool]) -> Schedule:
    """The schedule with the first program of prefill changed that `edit` can change."""
    plan = copy.deepcopy(schedule.plan)
    assert any(edit(p) for p in plan["programs"]["prefill"])
    return replace(schedule, plan=plan)


def _other_order(program: Any) -> bool:
    away = [o for o in program["reads"] if o["chip"] >= 0]
    if program["kind"] != "collective" or not any(i[0] == "gather" for i in program["code"]):
        return False
    away[0]["chip"], away[1]["chip"] = away[1]["chip"], away[0]["chip"]
    return True


def _other_experts(program: Any) -> bool:
    for i in program["code"]:
        if i[0] == "align":
            i[7] = (i[7] + i[8]) % i[3]
            return True
    return False


@pytest.mark.parametrize(
    ("edit", "check", "message"),
    [
        (_other_order, ExchangesHold(), r"of chips \[1, 0\], not of \[0, 1\]"),
        (_other_experts, ExpertsOwned(), "looks for experts"),
    ],
)
def test_wrong_partners_are_found(edit: Any, check: Any, message: str, tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    schedule = built(model, prompt=4, context=8, parallel="dp=2,ep=2", chips=2, batch=2).schedule
    assert not check.run(schedule)
    assert any(re.search(message, v.message) for v in check.run(_edited(schedule, edit)))


@pytest.mark.parametrize(
    ("parallel", "chips", "batch", "megakernel"),
    [("dp=2,ep=2", 2, 2, True), ("tp=2,dp=2,ep=2", 4, 2, False), ("tp=2,ep=2", 2, 1, False)],
)
def test_mutants_die(parallel: str, chips: int, batch: int, megakernel: bool, tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    options = {"parallel": parallel, "chips": chips, "batch": batch, "prompt": 6, "context": 10}
    schedule = built(model, machine=h100(megakernel), **options).schedule
    case = decoder_case(BACKEND.semantics(), 4)
    report = MutationTest(schedule, case, BACKEND.checks(), BACKEND.mutations(), seed=7).run(30)
    print(report.table())
    assert report.kill_rate() >= 0.98, report.survivors
    assert report.equivalent_share <= 0.05


def test_exchanges_that_carry_too_little_are_found(tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    schedule = built(model, prompt=4, context=8, parallel="dp=2,ep=2", chips=2, batch=2).schedule
    steps = schedule.programs["decode"].blocks[1].steps
    links = np.flatnonzero(steps.column("opcode") == schedule.opcodes.index("collective"))
    assert len(links) == 6  # three exchanges on two chips
    for number in links.tolist():
        place = Place("decode", 1, number)
        row = step_at(schedule, place)
        args = list(row["args"])
        args[8] //= 2
        mutant = with_step(schedule, place, {**row, "args": args})
        assert any("carries" in v.message for v in ExchangesHold().run(mutant))
