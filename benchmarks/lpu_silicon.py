"""The LPU model against silicon: one LSTM step on one chip, in cycles.

    python -m benchmarks.lpu_silicon --hidden 512 --batch 1 --json

Builds one step of an int8 LSTM (four products of [B, 2h] x [2h, h], scale and bias, gates, new cell and
hidden state) directly in the IR, lowers it with the lpu backend, checks and executes the schedule, compares
it with NumPy, and prints its cycles beside those that GroqView gave for Groq's own compiler
(github.com/groq/GroqAPI, gapi/notebooks/lstm.ipynb, January 2023; h = 512). `low` and `high` are this
schedule's cycles when each assumed machine constant goes to its bounds, deviations summed in quadrature.
Nothing is fitted to the published numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from mapper import machine as machines
from mapper.backend import load
from mapper.ir.builder import GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.types import TensorType
from mapper.ir.weights import WeightSymbol
from mapper.machine import Machine
from mapper.runtime.execute import Session
from mapper.schedule.checks import run_checks
from mapper.schedule.tables import Schedule
from mapper_lpu import BACKEND
from mapper_lpu.cell import lower_cell

PUBLISHED = {(512, 1): 670, (512, 3): 718, (512, 8): 838}
"""Cycles by (hidden, batch), from GroqView: see the module."""

GATES = ("i", "f", "g", "o")
STATE_SCALE = 127.0
Arrays = dict[str, npt.NDArray[Any]]


def lstm(hidden: int, batch: int, seed: int = 0) -> Graph:
    """One LSTM step with random int8 weights: inputs x, h (i8) and c (f32), outputs c and h."""
    rng = np.random.default_rng(seed)
    b = GraphBuilder("lstm")
    x = b.input("x", TensorType.of([batch, hidden], "i8"))
    h = b.input("h", TensorType.of([batch, hidden], "i8"))
    c = b.input("c", TensorType.of([batch, hidden], "f32"))
    both = b.add("cast", [b.add("concat", [x, h], {"axis": 1})], {"dtype": "i32"})
    gates = {}
    for name in GATES:
        weights = rng.integers(-127, 128, (2 * hidden, hidden)).astype(np.int8)
        bias = rng.standard_normal(hidden).astype(np.float32) / 2
        b.weight(WeightSymbol.of(f"W{name}", weights))
        b.weight(WeightSymbol.of(f"b{name}", bias))
        product = b.add("matmul", [both, b.add("cast", [b.load(f"W{name}")], {"dtype": "i32"})])
        scale = np.float32(2.0 / (73.0 * 73.0 * math.sqrt(2 * hidden)))
        scaled = b.add("mul", [b.add("cast", [product], {"dtype": "f32"}), b.constant(scale)])
        biased = b.add("add", [scaled, b.load(f"b{name}")])
        gates[name] = b.add("tanh" if name == "g" else "sigmoid", [biased])
    kept = b.add("mul", [gates["f"], c])
    new = b.add("add", [kept, b.add("mul", [gates["i"], gates["g"]])])
    out = b.add("mul", [gates["o"], b.add("tanh", [new])])
    small = b.add("cast", [b.add("mul", [out, b.constant(np.float32(STATE_SCALE))])], {"dtype": "i8"})
    return b.finish({"c_out": new, "h_out": small})


def reference(graph: Graph, inputs: Arrays) -> Arrays:
    """The step in NumPy float64, written apart from the compiler; h as int8 rounded to nearest."""
    both = np.concatenate([inputs["x"], inputs["h"]], axis=1).astype(np.int64)
    hidden = inputs["c"].shape[1]
    gate = {}
    for name in GATES:
        total = both @ graph.weights[f"W{name}"].load().astype(np.int64)
        scale = np.float64(np.float32(2.0 / (73.0 * 73.0 * math.sqrt(2 * hidden))))
        z = total * scale + graph.weights[f"b{name}"].load()
        gate[name] = np.tanh(z) if name == "g" else 1.0 / (1.0 + np.exp(-z))
    cell = gate["f"] * inputs["c"] + gate["i"] * gate["g"]
    return {"c_out": cell, "h_out": np.rint(gate["o"] * np.tanh(cell) * STATE_SCALE)}


def random_inputs(hidden: int, batch: int, seed: int) -> Arrays:
    """Inputs of one step."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.integers(-127, 128, (batch, hidden)).astype(np.int8),
        "h": rng.integers(-127, 128, (batch, hidden)).astype(np.int8),
        "c": rng.standard_normal((batch, hidden)).astype(np.float32),
    }


def errors(graph: Graph, schedule: Schedule, inputs: Arrays) -> dict[str, float]:
    """Largest difference of the executed schedule from NumPy, per output."""
    out = Session(schedule, BACKEND.semantics()).run("decode", inputs)
    wanted = reference(graph, inputs)
    return {name: float(np.abs(out[name].astype(np.float64) - wanted[name]).max()) for name in wanted}


def band(schedule: Schedule, machine: Machine) -> tuple[int, int]:
    """(low, high) cycles: each constant to its bounds, one at a time, deviations summed in quadrature."""
    cycles = schedule.programs["decode"].cycles
    below = above = 0.0
    for key in machine.ranged():
        constant = machine.get(key)
        for value in (constant.low, constant.high):
            seconds = BACKEND.retime(schedule, machine.replace({key: value}))["decode"]
            change = seconds * machine.replace({key: value}).value("chip.clock") - cycles
            below, above = (below + change**2, above) if change < 0 else (below, above + change**2)
    return round(cycles - math.sqrt(below)), round(cycles + math.sqrt(above))


def measure(hidden: int, batch: int) -> dict[str, Any]:
    """Cycles of the step, published cycles (None where there are none), band, and how it was checked."""
    backend = load("lpu")
    machine = machines.find(backend.default_machine, backend.machine_files())
    graph = lstm(hidden, batch)
    schedule = lower_cell(graph, machine)
    broken = [name for name, found in run_checks(schedule, backend.checks()).items() if found]
    if broken:
        raise SystemExit(f"the schedule breaks {', '.join(broken)}")
    low, high = band(schedule, machine)
    worst = errors(graph, schedule, random_inputs(hidden, batch, 1))
    return {
        "hidden": hidden,
        "batch": batch,
        "cycles": schedule.programs["decode"].cycles,
        "published": PUBLISHED.get((hidden, batch)),
        "low": low,
        "high": high,
        "max_error_c": worst["c_out"],
        "max_error_h": worst["h_out"],
    }


def main(
    hidden: Annotated[int, typer.Option(min=16, help="hidden size h")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="rows per step")] = 1,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """One LSTM step: cycles of our schedule beside those of the real chip."""
    row = measure(hidden, batch)
    if json_:
        print(json.dumps(row))
        return
    table = Table(title=f"LSTM step, h = {hidden}, batch {batch}, one chip: {Path(__file__).stem}")
    for name in row:
        table.add_column(name, justify="right")
    table.add_row(*(f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
