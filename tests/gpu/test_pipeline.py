"""Pipelines: schedules of several stages execute, equal onnxruntime, and are refused where they cannot be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mapper import driver
from mapper.errors import MapperError
from mapper.machine import read
from mapper.runtime.mutation import MutationTest, decoder_case
from mapper.schedule.tables import Schedule
from mapper_gpu import BACKEND
from mapper_gpu.check_stages import StagesHold
from mapper_gpu.pipeline import _balanced
from tests.gpu.common import EXAMPLE, MACHINES, built, domains, h100, toy


@pytest.mark.parametrize(("parallel", "chips"), [("pp=2", 2), ("tp=2,pp=2", 4), ("tp=2,pp=3", 6)])
@pytest.mark.parametrize("megakernel", [False, True])
def test_stages_equal_onnxruntime(parallel: str, chips: int, megakernel: bool, tmp_path: Path) -> None:
    machine = h100(megakernel)
    done = built(machine=machine, chips=chips, parallel=parallel, prompt=5, context=16, out=tmp_path / "s")
    assert done.schedule.chips == chips
    found = driver.verify(tmp_path / "s", tokens=8)
    assert found.ok, found.failures
    assert found.tokens == 8 and found.max_rel_err < 1e-4


def test_experts_in_stages(tmp_path: Path) -> None:
    model = toy("mixtral-8x7b", 2, tmp_path)
    built(model, parallel="tp=2,pp=2", chips=4, prompt=4, context=16, batch=2, out=tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=3)
    assert found.ok, found.failures


def test_a_stage_holds_its_own_layers_alone() -> None:
    """The chips of a pipeline together hold each cache once, and tensor parallelism inside a stage shares
    heads."""
    one, two = (built(chips=c, parallel=p, prompt=4, context=16).schedule for c, p in ((1, ""), (2, "pp=2")))
    caches = [np.zeros(2), np.zeros(2)]
    for i, schedule in enumerate((one, two)):
        memory, size = (schedule.buffers.column(c).to_numpy() for c in ("memory", "bytes"))
        for port in schedule.ports:
            if port.kind == "state":
                np.add.at(caches[i], memory[list(port.buffers)], size[list(port.buffers)])
    assert caches[0].sum() == caches[1].sum()
    assert (caches[1] > 0).all()


def test_between_domains_a_send_passes_the_network() -> None:
    near, far = (
        built(machine=domains(domain), chips=2, parallel="pp=2", prompt=4, context=16).schedule
        for domain in (8, 1)
    )
    slower = h100().value("network.latency") * near.clock_hz
    assert far.programs["decode"].cycles - near.programs["decode"].cycles >= int(slower)


def _sends(schedule: Schedule) -> tuple[int, int]:
    """(block, kernel) of decode's first send."""
    for b, record in enumerate(schedule.plan["blocks"]["decode"]):
        for k, kernel in enumerate(record["kernels"]):
            if kernel.get("collective", {}).get("algorithm") == "send":
                return b, k
    raise AssertionError("no send")


