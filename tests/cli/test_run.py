"""`mapper run`: what it prints, how it draws, where it stops, and what memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper.read_rate import PROBES, read_rate
from mapper.tokens import Reader, Tokens
from tests.command import inside

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "tiny-llama-op18.onnx"


def said(*args: str, model: Path = MODEL) -> Any:
    done = inside("run", str(model), "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command(*args: str, **env: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-m", "mapper", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": paths} | env,
        # a shell's background job ignores Ctrl-C, and so do its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_the_record_adds_up() -> None:
    record = said("--prompt", "And the king said", "--tokens", "12")
    assert record["finish"] == "length"
    assert record["tokens"] == len(record["ids"]) == 12
    assert record["sampling"] == {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0}
    # the example: 4 layers, d 256, 4 KV heads of 32, f32; counted from the file itself
    length = len(record["prompt_ids"]) + 11
    assert record["cache_bytes"] == 4 * 2 * 4 * 32 * 4 * length
    params = MODEL.parent.joinpath("tiny-llama.weights.bin").stat().st_size
    assert 0.8 * params < record["weight_bytes"] < 1.5 * params
    per_token = record["gb_per_s"] * 1e9 / record["tokens_per_s"]
    mean = record["weight_bytes"] + 4 * 2 * 4 * 32 * 4 * (length - 5)
    assert per_token == pytest.approx(mean, rel=1e-6)
    assert record["fraction_of_read_rate"] == pytest.approx(record["gb_per_s"] * 1e9 / record["read_rate"])
    assert record["time_to_first_token_s"] >= record["prefill"]["measured_s"] > 0
    assert record["load_s"] > 0


def test_a_seed_gives_its_text_and_greedy_is_the_default() -> None:
    start = ["--ids", "400,37,512,9", "--tokens", "24"]
    greedy = said(*start)["ids"]
    assert said(*start, "--temperature", "0.9", "--top-k", "1")["ids"] == greedy
    hot = [*start, "--temperature", "1.2"]
    first = said(*hot, "--seed", "1")["ids"]
    assert said(*hot, "--seed", "1")["ids"] == first
    assert said(*hot, "--seed", "2")["ids"] != first
    assert first != greedy


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"], ["--temperature", "1", "--top-p", "0"], ["--top-p", "0.5"],
        ["--weights", "int3"], ["--tokens", "0"],
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_one_line(options: list[str]) -> None:
    done = inside("run", str(MODEL), "--ids", "1,2", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_token_that_ends_the_text_stops(tmp_path: Path) -> None:
    for file in EXAMPLES.glob("tiny-llama*"):
        shutil.copy(file, tmp_path)
    model = tmp_path / MODEL.name
    start = ["--ids", "400,37,512,9", "--tokens", "10"]
    whole = said(*start, model=model)
    end = whole["ids"][4]
    cut = whole["ids"].index(end)
    for name, value in (("config.json", end), ("generation_config.json", [999999, end])):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
        stopped = said(*start, model=model)
        assert (stopped["finish"], stopped["ids"]) == ("stop", whole["ids"][:cut])
        assert said(*start, "--ignore-eos", model=model)["ids"] == whole["ids"]
        (tmp_path / name).unlink()
    shutil.copy(EXAMPLES / "tokenizer.json", tmp_path)
    words = Tokens.beside(model)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": words.tokenizer.id_to_token(end)}})
    )
    prompt = ["--prompt", words.text([400, 37, 512, 9]), "--tokens", "10"]
    record = said(*prompt, "--ignore-eos", model=model)
    ends = end in record["ids"]
    assert said(*prompt, model=model)["finish"] == ("stop" if ends else "length")


def test_text_in_pieces_is_the_text() -> None:
    words = Tokens.beside(MODEL)
    text = "And the king said: naïve — 日本語 🙂 end.\nAnd"
    ids = words.encode(text)
    for cut in (0, 1, 5):
        reader = Reader(words, ids[:cut])
        assert words.text(ids[:cut]) + "".join(reader.add(i) for i in ids[cut:]) == words.text(ids)


def test_ctrl_c_ends_with_the_figures_so_far() -> None:
    running = command("run", str(MODEL), "--ids", "400,37,512,9", "--tokens", "20000")
    assert running.stdout is not None
    assert running.stdout.read(12)  # it decodes
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "tokens/s" in err
    assert "interrupted" in err
    assert "Traceback" not in err


def test_the_best_of_some_probes_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mapper_host.backend import HostBackend

    monkeypatch.setenv("MAPPER_CACHE", str(tmp_path))
    rates = iter([3e9, 9e9, 5e9, 20e9])
    monkeypatch.setattr(HostBackend, "read_rate", lambda self: next(rates))
    assert [read_rate("host") for _ in range(PROBES + 2)] == [3e9, 9e9, 9e9, 9e9, 9e9]
    assert read_rate("host", fresh=True) == 20e9
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("here", "there"))
    with pytest.raises(StopIteration):
        read_rate("host")


def test_the_read_rate_is_one_of_memory() -> None:
    from mapper_host.read_rate import measure

    assert 2e8 < measure() < 5e12


def test_memory_that_is_not_there_is_an_error() -> None:
    from mapper.errors import CapacityError
    from mapper.runtime.memories import empty

    for size in (1 << 60, 1 << 62):
        with pytest.raises(CapacityError, match=str(size)):
            empty(size)


def anonymous_bytes(*args: str, **env: str) -> int:
    """Peak anonymous memory of a command, looked at every 5 ms."""
    running, peak = command(*args, **env), 0
    while running.poll() is None:
        status = Path(f"/proc/{running.pid}/status").read_text()
        found = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, *found, 0)
        time.sleep(0.005)
    _, err = running.communicate()
    assert running.returncode == 0, err
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_weights_take_no_memory_of_the_process(tmp_path: Path) -> None:
    """270 MB of weights, half of which are converted: neither start holds them, and a start that keeps the
    converted ones in memory shows that the figure would tell."""
    model = tmp_path / "gpt2.onnx"
    made = inside(
        "zoo", "make", "gpt2", "-o", str(model), "--layers", "4", "--random-weights", "1", "--dtype", "f32"
    )
    assert made.returncode == 0, made.stderr
    weights = (tmp_path / "gpt2.onnx.data").stat().st_size
    assert weights > 250e6
    decode = ("run", str(model), "--ids", "1,2,3", "--tokens", "2", "--json")
    anonymous_bytes(*decode, MAPPER_WEIGHT_IMAGES="off")  # compiles the kernels, which takes memory too
    images = {"MAPPER_WEIGHT_IMAGES": str(tmp_path / "kept"), "MAPPER_WEIGHTS": "mapped"}
    first, second = anonymous_bytes(*decode, **images), anonymous_bytes(*decode, **images)
    (image,) = (tmp_path / "kept").iterdir()
    assert first < 0.45 * weights
    assert second < 0.45 * weights
    held = anonymous_bytes(*decode, MAPPER_WEIGHT_IMAGES="off", MAPPER_WEIGHTS="mapped")
    assert held - second > 0.7 * image.stat().st_size > 0.2 * weights


def test_the_windows_of_layers_bound_what_a_step_reads() -> None:
    from mapper.traffic import Traffic

    traffic = Traffic(1000, ((8, 0, 0), (8, 4, 0), (8, 0, 4)))
    lengths = np.array([1, 4, 5, 10])
    assert [traffic.bytes(int(n)) for n in lengths] == [1024, 1096, 1000 + 40 + 32 + 8, 1000 + 80 + 32 + 16]


def test_traffic_knows_windows_and_weights(tmp_path: Path) -> None:
    """Gemma 3 has five layers with a window to each without (its report, section 2); embeddings are tied, so
    a step reads the file once, a row of embeddings and one of rotations besides."""
    from mapper import driver, traffic
    from mapper.zoo.families import config, tiny
    from mapper.zoo.files import write

    made = tiny(config("gemma-3-1b"))
    write(made, tmp_path / "m.onnx", "f32", seed=1)
    graph = driver.load(tmp_path / "m.onnx")
    moved = traffic.of(driver.build(graph, "host", context=32, prompt=4).schedule, graph)
    assert not any(chunk for _, _, chunk in moved.caches)
    windows = [window for _, window, _ in moved.caches[::2]]
    assert [w == 0 for w in windows] == [(i + 1) % 6 == 0 for i in range(len(made.layers))]
    assert len({w for w in windows if w}) == 1
    size = (tmp_path / "m.onnx.data").stat().st_size
    assert size <= moved.weights < 1.01 * size
