"""Mixtures of experts on the host: weights as they are stored, and of those only the chosen experts'."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mapper import driver
from mapper.bounds import tightest
from mapper.frontend.load import load
from mapper.machine import parse
from mapper.passes.quantise import Quantise
from mapper.runtime.mutation import MutationTest, decoder_case
from mapper.schedule.tables import Schedule
from mapper_host import BACKEND
from tests.zoo.test_zoo import small

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b")
PROMPT, CONTEXT = 5, 16


def compiled(model: str, weights: str | None, folder: Path) -> Schedule:
    file = small(model, folder)
    return driver.compile(file, "host", prompt=PROMPT, context=CONTEXT, weights=weights, out=folder / "out")


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4", "mxfp4"])
@pytest.mark.parametrize("model", MODELS)
def test_toys_are_verified_in_every_format(model: str, weights: str, tmp_path: Path) -> None:
    made = compiled(model, weights, tmp_path)
    for program in made.programs.values():
        steps = Counter(made.opcodes[o] for b in program.blocks for o in b.steps.column("opcode"))
        assert steps["route"] == steps["experts_up"] == steps["experts_down"] > 0
        assert not steps["moe"]
    found = driver.verify(tmp_path / "out", tokens=3)
    assert found.ok, found.failures
    held = {p.dtype for p in made.ports if p.kind == "weight" and len(p.shape) == 3 and p.shape[0] >= 4}
    kinds = {"f32": {"float32"}, "bf16": {"bfloat16"}, "mxfp4": {"uint8"}}
    assert held - {"float32"} == kinds.get(weights, {"uint8", "float16"}) - {"float32"}


@pytest.mark.parametrize("weights", ["f32", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_only_chosen_experts_count_and_no_bound_is_beaten(model: str, weights: str, tmp_path: Path) -> None:
    made = compiled(model, weights, tmp_path)
    graph = Quantise(weights).apply(load(tmp_path / "toy.onnx"))
    machine = parse(made.machine_toml)
    bounds = BACKEND.bounds(graph, machine, made.request)
    for phase, program in made.programs.items():
        assert program.cycles / made.clock_hz >= tightest(bounds[phase]).seconds > 0  # type: ignore[index]
        for block in program.blocks:
            opcode, moved = block.steps.column("opcode"), block.steps.column("bytes")
            offsets, _, _, size = block.steps.slices("reads")
            for row in np.flatnonzero(opcode == made.opcodes.index("experts_up")):
                held = int(size[offsets[row] : offsets[row + 1]].sum())
                first, flat = block.steps.args()
                tokens, k, experts = flat[first[row] : first[row] + 3].tolist()
                assert k < experts
                chosen = min(tokens * k, experts)
                assert moved[row] < held * (chosen / experts) * 1.2 or chosen == experts


@pytest.mark.parametrize("weights", [None, "int4"])
def test_mutants_of_a_schedule_with_experts_die(weights: str | None, tmp_path: Path) -> None:
    file = small("qwen3-30b-a3b", tmp_path)
    # no more rows than are decoded, so that no row of a table of positions is left out
    made = driver.compile(file, "host", phase="decode", context=3, weights=weights)
    test = MutationTest(made, decoder_case(BACKEND.semantics()), BACKEND.checks(), BACKEND.mutations())
    report = test.run(120)
    print(report.table())
    assert report.kill_rate() >= 0.98, report.survivors
    assert report.equivalent_share <= 0.05


def test_steps_of_seconds_are_counted_in_a_slower_clock(tmp_path: Path) -> None:
    """Of the largest model, in float32; the others keep nanoseconds."""
    made = driver.compile("zoo:llama-3.1-405b", "host", phase="prefill", prompt=16)
    assert made.clock_hz == 1e6
    seconds = BACKEND.retime(made, parse(made.machine_toml))["prefill"]
    assert seconds == pytest.approx(made.programs["prefill"].cycles / made.clock_hz)
    weights = 4 * 405e9
    assert seconds > weights / parse(made.machine_toml).value("memory.bandwidth")
    longest = max(int(b.steps.column("duration").max()) for b in made.programs["prefill"].blocks)
    assert longest * 1000 > 2**31
    assert compiled("mixtral-8x7b", None, tmp_path).clock_hz == 1e9