def test_a_send_from_another_chip_than_the_peer_is_found() -> None:
    schedule = built(chips=4, parallel="tp=2,pp=2", prompt=4, context=16).schedule
    b, _ = _sends(schedule)
    program = schedule.programs["decode"]
    block = program.blocks[b]
    table = block.steps.table
    rows = table.to_pylist()
    rows[0]["reads"], rows[1]["reads"] = rows[1]["reads"], rows[0]["reads"]
    swapped = replace(
        block, steps=replace(block.steps, table=pa.Table.from_pylist(rows, schema=table.schema))
    )
    blocks = (*program.blocks[:b], swapped, *program.blocks[b + 1 :])
    mutant = replace(schedule, programs={**schedule.programs, "decode": replace(program, blocks=blocks)})
    assert any("peer" in v.message for v in StagesHold().run(mutant))


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        built(chips=2, parallel="pp=2", prompt=4, context=16, out=tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir() if p.is_file())
    assert files and all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time = rng.uniform(0.1, 1.0, 9)

    def slowest(ends: tuple[int, ...]) -> float:
        edges = (0, *ends, len(time))
        return max(float(time[a:b].sum()) for a, b in itertools.pairwise(edges))

    best = min(slowest(c) for c in itertools.combinations(range(1, len(time)), 2))
    found = _balanced(time.tolist(), [1.0] * len(time), 3, 1e9)
    assert found[-1] == len(time)
    assert slowest(tuple(found[:-1])) == pytest.approx(best)
    tight = _balanced(time.tolist(), [1.0] * len(time), 3, 3.0)
    assert tight == [3, 6, 9]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chips": 4, "parallel": "tp=2"}, "are 2 chips"),
        ({"chips": 2, "parallel": "pp=x"}, "takes tp=N,pp=N,ep=N,dp=N"),
        ({"chips": 2, "parallel": "pp=2,pp=2"}, "takes tp=N,pp=N,ep=N,dp=N"),
        ({"chips": 0, "parallel": "pp=0"}, "at least 1"),
        ({"chips": None, "parallel": "pp=0"}, "are 0 chips"),
        ({"chips": 64, "parallel": "pp=64"}, "pipeline stages"),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(MapperError, match=reason):
        driver.build(EXAMPLE, "gpu", prompt=4, context=8, **options)


def test_other_targets_refuse_it() -> None:
    with pytest.raises(MapperError, match="--parallel"):
        driver.build(EXAMPLE, "host", parallel="pp=2")


def test_chips_follow_from_degrees() -> None:
    assert built(chips=None, parallel="tp=2,pp=2", prompt=4, context=16).schedule.chips == 4


def test_explain_states_latency_and_rate() -> None:
    done = built(chips=2, parallel="pp=2", prompt=4, context=16)
    findings = BACKEND.explain(done.schedule, h100())["decode"]
    (stages,) = [f for f in findings if f.title.startswith("pipeline")]
    assert len(stages.rows) == 2
    total = sum(float(r[2]) for r in stages.rows)
    cycles = done.schedule.programs["decode"].cycles
    assert total <= 1e6 * cycles / done.schedule.clock_hz + 1e-6


@pytest.mark.parametrize(("parallel", "chips", "megakernel"), [("pp=2", 2, True), ("tp=2,pp=2", 4, False)])
def test_mutants_of_pipelines_die(parallel: str, chips: int, megakernel: bool) -> None:
    machine = h100(megakernel)
    schedule = built(machine=machine, chips=chips, parallel=parallel, prompt=6, context=10).schedule
    case = decoder_case(BACKEND.semantics(), 4)
    report = MutationTest(schedule, case, BACKEND.checks(), BACKEND.mutations(), seed=5).run(30)
    print(report.table())
    assert report.kill_rate() >= 0.98, report.survivors
    assert report.equivalent_share <= 0.05


@pytest.mark.parametrize("name", ["two domains", "ring"])
def test_collectives_take_what_their_formula_says(name: str, tmp_path: Path) -> None:
    """The table's longest task per stage of each collective adds up to the alpha-beta model's seconds:
    between domains, and on a machine without a switch."""
    machine = domains(2) if name == "two domains" else read(MACHINES / "tpu-v5e.toml")
    done = built(machine=machine, chips=4, prompt=4, context=16, out=tmp_path / "s")
    schedule = done.schedule
    seen = 0
    for block, record in zip(
        schedule.programs["decode"].blocks, schedule.plan["blocks"]["decode"], strict=True
    ):
        offsets, flat = block.steps.args()
        owner, stage = flat[offsets[:-1] + 1], flat[offsets[:-1] + 16]
        length = block.steps.column("duration")
        for number, kernel in enumerate(record["kernels"]):
            if kernel["kind"] != "collective":
                continue
            mine = owner == number
            cycles = sum(int(length[mine & (stage == s)].max()) for s in np.unique(stage[mine]))
            assert cycles == pytest.approx(kernel["seconds"] * schedule.clock_hz, abs=4)
            seen += 1
    assert seen > 2
    assert driver.verify(tmp_path / "s", tokens=3).ok
