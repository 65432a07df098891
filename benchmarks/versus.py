"""mapper and its peers in turns, each run in a process of its own, the memory's read rate probed between.

A first, uncounted round finds the fastest variant of each peer (flash attention or not, compiled or
not). Then all take turns. A run counts if the probes before and after it gave at least 0.85 of the best
probe; else something else used the memory, and it is run again, a bounded number of times. Medians of
what counts are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bandwidth import probe
from benchmarks.models import onnx_model
from benchmarks.shapes import SHAPES

QUIET = 0.85
"""Fraction of the best probe below which a run is rejected."""
TRIES = 3
"""Rounds that are run at most, as a multiple of those that must count."""
TIMEOUT = 1800
"""Seconds for one run, which may have to make its model first."""
ASKED = ("shape", "weights", "context", "tokens", "threads")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Contender:
    """One peer, or mapper, as a command; what it needs to be importable, and its variants by format."""

    name: str
    module: str
    needs: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Format -> variants; a format that is not there is not run."""


OURS = Contender("mapper", "benchmarks.decode", (), dict.fromkeys(("f32", "bf16", "int8", "int4"), ("",)))
BOTH = ("compiled", "eager")
FLASH = {"f32": ("plain",), **dict.fromkeys(("bf16", "int8", "int4"), ("flash", "plain"))}
PEERS = (
    Contender("ort", "benchmarks.peers.ort", ("onnxruntime", "onnxruntime_genai", "onnx"),
              {"f32": ("",), "int8": ("", "blocks"), "int4": ("",)}),
    Contender("genai", "benchmarks.peers.genai", ("onnxruntime_genai", "onnx"),
              {"f32": ("",), "int8": ("",), "int4": ("",)}),
    Contender("torch", "benchmarks.peers.torch_", ("torch",),
              {"f32": BOTH, "bf16": BOTH, "int8": (*BOTH, "dynamic"), "int4": BOTH}),
    Contender("llamacpp", "benchmarks.peers.llamacpp", ("llama_cpp", "gguf"), FLASH),
)  # fmt: skip


@dataclass
class Turns:
    """What has been run. `probes[i]` and `probes[i + 1]` are the read rates before and after run i."""

    given: argparse.Namespace
    probes: list[float] = field(default_factory=list)
    runs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def run(self, contender: Contender, variant: str) -> dict[str, Any]:
        """One run, and the probe after it; {"error"} where it failed."""
        if not self.probes:
            self.probes.append(probe(self.given.threads))
        record = launch(contender, variant, self.given)
        self.probes.append(probe(self.given.threads))
        self.runs.append((contender.name, record))
        said = f"{record['tokens_per_s']:.1f} tokens/s" if "tokens_per_s" in record else record["error"]
        quiet = "" if self.quiet(len(self.runs) - 1) else " (contended)"
        print(
            f"{contender.name} {variant}: {said}, reads {self.probes[-1] / 1e9:.1f} GB/s{quiet}",
            file=sys.stderr,
        )
        return record

    def quiet(self, run: int) -> bool:
        """Whether nothing else used the memory around a run."""
        return min(self.probes[run], self.probes[run + 1]) >= QUIET * max(self.probes)

    def counted(self, name: str, since: int) -> list[dict[str, Any]]:
        """The runs of a contender from number `since` on that count."""
        return [
            record
            for i, (who, record) in enumerate(self.runs)
            if i >= since and who == name and "tokens_per_s" in record and self.quiet(i)
        ]


