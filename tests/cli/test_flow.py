"""The commands, and the Python API, on the example model and the host target."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import mapper
from tests.command import fresh, inside

PROMPT, CONTEXT = 5, 24
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama-op18.onnx"


@pytest.fixture(scope="module")
def compiled(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A schedule directory of the example model for the host."""
    folder = tmp_path_factory.mktemp("flow") / "made" / "host"
    done = fresh(
        "compile", str(example_model), "--target", "host", "--prompt", str(PROMPT), "--context", str(CONTEXT),
        "--out", str(folder), "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (folder.parent / "said.json").write_text(done.stdout)
    return folder


def said(*args: str, code: int = 0) -> Any:
    """The JSON that a command prints."""
    done = inside(*args, "--json")
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (0 if code == 0 else 1)
    return json.loads(done.stdout)


def test_compile_prints_the_stable_keys(compiled: Path) -> None:
    record = json.loads((compiled.parent / "said.json").read_text())
    assert list(record) == ["target", "machine", "chips", "model", "phases", "checks", "schedule_dir"]
    assert (record["target"], record["machine"], record["chips"]) == ("host", "host-generic", 1)
    assert record["model"]["layers"] == 4
    assert record["schedule_dir"] == str(compiled)
    assert record["checks"]
    assert all(record["checks"].values())
    assert set(record["phases"]) == {"decode", "prefill"}
    for phase in record["phases"].values():
        assert list(phase) == [
            "time_s",
            "low_s",
            "high_s",
            "bound_s",
            "bound_name",
            "ratio",
            "tokens_per_s_per_user",
            "tokens_per_s",
            "steps",
        ]
        assert phase["low_s"] <= phase["time_s"] <= phase["high_s"]
        assert phase["ratio"] == pytest.approx(phase["time_s"] / phase["bound_s"])
        assert phase["ratio"] >= 1
    assert record["phases"]["decode"]["tokens_per_s"] == pytest.approx(
        1 / record["phases"]["decode"]["time_s"]
    )
    assert record["phases"]["prefill"]["tokens_per_s"] == pytest.approx(
        PROMPT / record["phases"]["prefill"]["time_s"]
    )


def test_params_are_those_of_the_weight_file(compiled: Path, example_model: Path) -> None:
    stored = (example_model.parent / "tiny-llama.weights.bin").stat().st_size // 4
    record = json.loads((compiled.parent / "said.json").read_text())
    assert abs(record["model"]["params"] - stored) / stored < 0.01


def test_same_input_same_bytes(compiled: Path, example_model: Path, tmp_path: Path) -> None:
    mapper.compile(example_model, "host", prompt=PROMPT, context=CONTEXT, out=tmp_path / "again")
    names = sorted(p.relative_to(compiled).as_posix() for p in compiled.rglob("*") if p.is_file())
    assert names == sorted(
        p.relative_to(tmp_path / "again").as_posix() for p in (tmp_path / "again").rglob("*")
    )
    assert filecmp.cmpfiles(compiled, tmp_path / "again", names, shallow=False) == (names, [], [])


def test_check_says_that_it_is_legal(compiled: Path) -> None:
    record = said("check", str(compiled))
    assert record["ok"] is True
    assert record["violations"] == []
    assert mapper.check(compiled)


def test_verify_agrees_with_onnxruntime(compiled: Path) -> None:
    record = said("verify", str(compiled), "--tokens", "6")
    assert record["tokens_equal"] is True
    assert record["tokens"] == 6
    assert record["max_rel_err"] <= 1e-3
    assert record["oracle"].startswith("onnxruntime")
    assert record["steps_executed"] > 0


def damaged(compiled: Path, folder: Path, change: Callable[[bytearray], None]) -> Path:
    """A copy of the schedule whose constants (the rotary tables) are changed."""
    shutil.copytree(compiled, folder)
    data = bytearray((folder / "constants.bin").read_bytes())
    change(data)
    (folder / "constants.bin").write_bytes(data)
    return folder


def test_verify_fails_with_1_where_results_differ(compiled: Path, tmp_path: Path) -> None:
    def halve(data: bytearray) -> None:
        numbers = np.frombuffer(data, np.float32)
        numbers *= np.float32(0.5)

    record = said("verify", str(damaged(compiled, tmp_path / "d", halve)), "--tokens", "2", code=1)
    assert record["max_rel_err"] > 1e-3


def test_a_cut_file_is_bad_input(compiled: Path, tmp_path: Path) -> None:
    folder = damaged(compiled, tmp_path / "d", lambda data: data.clear())
    for name in ("check", "verify", "explain"):
        done = inside(name, str(folder))
        assert done.returncode == 2
        assert done.stderr.startswith("mapper: ScheduleError:")
        assert len(done.stderr.splitlines()) == 1


def test_explain_names_constants_units_and_bound(compiled: Path) -> None:
    record = said("explain", str(compiled))
    shown = json.loads((compiled.parent / "said.json").read_text())["phases"]
    for name, phase in record.items():
        assert phase["time_s"] == shown[name]["time_s"]
        assert phase["bound"]["name"] == shown[name]["bound_name"]
        assert phase["constants"]
        assert phase["units"]
    assert "constants that move the time most" in inside("explain", str(compiled)).stdout


def test_report_links_the_trace(compiled: Path, tmp_path: Path) -> None:
    done = inside("report", str(compiled), "--out", str(tmp_path / "r.html"))
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "r.html"))
    assert "trace.json" in (tmp_path / "r.html").read_text()
    assert json.loads((compiled / "trace.json").read_text())["traceEvents"]


