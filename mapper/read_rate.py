"""The measured read rate of this computer's memory, the limit of decoding; kept until the next boot."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from mapper import backend as targets
from mapper.errors import MapperError, UsageError
from mapper.files import cache_folder, write_whole


@runtime_checkable
class ReadsMemory(Protocol):
    """What a backend offers beside the Backend protocol where its machine is this computer."""

    def read_rate(self) -> float:
        """Bytes per second that this computer reads, measured now."""


PROBES = 3
"""Measurements per boot: what else runs can only make one too low, so the best counts."""


def read_rate(target: str, fresh: bool = False) -> float:
    """Bytes per second, the best measured since the last boot on this processor. Measures where there are
    fewer than PROBES of these, or with `fresh`.

    Raises UsageError for a target whose machine is not this computer, MapperError where measuring fails.
    """
    backend = targets.load(target)
    if not isinstance(backend, ReadsMemory):
        raise UsageError(f"target {target!r} has no read rate: its machine is not this computer")
    file, here = cache_folder() / f"read-rate-{target}.json", _here()
    known = _known(file, here)
    if len(known) >= PROBES and not fresh:
        return max(known)
    known.append(backend.read_rate())
    with suppress(OSError, MapperError):  # it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"here": here, "bytes_per_s": known}))
    return max(known)


def _known(file: Path, here: str) -> list[float]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rates = [float(rate) for rate in found["bytes_per_s"]]
        same = found["here"] == here
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return rates if same and all(0 < rate < float("inf") for rate in rates) else []


def _here() -> str:
    """The processor, and this boot where the system tells it."""
    model = next((v for k, v in _lines(Path("/proc/cpuinfo")) if k == "model name"), platform.processor())
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {model} {boot}"


def _lines(file: Path) -> list[tuple[str, str]]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [(key.strip(), value.strip()) for key, _, value in pairs]
