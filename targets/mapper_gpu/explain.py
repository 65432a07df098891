"""Why a step takes its time: utilisation of each reading of "peak", where the time goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mapper.backend import Finding
from mapper.machine import Machine
from mapper.schedule.tables import Phase, Schedule
from mapper_gpu.explain_stages import stages
from mapper_gpu.hardware import Gpu, element_bytes, gpu
from mapper_gpu.timing import lead_seconds

READINGS = {"bf16": "bf16 dense", "fp8": "fp8 dense", "fp4": "fp4 dense", "f32": "f32"}


def explain(schedule: Schedule, machine: Machine) -> Mapping[Phase, Sequence[Finding]]:
    """Tables per phase, from the schedule's tables and the machine."""
    chip = gpu(machine)
    found: dict[Phase, Sequence[Finding]] = {}
    for phase, program in schedule.programs.items():
        seconds = program.cycles / schedule.clock_hz
        name: Phase = "decode" if phase == "decode" else "prefill"
        found[name] = (
            _peaks(schedule, phase, chip, machine, seconds),
            _parts(schedule, phase, chip, seconds),
            _kernels(schedule, phase, chip),
            *stages(schedule, phase, chip),
            *_experts(schedule, phase),
            *_stored(schedule, phase, chip),
        )
    return found


def _totals(schedule: Schedule, phase: str) -> tuple[float, float]:
    """(HBM bytes, operations) of one run on all chips."""
    moved = work = 0.0
    for block in schedule.programs[phase].blocks:
        moved += block.repeat * float(block.steps.column("bytes").sum())
        work += block.repeat * float(block.steps.column("flops").sum())
    return moved, work


def _peaks(schedule: Schedule, phase: str, chip: Gpu, machine: Machine, seconds: float) -> Finding:
    """Operations done per second over each figure that is called peak, and what memory alone would allow."""
    moved, work = _totals(schedule, phase)
    rate = work / seconds / schedule.chips
    intensity = work / max(1.0, moved)
    rows: list[tuple[str | float, ...]] = []
    for name, words in READINGS.items():
        if name not in chip.tensor:
            continue
        peaks = [(words, chip.tensor[name])]
        if name != "f32" and "tensor.sparsity" in machine.constants and machine.value("tensor.sparsity") > 1:
            peaks.append(
                (words.replace("dense", "2:4 sparse"), chip.tensor[name] * machine.value("tensor.sparsity"))
            )
        for said, peak in peaks:
            ceiling = min(1.0, intensity * chip.hbm / peak)
            rows.append((said, peak / 1e12, rate / 1e12, 100 * rate / peak, 100 * ceiling, peak / chip.hbm))
    title = (
        f"why the arithmetic units sit idle: {intensity:.3g} operations per HBM byte "
        f"({work:.4g} operations, {moved:.4g} B); a peak is reached from 'needs' on"
    )
    columns = ("peak", "TFLOP/s", "achieved TFLOP/s", "used %", "HBM allows %", "needs op/B")
    return Finding(title, columns, tuple(rows))


