"""Runs each emitted kernel of a decode step under Triton's interpreter on bf16 weights and caches, and holds
it against float64 and a bound on its rounding errors: see running_error.

    python -m tests.gpu.bf16_kernels FOLDER     # prints, as JSON, one object per stored value

A kernel's operands are what the kernels before it left, so that each bound is the kernel's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.gpu_decoder import Image
from mapper.schedule.store import load
from mapper.schedule.tables import Schedule
from mapper_gpu.triton_emit import Stage, extents, stages
from mapper_gpu.triton_run import Runner, module
from tests.gpu.running_error import NUMPY, Array, Bounded, Reference


class Values:
    """Arrays of operands, in float64, out of the panels of the memory image."""

    def __init__(self, schedule: Schedule, memory: Any, batch: int) -> None:
        names, programs = (schedule.buffers.column(c).to_pylist() for c in ("value", "program"))
        self._where = {
            n: i for i, (n, p) in reversed(list(enumerate(zip(names, programs, strict=True))))
            if p in ("", "decode")
        }  # fmt: skip
        self._first, self._size = extents(schedule)
        self._memory, self._batch = memory, batch

    def read(self, operand: Mapping[str, Any]) -> Array:
        """See Reference.read."""
        number, panel, width = self._where[operand["value"]], operand["panel"], operand["width"]
        low = self._first[number]
        data = self._memory[low : low + self._size[number]].view(NUMPY[operand["dtype"]]).astype(np.float64)
        if operand["r"] == "cache":
            return np.asarray(data.reshape(width // panel, self._batch, -1, panel))
        return np.asarray(data.reshape(width // panel, -1, panel).transpose(1, 0, 2).reshape(-1, width))


def outcomes(schedule: Schedule, folder: str) -> Iterator[dict[str, Any]]:
    """Per stored value: its kernel, format, how much of its bound the largest error takes, the same beside a
    reference whose weights and caches are moved by one column, and the bound over the largest magnitude."""
    image = Image(schedule, "cpu")
    runner = Runner(schedule, "decode", module(schedule, "decode", folder), image.memory)
    values = Values(schedule, image.memory.numpy(), int(schedule.plan["batch"]))
    launches = iter(runner.launches)
    reference = Reference(int(schedule.plan["batch"]), values.read)
    moved = Reference(int(schedule.plan["batch"]), lambda o: _moved(values.read(o), o))
    for block, record in zip(
        schedule.programs["decode"].blocks, schedule.plan["blocks"]["decode"], strict=True
    ):
        assert block.repeat == 1
        for stage in stages(schedule, "decode", block, record["kernels"], 0):
            parts = _parts(stage)
            wanted = [w for p, part in parts for w in reference.run(p, part)]
            wrong = [w for p, part in parts for w in moved.run(p, part)]
            runner.launch(*next(launches))
            for (operand, bounded, past), (_, other, _) in zip(wanted, wrong, strict=True):
                if operand["value"].endswith((".sum", ".stats")):
                    continue  # a stretch of the cache: its merge is held against the whole
                got = values.read(operand)
                if past >= 0:
                    got = got[:, :, past].transpose(1, 0, 2).reshape(bounded.value.shape)
                yield {
                    "kernel": stage.name, "stored": operand["dtype"], "engine": _engine(stage.record),
                    "taken": _taken(got, bounded), "moved": _taken(got, other),
                    "bound": float(bounded.error.max() / abs(bounded.value).max()),
                }  # fmt: skip


def _moved(value: Array, operand: Mapping[str, Any]) -> Array:
    table = operand["r"] == "all" and operand["rows"] > 1 and operand["dtype"] == "bf16"
    return np.roll(value, 1, -1) if table or operand["r"] in ("n", "cache") else value


def _parts(stage: Stage) -> list[tuple[Any, tuple[int, int]]]:
    """The programs of a stage, each with its part of K."""
    splits = stage.record["tile"]["splits"] if stage.kind == "product" else 1
    return [(p, (i % splits, splits)) for i, p in enumerate(stage.programs)]


def _engine(record: Any) -> str:
    return str(record["tile"]["engine"]) if "tile" in record else ""


def _taken(got: Array, wanted: Bounded) -> float:
    """The largest error over its bound; 0 where both are zero."""
    error = abs(got - wanted.value)
    return float(np.max(np.divide(error, wanted.error, out=np.where(error > 0, np.inf, 0.0),
                                  where=wanted.error > 0)))  # fmt: skip


if __name__ == "__main__":
    print(json.dumps([list(outcomes(load(folder), folder)) for folder in sys.argv[1:]]))
