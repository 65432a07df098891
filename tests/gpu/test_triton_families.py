"""Emitted kernels of models beside the dense ones: ALiBi, low-bit weights, experts, latent attention. Held
against onnxruntime under Triton's interpreter, and compiled for sm_90, which asks for more than it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mapper.machine import parse
from mapper.schedule.store import load
from mapper.zoo.config import Config
from mapper.zoo.families import config, shortened, tiny
from mapper.zoo.files import write
from mapper_gpu import flash
from tests.frontend import tiny as spelled
from tests.gpu.common import h100
from tests.gpu.test_packed_models import packed
from tests.gpu.triton_common import COMPILE, compiled, kernels, needs_triton, told

TOLD = """
import json, sys
from pathlib import Path
from mapper.schedule.store import load
from mapper_gpu.triton_cli import verify
from tests.gpu.triton_codes import outcomes
found = [verify(load(folder), Path(folder), None, 1) for folder in sys.argv[2:]]
print(json.dumps([outcomes(Path(sys.argv[1])), [[x.ok, x.tokens, x.max_rel_err] for x in found]]))
"""


def dense(folder: Path, hidden: int = 64, inner: int = 96) -> Path:
    """One layer whose products have K of whole blocks of 32."""
    made = shortened(tiny(config("llama-3.1-8b")), 1)
    layer = replace(made.layers[0], inner=inner)
    made = replace(made, hidden=hidden, heads=2, kv_heads=1, head_dim=32, vocab=40, layers=(layer,))
    return written(made, folder)


def written(made: Config, folder: Path) -> Path:
    """A model's file, with random weights."""
    write(made, folder / "m.onnx", "f32", 2)
    return folder / "m.onnx"


def mixture(name: str, count: int = 8, **changed: Any) -> Callable[[Path], Path]:
    """One layer of a mixture of the zoo at toy widths; inner columns of an expert are whole blocks of 32."""

    def make(folder: Path) -> Path:
        made = shortened(tiny(config(name)), 1)
        (layer,) = made.layers
        assert layer.experts is not None
        held = replace(layer.experts, inner=64, count=count)
        return written(replace(made, layers=(replace(layer, experts=held, **changed),)), folder)

    return make


def latent(folder: Path) -> Path:
    """DeepSeek's first dense layer and its first one with experts."""
    made = shortened(tiny(config("deepseek-v3")), 4)
    return written(replace(made, layers=(made.layers[0], made.layers[3])), folder)


def alibi(folder: Path) -> Path:
    """Slopes per head."""
    return spelled.saved(spelled.decoder(spelled.Options(alibi=True, layers=1)), folder)


def stored(bits: int, block: int, zero: str, accuracy: int = 0) -> Callable[[Path], Path]:
    """A model with MatMulNBits."""
    return lambda folder: packed(folder, bits, block, zero, accuracy, of=dense(folder))


@dataclass(frozen=True)
class Case:
    """A model and a request; `error` bounds the largest error over the largest logit: float32's rounding, or
    what products in 16 bits leave of it. `room` is what a task of attention accumulates,
    `splits` are parts of the cache (0: as it is)."""

    make: Callable[[Path], Path]
    request: dict[str, Any] = field(default_factory=dict)
    error: float = 1e-5
    room: int = 0
    splits: int = 0