def launch(contender: Contender, variant: str, given: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The record that a run prints; {"error": its last line} where it fails."""
    ours = contender.name == OURS.name
    command = [sys.executable if ours else given.peers_python, "-m", contender.module, "--json"]
    for name in ASKED:
        command += [f"--{name}", str(getattr(given, name))]
    command += ["--variant", variant] if variant else []
    command += ["--no-probe"] if ours else []
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    try:
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def present(given: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """The peers that have the format and can be imported, and why each other one is left out."""
    found, skipped = [], {}
    for peer in PEERS:
        if given.only and peer.name not in given.only:
            skipped[peer.name] = "not asked for"
            continue
        code = "\n".join(f"import {name}" for name in peer.needs)
        if given.weights not in peer.variants:
            skipped[peer.name] = f"has no {given.weights} products on the CPU"
            continue
        try:
            done = subprocess.run([given.peers_python, "-c", code], capture_output=True, text=True)
        except OSError as error:
            skipped[peer.name] = f"{given.peers_python}: {error.strerror}"
            continue
        if done.returncode:
            skipped[peer.name] = (done.stderr.strip().splitlines() or ["cannot be imported"])[-1]
        else:
            found.append(peer)
    for name, why in skipped.items():
        print(f"{name} skipped: {why}", file=sys.stderr)
    return found, skipped


def versus(given: argparse.Namespace) -> dict[str, Any]:
    """Rows of mapper and all peers, and the ratio of mapper to the best of them."""
    onnx_model(SHAPES[given.shape])
    peers, skipped = present(given)
    turns, chosen = Turns(given), dict[str, str]()
    for contender in (OURS, *peers):
        speed = {
            v: turns.run(contender, v).get("tokens_per_s", 0.0) for v in contender.variants[given.weights]
        }
        chosen[contender.name] = max(speed, key=lambda v: speed[v])
    since = len(turns.runs)
    for _ in range(TRIES * given.rounds):
        wanting = [c for c in (OURS, *peers) if len(turns.counted(c.name, since)) < given.rounds]
        if not wanting:
            break
        for contender in wanting:
            turns.run(contender, chosen[contender.name])
    rows = [_row(turns, c, chosen[c.name], since) for c in (OURS, *peers)]
    return {**_summary(turns, rows), "skipped": skipped}


def _row(turns: Turns, contender: Contender, variant: str, since: int) -> dict[str, Any]:
    counted = turns.counted(contender.name, since)
    tried = [r for i, (who, r) in enumerate(turns.runs) if i >= since and who == contender.name]
    row: dict[str, Any] = {"peer": contender.name, "variant": variant, "runs": len(counted)}
    row["rejected"] = len(tried) - len(counted)
    if not counted:
        return {**row, "error": next((r["error"] for r in tried if "error" in r), "every run was contended")}
    row |= counted[-1]
    row["tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in counted)
    if turns.given.quality:
        row |= _errors(contender, variant, turns.given)
    return row


def _errors(contender: Contender, variant: str, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked = ["--quality"] if contender is OURS else ["--logits", f"{folder}/logits.npz"]
        found = launch(contender, variant, given, *asked)
    return {k: v for k, v in found.items() if k.startswith("error")}


def _summary(turns: Turns, rows: list[dict[str, Any]]) -> dict[str, Any]:
    rate = max(turns.probes)
    asked = {
        name: getattr(turns.given, name) for name in ("shape", "weights", "context", "tokens", "threads")
    }
    found: dict[str, Any] = {**asked, "read_gb_per_s": rate / 1e9, "rows": rows}
    ours, peers = rows[0], [r for r in rows[1:] if "tokens_per_s" in r]
    if "tokens_per_s" in ours:
        ours["gb_per_s"] = ours["tokens_per_s"] * ours["bytes_per_token"] / 1e9
        ours["fraction_of_read_rate"] = ours["gb_per_s"] * 1e9 / rate
    if peers and "tokens_per_s" in ours:
        best = max(peers, key=lambda r: float(r["tokens_per_s"]))
        found |= {"best_peer": best["peer"], "ratio": ours["tokens_per_s"] / best["tokens_per_s"]}
    return found


def show(found: dict[str, Any]) -> None:
    """The table on the terminal."""
    from mapper.report.terminal import console, rows_table

    def text(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    rows = [
        {
            "decoder": row["peer"] + (f" {row['variant']}" if row["variant"] else ""),
            "tokens/s": text(row, "tokens_per_s", ".1f"),
            "read rate": text(row, "fraction_of_read_rate", ".2f"),
            "runs": f"{row['runs']} (+{row['rejected']} rejected)",
            "KV": row.get("kv", "-"),
            "precision": row.get("precision", row.get("error", "-")),
            "error": text(row, "error_dequantised", ".2g"),
            "error to original": text(row, "error_original", ".2g"),
            "versions": " ".join(f"{k} {v}" for k, v in row.get("versions", {}).items()),
        }
        for row in found["rows"]
    ]
    console().print(rows_table(rows))
    asked = f"{found['shape']} {found['weights']}, context {found['context']}, {found['threads']} threads"
    ratio = f"; mapper / {found['best_peer']}: {found['ratio']:.2f}" if "ratio" in found else ""
    print(f"{asked}; memory reads {found['read_gb_per_s']:.1f} GB/s{ratio}")
