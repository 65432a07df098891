"""Fit the constants of serving software on GPUs to published results, and show the errors on what was left
out.

    python -m benchmarks.gpu_calibration             # fit, print constants and errors
    python -m benchmarks.gpu_calibration --cross     # fit without each system, errors on that system
    python -m benchmarks.gpu_calibration --write     # and put the constants into targets/mapper_gpu

The fit sees the calibration subset only (`mapper.published.subset`: a quarter of the configurations, chosen
by a hash), and of each configuration at most PER rows, again by a hash. It minimises the Huber loss of
log(predicted / published) by Gauss-Newton steps in the logarithms of the constants, inside their ranges.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mapper.driver import load
from mapper.errors import MapperError
from mapper.machine import Machine, read
from mapper.published.evaluate import predict, stack_of
from mapper.published.formats import formats
from mapper.published.points import Point, point
from mapper.published.rows import default_file
from mapper.published.rows import read as read_rows
from mapper.published.score import score
from mapper.published.subset import calibrates, configuration
from mapper.serving.phases import Deployment
from mapper_gpu import serving, stacks
from mapper_gpu.phases import GpuPhases
from mapper_gpu.rates import rates
from mapper_gpu.work import Work, work

CONSTANTS = (
    "software:kernels.stream",
    "software:kernels.tensor",
    "software:kernels.grouped",
    "software:kernels.unpack",
    "software:kernels.gap",
    "software:exchange.latency",
    "vllm-2024:host.iteration",
    "vllm-2024:host.sequence",
    "trtllm-2024:host.iteration",
)
PER = 3
HUBER = 0.12  # of log error: beyond it a row counts linearly, so that odd rows do not rule the fit
STEP = 0.05
Values = Mapping[str, float]
Floats = npt.NDArray[np.float64]
TARGET = Path(serving.__file__).parent


def file_of(name: str) -> Path:
    """The file of a group of constants."""
    return stacks.KERNELS if name == "software" else stacks.FOLDER / f"{name}.toml"


@cache
def _machine(path: Path) -> Machine:
    return read(path)


@cache
def _work(model: str) -> Work:
    return work(load(f"zoo:{model}"))


def with_values(name: str, values: Values) -> Machine:
    """The constants of a group with some replaced."""
    mine = {k.partition(":")[2]: v for k, v in values.items() if k.partition(":")[0] == name}
    return _machine(file_of(name)).replace(mine)


def predicted(p: Point, values: Values) -> float | None:
    """The rate of a point under `values`; None where the deployment cannot be modelled."""
    found, stack = formats(p), stack_of(stacks.stacks(), p)
    machine = serving.machine_of(p.row.system, p.row.source)
    if found is None or stack is None or machine is None:
        return None
    deployment = Deployment(
        p.tensor, found.weights, found.cache, p.experts, p.replicas, stack.name, found.experts
    )
    chip = rates(_machine(TARGET / "machines" / f"{machine}.toml"), with_values("software", values))
    own = with_values(stack.name, values)
    host = stacks.Host(own.value("host.iteration"), own.value("host.sequence"))
    try:
        return predict(p, GpuPhases(_work(p.model), chip, deployment, host), stack.policy)
    except MapperError:
        return None


def errors(points: Sequence[Point], values: Values) -> Floats:
    """log(predicted / published) of each point; nan where there is no prediction."""
    out = np.full(len(points), np.nan)
    for i, p in enumerate(points):
        rate = predicted(p, values)
        if rate and p.row.published:
            out[i] = math.log(rate / p.row.published)
    return out


def open_points(rows: Path) -> list[Point]:
    """The points of open systems that can be told from their rows."""
    found = [point(row) for row in read_rows(rows) if row.system in serving.CALIBRATED]
    return [p for p in found if isinstance(p, Point)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most PER points of each configuration, by a hash of load and lengths."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for p in points:
        groups[configuration(p)].append(p)
    return [p for _, group in sorted(groups.items()) for p in sorted(group, key=_order)[:PER]]


def _order(p: Point) -> bytes:
    return hashlib.sha256(f"{p.concurrency}|{p.prompt}|{p.output}|{p.row.source}".encode()).digest()


def loss(residuals: Floats) -> float:
    """Huber's loss, summed."""
    size = np.abs(residuals)
    return float(np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum())