def oracle(model: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def onnx_inputs(tokens: int, past: int, seed: int = 5) -> dict[str, Any]:
    """Inputs of the example model by its ONNX names, with a random cache of `past` positions."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Any] = {
        "input_ids": rng.integers(0, 2048, (1, tokens)),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
    }
    for layer in range(4):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{layer}.{kind}"] = rng.normal(size=(1, 4, past, 32)).astype(np.float32)
    return inputs


@pytest.mark.parametrize(("tokens", "past"), [(PROMPT, 0), (1, 7), (PROMPT + 2, 0)])
def test_execute_takes_and_gives_the_models_own_names(
    compiled: Path, example_model: Path, tokens: int, past: int
) -> None:
    inputs = onnx_inputs(tokens, past)
    wanted = oracle(example_model, inputs)
    got = mapper.execute(compiled, inputs)
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert got[name].shape == array.shape
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-3 * np.abs(array).max())


@pytest.mark.parametrize(("tokens", "past"), [(3, 0), (2, 6)])
def test_run_gives_the_graphs_own_outputs(example_model: Path, tokens: int, past: int) -> None:
    graph = mapper.load(example_model)
    inputs = onnx_inputs(tokens, past)
    inputs["attention_mask"][0, :1] = 0  # mapper.run keeps masks, unlike a compiled schedule
    wanted = oracle(example_model, inputs)
    got = mapper.run(graph, inputs)
    assert set(got) == set(wanted)
    rows = slice(1, None) if past == 0 else slice(None)  # a query that may see nothing is not defined
    for name, array in wanted.items():
        part = (slice(None), rows) if name == "logits" else ()
        np.testing.assert_allclose(got[name][part], array[part], rtol=0, atol=1e-3 * np.abs(array).max())


def test_errors_of_the_python_api_are_mapper_errors(compiled: Path, example_model: Path) -> None:
    with pytest.raises(mapper.MapperError, match="unknown target"):
        mapper.compile(example_model, "abacus")
    with pytest.raises(mapper.MapperError, match="padding"):
        mapper.execute(compiled, onnx_inputs(PROMPT, 0) | {"attention_mask": np.zeros((1, PROMPT), np.int64)})
    with pytest.raises(mapper.MapperError, match="missing"):
        mapper.run(mapper.load(example_model), {})
    with pytest.raises(mapper.MapperError):
        mapper.load(example_model.parent)
    with pytest.raises(mapper.MapperError):
        mapper.check(example_model.parent)


def test_run_decodes_as_onnxruntime_does(example_model: Path) -> None:
    start = [400, 37, 512, 9]
    record = said("run", str(example_model), "--ids", ",".join(map(str, start)), "--tokens", "6")
    ids = list(start)
    for _ in range(6):
        inputs = onnx_inputs(len(ids), 0) | {"input_ids": np.array([ids])}
        ids.append(int(oracle(example_model, inputs)["logits"][0, -1].argmax()))
    assert record["ids"] == ids[len(start) :]
    assert record["tokens"] == 6
    assert record["decode"]["measured_s"] > 0
    assert record["decode"]["predicted_s"] > 0


def test_run_streams_text_with_figures_apart(example_model: Path) -> None:
    done = inside("run", str(example_model), "--prompt", "And the king said", "--tokens", "8")
    assert done.returncode == 0
    assert done.stdout.startswith("And the king said")
    assert len(done.stdout) > len("And the king said\n")
    assert "tokens/s" in done.stderr
    assert "predicted" in done.stderr


def test_inspect_and_opt(example_model: Path) -> None:
    record = said("inspect", str(example_model))
    assert (record["layers"], record["heads"], record["kv_heads"], record["head_dim"]) == (4, 8, 4, 32)
    text = inside("opt", str(example_model), "-p", "serve{phase=decode,context=32}").stdout
    assert inside("opt", "-", stdin=text).stdout == text


BAD = {
    "a directory": lambda folder: folder,
    "an empty file": lambda folder: written(folder / "empty.onnx", b""),
    "a cut file": lambda folder: written(folder / "cut.onnx", EXAMPLE.read_bytes()[:5000]),
    "no file": lambda folder: folder / "none.onnx",
    "text": lambda folder: written(folder / "text.onnx", b"hello world, this is no model\n" * 9),
}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_models_are_named_and_leave_nothing(make: Callable[[Path], Path], tmp_path: Path) -> None:
    model = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = inside("compile", str(model), "--target", "host", "--out", str(tmp_path / "made" / "it"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mapper: ModelError:")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_other_things_is_not_replaced(example_model: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = inside("compile", str(example_model), "--target", "host", "--out", str(tmp_path))
    assert done.returncode == 2
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_names_of_a_model_cannot_steer_the_terminal(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    given = helper.make_tensor_value_info("x\x1b[2J\nfine", TensorProto.FLOAT, ["\x1b[1mn", 3])
    made = helper.make_tensor_value_info("\x1b]0;y\x07", TensorProto.FLOAT, None)
    node = helper.make_node("Relu", [given.name], [made.name], name="\x1b[7mn")
    graph = helper.make_graph([node], "\x1b[41m", [given], [made])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    for command in (["inspect", str(path)], ["inspect", str(path), "--json"], ["opt", str(path)]):
        done = inside(*command)
        assert done.returncode == 0 and done.stdout.replace("\n", "").isprintable(), done.stdout
