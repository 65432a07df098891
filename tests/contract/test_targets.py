"""What every target must do, shipped or third-party: nothing here knows any target by name."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mapper import backend as targets
from mapper import driver
from mapper.cost.estimate import step_count
from mapper.errors import MapperError
from mapper.machine import parse
from mapper.runtime.inputs import interface, states
from mapper.runtime.mutation import MutationTest, decoder_case
from mapper.runtime.oracle import oracle
from mapper.schedule import store

ROOT = Path(__file__).resolve().parents[2]
PROMPT = 4
CONTEXT = 8


@dataclass(frozen=True)
class Made:
    """A compiled example model."""

    target: str
    folder: Path
    done: driver.Compiled


_MADE: dict[str, Made] = {}


def build(target: str, model: Path, folder: Path) -> driver.Compiled:
    return driver.build(model, target, prompt=PROMPT, context=CONTEXT, out=folder)


@pytest.fixture
def made(target: str, example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The example model, compiled once per target."""
    if target not in _MADE:
        folder = tmp_path_factory.mktemp(target) / "out"
        _MADE[target] = Made(target, folder, build(target, example_model, folder))
    return _MADE[target]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_all_shipped_targets_and_the_plugin_are_found() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*project["entry-points"][targets.GROUP], "scalar"} <= set(targets.discover())


def test_the_backend_says_what_it_is(target: str) -> None:
    backend = targets.load(target)
    assert backend.name == target
    assert backend.summary and "\n" not in backend.summary
    names = {parse(p.read_text(), str(p)).name for p in backend.machine_files()}
    assert backend.default_machine in names
    for path in backend.machine_files():
        machine = parse(path.read_text(), str(path))
        assert machine.target == target
        assert all(c.source for c in machine.constants.values())


def test_all_checks_hold_in_memory_and_on_disk(made: Made) -> None:
    assert {k: [v.message for v in found] for k, found in made.done.report.violations.items() if found} == {}
    report = driver.check(made.folder)
    assert report.ok
    assert set(report.checks) == set(made.done.report.checks)
    assert len(report.checks) > 7, "a target has checks of its own"


def test_the_same_input_gives_the_same_bytes(made: Made, example_model: Path, tmp_path: Path) -> None:
    build(made.target, example_model, tmp_path / "again")
    first, again = files(made.folder), files(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_a_saved_schedule_is_saved_the_same_again(made: Made, tmp_path: Path) -> None:
    backend, schedule = targets.load(made.target), store.load(made.folder)
    store.save(schedule, tmp_path / "copy", backend.artifacts(schedule))
    assert files(tmp_path / "copy") == files(made.folder)


def test_execution_agrees_with_onnxruntime(made: Made) -> None:
    found = driver.verify(made.folder, tokens=CONTEXT - PROMPT)
    assert found.ok, found.failures
    assert found.tokens == CONTEXT - PROMPT
    assert found.tokens_differing == found.tokens_excused
    programs = made.done.schedule.programs
    decoded = (CONTEXT - PROMPT) * step_count(programs["decode"])
    assert found.steps_executed == step_count(programs["prefill"]) + decoded


def test_execution_by_the_models_own_names(made: Made, example_model: Path) -> None:
    schedule = made.done.schedule
    face = interface(schedule.roles)
    beside = oracle(example_model, face, states(schedule))
    rng = np.random.default_rng(3)
    vocabulary = next(p.shape[-1] for p in schedule.ports if p.name == "logits")
    prompt, more = rng.integers(0, vocabulary, (1, PROMPT)), rng.integers(0, vocabulary, (1, 2))
    tolerance = 0.05  # of the largest magnitude: wide enough for targets of narrow arithmetic, see verify

    first = driver.execute(made.folder, beside.inputs(prompt, 0, {}))
    wanted = beside.run(beside.inputs(prompt, 0, {}))
    assert set(first) == set(wanted)
    for name, array in wanted.items():
        assert np.abs(first[name] - array).max() <= tolerance * np.abs(array).max(), name

    caches = {e: face.to_state(wanted[n]) for e, n in face.present.items()}
    later = beside.inputs(more, PROMPT, caches)
    second, wanted = driver.execute(made.folder, later), beside.run(later)
    for name, array in wanted.items():
        assert second[name].shape == array.shape
        assert np.abs(second[name] - array).max() <= tolerance * np.abs(array).max(), name


def test_no_schedule_beats_a_bound_and_bands_hold_the_time(made: Made) -> None:
    for phase, estimate in made.done.result.phases.items():
        assert estimate.bound.seconds > 0
        assert estimate.ratio >= 1, (phase, estimate.bound)
        assert estimate.low_s <= estimate.time_s <= estimate.high_s
        program = made.done.schedule.programs[phase]
        assert estimate.time_s == pytest.approx(program.cycles / made.done.schedule.clock_hz, rel=1e-9)


def test_mutants_die(made: Made) -> None:
    backend, schedule = targets.load(made.target), made.done.schedule
    steps = sum(step_count(p) for p in schedule.programs.values())
    # every position is used, so that no row of a table of positions is left out
    execute = decoder_case(backend.semantics(), CONTEXT - PROMPT)
    test = MutationTest(schedule, execute, backend.checks(), backend.mutations())
    report = test.run(60 if steps < 5000 else 12)
    print(f"{made.target}: kill rate {report.kill_rate():.3f}\n{report.table()}")
    assert report.kill_rate() >= 0.95, report.survivors
    assert report.equivalent_share <= 0.05, [o for o in report.outcomes if o.verdict == "equivalent"]


@pytest.mark.parametrize(
    "request_of", [{"weights": "f3"}, {"chips": 1000}, {"prompt": 64}, {"batch": 0}, {"machine": "none-such"}]
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    target: str, request_of: dict[str, object], example_model: Path, tmp_path: Path
) -> None:
    options = {"prompt": PROMPT, "context": CONTEXT, **request_of}
    with pytest.raises(MapperError) as caught:
        driver.compile(example_model, target, out=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if p.name != "no-config"]


def test_padding_and_gaps_are_refused(made: Made) -> None:
    model = interface(made.done.schedule.roles)
    ids = np.zeros((1, PROMPT), np.int64)
    assert model.attention_mask is not None
    with pytest.raises(MapperError, match="padding"):
        driver.execute(made.folder, {model.token_ids: ids, model.attention_mask: np.zeros_like(ids)})
    for name in model.positions:
        with pytest.raises(MapperError, match="positions"):
            driver.execute(made.folder, {model.token_ids: ids, name: ids})
    with pytest.raises(MapperError, match="no input"):
        driver.execute(made.folder, {model.token_ids: ids, "surprise": ids})
    with pytest.raises(MapperError, match="token ids"):
        driver.execute(made.folder, {model.token_ids: ids + 10**6})
    with pytest.raises(MapperError, match="context"):
        driver.execute(made.folder, {model.token_ids: np.zeros((1, CONTEXT + 1), np.int64)})
