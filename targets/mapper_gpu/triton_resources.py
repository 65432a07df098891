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

POINTERS = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "i64": "*i64"}
WARP = 32


@dataclass(frozen=True)
class Resources:
    """Registers per thread, bytes of shared memory per block, bytes of stack per thread (spills), threads,
    and the tensor core's instruction: "wgmma", "mma" or ""."""

    registers: int
    shared: int
    stack: int
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
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise UsageError(f"{launch.kernel}: cuobjdump says nothing of its resources: {said.stderr.strip()}")
    text = made.asm["ptx"]
    product = "wgmma" if "wgmma" in text else "mma" if "mma.sync" in text else ""
    return Resources(int(found[1]), int(made.metadata.shared), int(found[2]), launch.warps * WARP, product)
