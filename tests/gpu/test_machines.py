"""Every machine file of the target: whole, physically consistent, and complete by the contract of
h100-sxm."""

from __future__ import annotations

from pathlib import Path

import pytest

import mapper_gpu
from mapper.machine import Machine, read
from mapper_gpu.hardware import gpu
from mapper_gpu.rates import rates
from mapper_gpu.serving import CALIBRATED, SYSTEMS, machine_of
from mapper_gpu.stacks import kernels

FOLDER = Path(mapper_gpu.__file__).parent / "machines"
FILES = sorted(FOLDER.glob("*.toml"))
WANTED = {
    "a100-80g-sxm", "h100-sxm", "h200-sxm", "gh200", "b200", "gb200", "b300", "tpu-v5e", "tpu-v5p", "tpu-v6e",
    "tpu-ironwood", "trainium2", "trainium3", "inferentia2", "maia-200",
}  # fmt: skip
CYCLE = {"a100": 2048, "h100": 4096, "h200": 4096, "gh200": 4096, "b200": 8192, "gb200": 8192, "b300": 8192}
"""bf16 FLOP per SM and cycle, dense: 4 tensor cores of 256, 512 and 1024 multiply-adds."""
OPTIONAL = {f"tensor.{name}" for name in ("f16", "fp8", "int8", "fp4")}
PUBLISHED = (
    "stated", "aiconfigurator", "hardware.md", "LLMCompass", "data sheet", "guide", "ISA", "rental",
    "NVSwitch", "DGX", "HGX", "SIMT", "wgmma", "systolic", "no cache", "as ", "sparsity", "registers",
    "multicast",
)  # fmt: skip


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def machine(request: pytest.FixtureRequest) -> Machine:
    path: Path = request.param
    return read(path)


def test_all_are_there() -> None:
    assert {p.stem for p in FILES} >= WANTED
    assert {machine for _, machine in SYSTEMS} <= {p.stem for p in FILES}
    assert {machine_of(s, "x") for s in CALIBRATED} == {"h100-sxm", "h200-sxm", "b200", "gb200"}


def test_argonnes_a100s_are_the_smaller_ones() -> None:
    assert machine_of("A100", "argonne-lcf/LLM-Inference-Bench (vLLM)") == "a100-40g-sxm"
    assert machine_of("A100", "aiconfigurator") == machine_of("A100 SXM", "argonne") == "a100-80g-sxm"
    assert machine_of("Groq LPU v1", "press") is None and machine_of("H100 PCIe", "x") is None
    names = {"GH200": "gh200", "B300 SXM": "b300", "A100-SXM4-80GB": "a100-80g-sxm", "H200 SXM": "h200-sxm"}
    assert {n: machine_of(n, "x") for n in names} == names


def test_it_has_what_the_contract_names(machine: Machine) -> None:
    contract = read(FOLDER / "h100-sxm.toml")
    assert machine.target == "gpu"
    missing = {k for k in contract.constants if k not in OPTIONAL} - set(machine.constants)
    assert not missing
    for key, constant in machine.constants.items():
        if key in contract.constants and contract.get(key).unit not in ("SMs", "OP/s", "FLOP/s"):
            assert constant.unit == contract.get(key).unit or machine.value("geometry.systolic"), key
    gpu(machine)
    rates(machine, kernels())


def test_the_peak_is_what_its_units_make(machine: Machine) -> None:
    """Cores x clock x FLOP per cycle meets the stated peak at a clock inside the stated range."""
    if machine.value("geometry.systolic"):
        cells = (
            machine.value("geometry.rows")
            * machine.value("geometry.columns")
            * machine.value("geometry.arrays")
        )
        cycle = 2 * cells
    else:
        cycle = CYCLE[machine.name.split("-")[0]]
    clock = machine.value("tensor.bf16") / (machine.value("sm.count") * cycle)
    assert machine.get("sm.clock").low * 0.999 <= clock <= machine.get("sm.clock").high * 1.001


def test_narrower_formats_are_faster_and_scalars_slower(machine: Machine) -> None:
    order = [f"tensor.{n}" for n in ("f32", "bf16", "fp8", "fp4") if f"tensor.{n}" in machine.constants]
    peaks = [machine.value(k) for k in order]
    assert peaks == sorted(peaks)
    if "tensor.fp8" in machine.constants:
        assert 1.5 <= machine.value("tensor.fp8") / machine.value("tensor.bf16") <= 4


def test_memories_and_links_are_in_order(machine: Machine) -> None:
    hbm, link, network = (machine.value(f"{k}.bandwidth") for k in ("memory.hbm", "link", "network"))
    assert hbm > link > network > 0
    assert machine.value("memory.l2.bandwidth") >= hbm
    assert machine.value("memory.l2.latency") <= machine.value("memory.hbm.latency")
    assert machine.value("memory.hbm.capacity") > 100 * machine.value("memory.l2.capacity")
    assert 1 < hbm / 1e11 < 200
    assert 2 <= machine.value("memory.hbm.capacity") / hbm * 1e3 <= 60  # ms to read all of it once


def test_what_is_published_names_where_and_what_is_recalled_is_assumed(machine: Machine) -> None:
    for key, constant in machine.constants.items():
        assert constant.source, key
        if machine.name != "h100-sxm" and constant.kind == "published":
            assert "recalled" not in constant.source, key
            assert any(word in constant.source for word in PUBLISHED), key
        if constant.kind in ("published", "derived"):
            assert "no source" not in constant.source, key


def test_the_boards_of_hardware_md() -> None:
    """Figures typed again from the fact sheet, not from the files."""
    facts = {
        "h200-sxm": (989e12, 141e9, 4.8e12, 450e9, 700), "b200": (2250e12, 180e9, 7.7e12, 900e9, 1000),
        "gb200": (2500e12, None, 8.0e12, 900e9, 1200), "b300": (2250e12, None, 7.75e12, 900e9, 1100),
        "a100-80g-sxm": (312e12, 80e9, 2.039e12, 300e9, None), "maia-200": (None, 216e9, 7e12, 1.4e12, 750),
    }  # fmt: skip
    keys = ("tensor.bf16", "memory.hbm.capacity", "memory.hbm.bandwidth", "link.bandwidth", "power.board")
    for name, figures in facts.items():
        machine = read(FOLDER / f"{name}.toml")
        for key, figure in zip(keys, figures, strict=True):
            assert figure is None or machine.value(key) == pytest.approx(figure), (name, key)
    assert read(FOLDER / "b300.toml").value("tensor.fp4") == 14000e12
