"""Decoders of odd shapes and a recurrent cell, scheduled, checked, executed, against NumPy written apart."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.lpu_silicon import errors, lstm, random_inputs
from mapper import machine
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from mapper.passes.serve import serve
from mapper.runtime.execute import Session
from mapper.schedule.checks import run_checks
from mapper.schedule.tables import Phase, Request, Schedule
from mapper_lpu import BACKEND
from mapper_lpu.bounds import bounds
from mapper_lpu.cell import lower_cell
from tests.ir.models import Sizes, llama

MACHINE = machine.read(BACKEND.machine_files()[0])
FP16_ERROR = 2e-2  # of the largest logit: products in fp16 through a few layers

SHAPES = {
    "heads of 12, grouped": (Sizes(layers=2), 1),
    "interleaved rotary": (Sizes(layers=2, interleaved=True), 1),
    "one head each, two K tiles": (Sizes(layers=2, groups=4, inner=333), 1),
    "four K tiles, many words": (Sizes(layers=2, inner=1000, vocab=700), 1),
    "two sequences": (Sizes(layers=2, head=16), 2),
}


def violations(schedule: Schedule) -> dict[str, list[str]]:
    return {
        name: [v.message for v in found][:2]
        for name, found in run_checks(schedule, BACKEND.checks()).items()
        if found
    }


def worst(got: np.typing.NDArray[np.float32], wanted: np.typing.NDArray[np.float32]) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


class Reference:
    """The serving form evaluated op by op, its caches kept."""

    def __init__(self, graph: Graph, batch: int, prompt: int, context: int) -> None:
        phases: tuple[Phase, ...] = ("prefill", "decode")
        self.forms = {p: serve(graph, phase=p, batch=batch, prompt=prompt, context=context) for p in phases}
        self.caches = {
            name: np.zeros(kind.ints, np.float32)
            for name, kind in self.forms["decode"].inputs
            if name.startswith("cache.")
        }

    def run(self, phase: Phase, ids: np.typing.NDArray[np.int64], past: int) -> np.typing.NDArray[np.float32]:
        inputs = {"input_ids": ids, "past_length": np.int64(past), **self.caches}
        out = evaluate(self.forms[phase], {k: np.asarray(v) for k, v in inputs.items()})
        self.caches = {name: out[name] for name in self.caches}
        return out["logits"]


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_decoders_run_and_agree(shape: str) -> None:
    sizes, batch = SHAPES[shape]
    graph, context, prompt = llama(sizes), 8, 3
    request = Request(batch=batch, context=context, prompt=prompt)
    schedule = BACKEND.lower(graph, MACHINE, request)
    assert violations(schedule) == {}
    for phase, found in bounds(graph, MACHINE, request).items():
        seconds = schedule.programs[phase].cycles / schedule.clock_hz
        assert all(bound.seconds <= seconds for bound in found)
    session, beside = Session(schedule, BACKEND.semantics()), Reference(graph, batch, prompt, context)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, sizes.vocab, (batch, context))
    got = session.run("prefill", {"input_ids": ids[:, :prompt]})["logits"]
    assert worst(got, beside.run("prefill", ids[:, :prompt], 0)) < FP16_ERROR
    for past in range(prompt, context):
        token = ids[:, past : past + 1]
        got = session.run("decode", {"input_ids": token, "past_length": np.array(past)})["logits"]
        assert worst(got, beside.run("decode", token, past)) < FP16_ERROR
    for name, cache in beside.caches.items():
        assert worst(session.state(name), cache) < FP16_ERROR, name


@pytest.mark.parametrize("hidden, batch", [(48, 2), (336, 1)])
def test_an_lstm_step_runs_and_agrees(hidden: int, batch: int) -> None:
    graph = lstm(hidden, batch)
    schedule = lower_cell(graph, MACHINE)
    assert violations(schedule) == {}
    found = errors(graph, schedule, random_inputs(hidden, batch, 4))
    assert found["c_out"] < 1e-3  # tanh has int16 steps
    assert found["h_out"] <= 1.0