def fit(points: Sequence[Point], rounds: int) -> dict[str, float]:
    """The constants that minimise the loss on `points`."""
    now = {c: _machine(file_of(c.partition(":")[0])).get(c.partition(":")[2]) for c in CONSTANTS}
    low = np.log([max(k.low, 1e-7) for k in now.values()])
    high = np.log([k.high for k in now.values()])
    x = np.clip(np.log([max(k.value, 1e-7) for k in now.values()]), low, high)

    def residuals(at: Floats) -> Floats:
        return errors(points, dict(zip(CONSTANTS, map(float, np.exp(at)), strict=True)))

    r = residuals(x)
    points = [p for p, e in zip(points, r, strict=True) if not np.isnan(e)]
    r, damping = r[~np.isnan(r)], 1e-2
    for number in range(rounds):
        slopes = np.empty((len(r), len(x)))
        for j in range(len(x)):
            moved = x.copy()
            moved[j] += STEP if x[j] + STEP < high[j] else -STEP
            slopes[:, j] = (residuals(moved) - r) / (moved[j] - x[j])
        weights = np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-9))
        normal, gradient = slopes.T @ (slopes * weights[:, None]), slopes.T @ (weights * r)
        before = loss(r)
        for _ in range(4):
            damped = normal + damping * np.diag(np.diag(normal)) + 1e-9 * np.eye(len(x))
            tried = np.clip(x + np.clip(-np.linalg.solve(damped, gradient), -0.7, 0.7), low, high)
            there = residuals(tried)
            if loss(there) < loss(r):
                x, r, damping = tried, there, damping / 3
                break
            damping *= 5
        print(f"  round {number + 1}: loss {loss(r):.4f} on {len(r)} rows", file=sys.stderr)
        if before - loss(r) < 3e-4 * before:
            break
    return {c: float(f"{math.exp(v):.3g}") for c, v in zip(CONSTANTS, x, strict=True)}


def table(points: Sequence[Point], values: Values, title: str) -> None:
    """Print the errors of `points` by framework and over all."""
    logs = errors(points, values)
    print(f"{title}: rows, median, MAPE, p90, bias")
    names = sorted({p.framework for p in points})
    for name in (*names, "all"):
        mine = [math.exp(e) - 1 for p, e in zip(points, logs, strict=True)
                if not np.isnan(e) and name in (p.framework, "all")]  # fmt: skip
        found = score(mine)
        if found:
            print(
                f"  {name:14} {found.rows:5} {found.median:7.1%} {found.mape:7.1%} "
                f"{found.p90:7.1%} {found.bias:+7.1%}"
            )


def cross(points: Sequence[Point], rounds: int) -> None:
    """Fit without a system, and print the errors on its rows, left-out configurations and all."""
    families = {"H100": ("H100", "H100 SXM"), "H200": ("H200",), "Blackwell": ("B200", "GB200")}
    for name, systems in families.items():
        print(f"without {name}", file=sys.stderr)
        values = fit(thinned([p for p in points if p.row.system not in systems and calibrates(p)]), rounds)
        print(", ".join(f"{c} {v:.3g}" for c, v in values.items()))
        table([p for p in points if p.row.system in systems], values, f"{name}, of which the fit saw nothing")


def write(values: Values, rows: int) -> None:
    """Put the constants into their files, as calibrated, with what they were fitted on."""
    source = (
        f"python -m benchmarks.gpu_calibration: fitted with {len(values) - 1} others on {rows} published "
        "rows of H100, H200, B200 and GB200, a quarter of the configurations by hash "
        "(mapper/published/subset.py)"
    )
    for constant, value in values.items():
        name, _, key = constant.partition(":")
        path, last = file_of(name), key.rpartition(".")[2]
        text = path.read_text(encoding="utf-8")
        line = re.compile(
            rf'^({last} = {{ value = )[^,]+(, unit = "[^"]+", kind = )"[^"]+"(, source = )"[^"]+"', re.M
        )
        text, count = line.subn(rf'\g<1>{value:.4g}\g<2>"calibrated"\g<3>"{source}"', text)
        assert count == 1, (path, key, count)
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the arguments, fit, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, help="published results; default: the shared file")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cross", action="store_true", help="also fit without each system in turn")
    parser.add_argument("--write", action="store_true", help="put the constants into targets/mapper_gpu")
    options = parser.parse_args()
    points = open_points(options.rows or default_file())
    used = thinned([p for p in points if calibrates(p)])
    values = fit(used, options.rounds)
    for constant, value in values.items():
        print(f"{constant:28} {value:.3g}")
    table([p for p in points if calibrates(p)], values, "calibration subset")
    table([p for p in points if not calibrates(p)], values, "left out")
    if options.cross:
        cross(points, options.rounds)
    if options.write:
        write(values, int(np.isfinite(errors(used, values)).sum()))


if __name__ == "__main__":
    main()