FEW = parse(h100().text.replace("count = { value = 132", "count = { value = 2"))
EAGER = h100(sm__in_flight=512)
"""Makes parts of K, and many."""
SLOW = FEW.replace({"vector.f32": 1e9})
"""Makes the choice of experts a kernel of its own, as at many tokens."""
LOW = 0.005
CASES = {
    "slopes": Case(alibi, {"context": 130}, splits=2),
    "int4, K in parts": Case(partial(dense, hidden=128), {"weights": "int4", "machine": EAGER}, LOW),
    "e4m3, K in parts": Case(dense, {"weights": "f8e4m3", "machine": EAGER}, LOW),
    "int8": Case(dense, {"weights": "int8"}, LOW),
    "mxfp4, long rows": Case(
        partial(dense, hidden=160, inner=288), {"weights": "mxfp4", "prompt": 66, "context": 70}, LOW
    ),
    "zero points in float": Case(stored(4, 16, "float")),
    "rounded activations": Case(stored(4, 64, "packed", 4)),
    "biases, a clamp": Case(mixture("gpt-oss-20b")),
    # more tokens, blocks and pairs than the routing holds at a time
    "many experts": Case(mixture("qwen3-30b-a3b", 128), {"batch": 5, "prompt": 8, "machine": FEW}),
    "shares on the input": Case(mixture("llama-4-scout", chunk=0, tuned=False)),
    "int4 experts": Case(mixture("mixtral-8x7b"), {"weights": "int4", "batch": 5, "machine": SLOW}, LOW),
    "mxfp4 experts": Case(mixture("gpt-oss-20b"), {"weights": "mxfp4"}, LOW),
    "latent": Case(latent, {"batch": 2}),
    "latent, in parts": Case(latent, {"batch": 2, "prompt": 3, "context": 130}, room=40, splits=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The schedules of all cases."""
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "ACCUMULATORS", case.room or flash.ACCUMULATORS)
            patch.setattr(flash, "KEY_SPLITS", (case.splits,) if case.splits else flash.KEY_SPLITS)
            flash.choose.cache_clear()
            compiled(folder / "s", case.make(folder), **{"prompt": 4, "context": 12, **case.request})
            flash.choose.cache_clear()
        found[name] = folder / "s"
    return found


@pytest.fixture(scope="module")
def executed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of every code, and of every case: one process, as importing torch takes seconds."""
    return told(TOLD, str(tmp_path_factory.mktemp("codes")), *map(str, folders.values()), interpret=True)


@needs_triton
@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_kernels_agree_with_onnxruntime(number: int, executed: Any) -> None:
    ok, tokens, error = executed[1][number]
    assert ok and tokens >= 1
    assert error < list(CASES.values())[number].error


@needs_triton
def test_every_code_is_decoded(executed: Any) -> None:
    """Bit for bit in float32: the 256 codes of e4m3, the 16 of e2m1 at the exponents of E8M0, integers of
    2, 4 and 8 bits with zero points of as many."""
    assert executed[0] == dict.fromkeys(("e4m3", "e2m1", "int2", "int4", "int8"), True)


def test_the_cases_reach_what_they_are_there_for(folders: dict[str, Path]) -> None:
    found = {name: load(folder).plan for name, folder in folders.items()}
    held = {name: [k for b in plan["blocks"].values() for k in kernels(b)] for name, plan in found.items()}
    steps = {name: [i for p in plan["programs"]["decode"] for i in p["code"]] for name, plan in found.items()}
    code = {name: {i[0] for i in mine} for name, mine in steps.items()}
    for name in ("int4, K in parts", "e4m3, K in parts"):
        assert any(k["tile"]["splits"] > 1 for k in held[name] if "tile" in k), name
        assert "dequantise" in code[name]
    assert {k["tile"]["m"] for k in held["mxfp4, long rows"] if "tile" in k} >= {64}
    for name in ("slopes", "latent, in parts"):
        assert any(k["split"]["splits"] > 1 for k in held[name] if "split" in k), name
    assert all(k["attention"]["kv_heads"] == 2 for k in held["latent, in parts"] if "attention" in k)
    assert "attend_latent" in code["latent"] and "round_blocks" in code["rounded activations"]
    assert any(k["experts"]["tile"]["run"] > 1 for k in held["many experts"] if "experts" in k)
    assert {"expert_bias", "share_bias"} <= code["biases, a clamp"]
    gathers = [i for i in steps["shares on the input"] if i[0] == "gather"]
    assert gathers and all(i[5] is not None for i in gathers)
    apart = [p["kind"] for p in found["int4 experts"]["programs"]["prefill"] if p["code"][1][0] == "top_k"]
    assert apart == ["rows"]
    chosen = [i for i in steps["latent"] if i[0] == "top_k"]
    assert chosen and all(i[6] > 1 and i[3] is not None for i in chosen)


@needs_triton
def test_kernels_compile_for_sm90(tmp_path: Path) -> None:
    """Lanes of several shapes, floating-point codes of both kinds, products in 16 bits: the interpreter lets
    variables of several shapes pass that the compiler refuses."""
    asked = {"latent": (latent, "f8e4m3"), "experts": (mixture("gpt-oss-20b"), "mxfp4")}
    for name, (make, weights) in asked.items():
        (tmp_path / name).mkdir()
        compiled(tmp_path / name / "s", make(tmp_path / name), weights=weights, context=64, phase="decode")
    folders = [str(tmp_path / name / "s") for name in asked]
    found = told(COMPILE, *folders, interpret=False, cache=tmp_path / "cache")
    for rows in found:
        # of some kernels with few registers the assembler keeps one address on the stack
        assert rows and all(row["fits"] and row["stack"] <= 8 for row in rows)