def _parts(schedule: Schedule, phase: str, chip: Gpu, seconds: float) -> Finding:
    """The step's time, part by part; what is left over comes of waves, tails, L2, merges, arithmetic."""
    moved, _ = _totals(schedule, phase)
    far = moved / (schedule.chips // int(schedule.plan.get("stages", 1)))
    launches = leads = links = 0.0
    starts = lead_seconds(chip)
    for block, record in zip(schedule.programs[phase].blocks, schedule.plan["blocks"][phase], strict=True):
        for k in record["kernels"]:
            if k["kind"] == "collective":
                links += block.repeat * k["seconds"]
            else:
                leads += block.repeat * float(starts[1])
        launches += block.repeat * len(record["kernels"])
    persistent = schedule.plan["style"] == "megakernel"
    gaps = 0.0 if persistent else (launches - 1) * chip.gap
    leads = 0.0 if persistent else leads
    rows: list[tuple[str | float, float]] = [
        ("bytes from HBM at the pins' rate", far / chip.hbm),
        ("what HBM does not reach of that rate", far / chip.stream - far / chip.hbm),
        (f"{launches - 1:.0f} launch gaps", gaps),
        ("starts of kernels and first latencies", leads),
        ("collectives", links),
        ("around the step", chip.step),
    ]
    rest = seconds - sum(r[1] for r in rows)
    rows.append(("waves, tails, L2, merges, arithmetic, less what overlaps", rest))
    shares = tuple((name, 1e6 * s, 100 * s / seconds) for name, s in rows)
    return Finding("where the time goes", ("part", "us", "%"), shares)


def _kernels(schedule: Schedule, phase: str, chip: Gpu) -> Finding:
    """Kernels by their share of the time, with the HBM rate that each reaches."""
    rows: list[tuple[float, tuple[str | float, ...]]] = []
    for block, record in zip(schedule.programs[phase].blocks, schedule.plan["blocks"][phase], strict=True):
        for k in record["kernels"]:
            total = block.repeat * float(k["seconds"])
            rate = k["hbm_bytes"] / k["seconds"] / 1e12
            name, megabytes = f"{k['kind']} {k['name']}", k["hbm_bytes"] / 1e6
            each, total_us = 1e6 * k["seconds"], 1e6 * total
            row = (name, block.repeat, each, total_us, megabytes, rate, _waves(k, chip), k["limit"])
            rows.append((total, row))
    ordered = tuple(r for _, r in sorted(rows, key=lambda r: -r[0]))
    columns = ("kernel", "runs", "us each", "us in all", "MB each", "TB/s", "waves", "limit")
    return Finding("kernels (of one chip)", columns, ordered)


def _experts(schedule: Schedule, phase: str) -> tuple[Finding, ...]:
    """What products of experts read and work through, where all choices are equally likely."""
    rows: list[tuple[str | float, ...]] = []
    for block, record in zip(schedule.programs[phase].blocks, schedule.plan["blocks"][phase], strict=True):
        for k in record["kernels"]:
            if "experts" in k:
                e = k["experts"]
                used = 100 * e["fullest"] / (e["filled"] * e["rows"])
                even = 1 - (1 - e["chosen"] / e["count"]) ** e["tokens"]
                mean = e["count"] / e["owners"] * even
                weight = e["mats"] * e["n"] * e["k"] * e["element"] / 1e6
                rows.append((
                    k["name"], block.repeat, e["tokens"], f"{e['chosen']} of {e['count']}", e["owners"], mean,
                    e["distinct"], weight, f"{e['filled']} of {e['blocks']}", e["rows"], used,
                ))  # fmt: skip
    columns = (
        "kernel", "runs", "tokens", "chosen", "groups", "experts read", "of the fullest", "MB each", "blocks",
        "rows", "rows used %",
    )  # fmt: skip
    title = (
        "experts of an even routing: their weights are read once, rows of a block are padded; groups of "
        "chips with experts of their own wait for the fullest"
    )
    return (Finding(title, columns, tuple(rows)),) if rows else ()


def _waves(kernel: Any, chip: Gpu) -> float:
    """Tasks over SMs: 3.1 waves take as long as 4 where bandwidth does not smooth the last."""
    return float(np.round(kernel["tasks"] / chip.sms, 2))


def _stored(schedule: Schedule, phase: str, chip: Gpu) -> Iterator[Finding]:
    """Low-bit weights: what they take in memory, and what products with them are computed in."""
    found: dict[tuple[str, str], list[float]] = {}
    for block, record in zip(schedule.programs[phase].blocks, schedule.plan["blocks"][phase], strict=True):
        for k in record["kernels"]:
            for w in k["weights"]:
                if "stored" in w:
                    sums = found.setdefault((w["stored"], w["dtype"]), [0.0, 0.0])
                    sums[0] += block.repeat * w["elements"]
                    sums[1] += block.repeat * w["bytes"]
    if not found:
        return
    native = sorted({"fp8", "int8", "fp4"} & set(chip.tensor))
    idle = f"; the {', '.join(native)} rates of this machine are not used" if native else ""
    rows = tuple(
        (stored, size / 1e6, 8 * size / elements, elements * element_bytes(form) / 1e6, f"{form} x {form}")
        for (stored, form), (elements, size) in sorted(found.items())
    )
    columns = ("stored", "MB", "bits/weight", "MB in operand type", "products")
    title = f"low-bit weights (of one chip): decoded by each tile, activations are not quantised{idle}"
    yield Finding(title, columns, rows)
