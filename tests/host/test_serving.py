"""The host target on the example model: its schedule, its faults, its timing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mapper.bounds import tightest
from mapper.errors import ExecutionFault, UsageError
from mapper.frontend.load import load
from mapper.ir.graph import Graph
from mapper.machine import parse
from mapper.runtime.execute import Session
from mapper.schedule.tables import Request, Schedule
from mapper_host import BACKEND
from tests.host.graphs import lowered, machine

REQUEST = Request(prompt=5, context=12)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return load(Path(__file__).resolve().parents[2] / "examples" / "tiny-llama-op18.onnx")


@pytest.fixture(scope="module")
def schedule(graph: Graph) -> Schedule:
    return lowered(graph, REQUEST)


@pytest.fixture
def session(graph: Graph, schedule: Schedule) -> Session:
    return Session(schedule, BACKEND.semantics(), graph.folder)


def test_layers_are_one_block(graph: Graph, schedule: Schedule) -> None:
    for program in schedule.programs.values():
        repeats = [b.repeat for b in program.blocks]
        assert max(repeats) == graph.layers > 1
        assert sum(len(b.steps) for b in program.blocks) < 40


def test_one_program_serves_every_position(session: Session) -> None:
    """Decoding token by token from an empty cache gives what a prefill of the same tokens gives."""
    ids = np.random.default_rng(0).integers(0, 2000, (1, 5))
    whole = session.run("prefill", {"input_ids": ids, "past_length": np.array(0)})["logits"]
    caches = {p.name: session.state(p.name)[:, :, :5] for p in session.ports("state")}
    session.reset()
    for n in range(5):
        one = session.run("decode", {"input_ids": ids[:, n : n + 1], "past_length": np.array(n)})["logits"]
        np.testing.assert_allclose(one[:, 0], whole[:, n], rtol=1e-4, atol=1e-4)
    for name, cache in caches.items():
        np.testing.assert_allclose(session.state(name)[:, :, :5], cache, rtol=1e-4, atol=1e-5)
        assert not session.state(name)[:, :, 5:].any(), "rows beyond the position are left alone"


def test_data_out_of_range_is_a_fault(session: Session) -> None:
    for ids, past in ((2048, 0), (-2049, 0), (0, 12), (0, -1)):
        with pytest.raises(ExecutionFault, match=r"block .* row .*: "):
            session.run("decode", {"input_ids": np.array([[ids]]), "past_length": np.array(past)})


def test_arguments_cannot_reach_beyond_buffers(graph: Graph, schedule: Schedule) -> None:
    """A step whose arguments ask for one column more than its operands hold is refused before it runs."""
    program = schedule.programs["decode"]
    block = program.blocks[-1]
    column = block.steps.table.schema.get_field_index("args")
    offsets, flat = block.steps.args()
    args = [flat[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]
    assert schedule.opcodes[int(block.steps.column("opcode")[0])] == "project"
    args[0][1] += 1
    table = block.steps.table.set_column(column, block.steps.table.schema.field(column), [args])
    blocks = (*program.blocks[:-1], replace(block, steps=replace(block.steps, table=table)))
    broken = replace(schedule, programs={**schedule.programs, "decode": replace(program, blocks=blocks)})
    assert {c.name: bool(c.run(broken)) for c in BACKEND.checks()}["OperandsFit"]
    session = Session(broken, BACKEND.semantics(), graph.folder)
    with pytest.raises(ExecutionFault, match="operands"):
        session.run("decode", {"input_ids": np.array([[1]]), "past_length": np.array(0)})


def test_time_follows_the_machine(graph: Graph, schedule: Schedule) -> None:
    chip = machine()
    times = BACKEND.retime(schedule, chip)
    for phase, program in schedule.programs.items():
        assert times[phase] == pytest.approx(program.cycles / schedule.clock_hz)  # type: ignore[index]
        bounds = BACKEND.bounds(graph, chip, REQUEST)[phase]  # type: ignore[index]
        assert times[phase] >= tightest(bounds).seconds > 0  # type: ignore[index]
    small = chip.replace({"cache.bytes": 1e6})
    assert BACKEND.retime(schedule, small)["decode"] > times["decode"]
    for form in BACKEND.bounds(graph, small, REQUEST).values():
        weights = 4.0 * (graph.params - 2048 * 256)  # tables are read by row
        named = {b.name: b.seconds for b in form}
        assert named["memory bandwidth"] > 0.9 * (weights - 1e6) / chip.value("memory.bandwidth")


def test_what_is_not_supported_is_refused(graph: Graph) -> None:
    for request in (replace(REQUEST, weights="int3"), replace(REQUEST, chips=2)):
        with pytest.raises(UsageError, match="host"):
            BACKEND.lower(graph, machine(), request)


def test_listing_names_every_step(schedule: Schedule) -> None:
    files = {a.name: a.data.decode() for a in BACKEND.artifacts(schedule)}
    steps = sum(len(b.steps) for p in schedule.programs.values() for b in p.blocks)
    assert files["listing.txt"].count(" -> ") == steps


def test_calibration_writes_a_machine() -> None:
    measured = parse(BACKEND.calibrate())
    assert measured.name == measured.target == "host"
    assert set(measured.constants) == set(machine().constants)
    # figures that no computer of the last twenty years leaves
    assert 5e8 < measured.value("memory.bandwidth") < 2e12
    assert 1e8 < measured.value("rate.vector") < 1e13
    assert 1e-9 < measured.value("step.overhead") < 1e-4


def test_preparing_a_program_changes_nothing(session: Session, graph: Graph, schedule: Schedule) -> None:
    given = {"input_ids": np.array([[5, 6, 7, 8, 9]]), "past_length": np.array(0)}
    session.prepare("prefill", given)
    assert (session.runs, session.steps) == (0, 0)
    fresh = Session(schedule, BACKEND.semantics(), graph.folder)
    assert np.array_equal(session.run("prefill", given)["logits"], fresh.run("prefill", given)["logits"])
    with pytest.raises(UsageError):
        session.prepare("prefill", {})
