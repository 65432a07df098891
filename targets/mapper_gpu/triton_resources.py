"""What an emitted kernel takes of an SM, told by the assembler that comes with Triton: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapper.errors import UsageError
from mapper_gpu.triton_emit import Launch

POINTERS = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "i64": "*i64", "u8": "*u8"}
WARP = 32
PRODUCTS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
"""The tensor core's instructions, and how they are told in PTX."""


@dataclass(frozen=True)
class Resources:
    """Registers per thread, bytes of shared memory per block, bytes of stack per thread (spills), loads and
    stores of the stack inside of loops, threads, and the tensor core's instruction: "tcgen05", "wgmma",
    "mma" or ""."""

    registers: int
    shared: int
    stack: int
    looped: int
    threads: int
    product: str


def resources(kernel: Any, launch: Launch, capability: int = 90) -> Resources:
    """A kernel compiled for a compute capability (90: Hopper), without running it. Pointers are taken to be
    aligned, as the schedule's buffers are. Raises UsageError where the assembler says nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: POINTERS[f] for n, f in zip(names, launch.formats, strict=True)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(names))}
    made = triton.compile(
        ASTSource(kernel, signature, {}, aligned), target=GPUTarget("cuda", capability, WARP),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )  # fmt: skip
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _said(tool, "--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise UsageError(f"{launch.kernel}: cuobjdump says nothing of its resources: {usage.strip()}")
        stack = int(found[2])
        looped = looped_spills(_said(tool, "--dump-sass", file.name)) if stack else 0
    text = made.asm["ptx"]
    product = next((name for name, mark in PRODUCTS.items() if mark in text), "")
    return Resources(
        int(found[1]), int(made.metadata.shared), stack, looped, launch.warps * WARP, product
    )  # fmt: skip


def _said(tool: Path, option: str, file: str) -> str:
    done = subprocess.run([tool, option, file], capture_output=True, text=True, check=False)
    return done.stdout or done.stderr


def looped_spills(sass: str) -> int:
    """Loads and stores of the stack between the target of a branch that goes back and the branch itself."""
    spills: list[int] = []
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*);", line)
        if found is None:
            continue
        here = int(found[1], 16)
        if re.search(r"\b(LDL|STL)\b", found[2]):
            spills.append(here)
        back = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", found[2])
        if back and int(back[1], 16) < here:
            loops.append((int(back[1], 16), here))
    return sum(any(low <= at <= high for low, high in loops) for at in spills)
