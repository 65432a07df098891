"""The rate at which this computer reads memory, measured in a process of its own, with code of its own.

    python -m benchmarks.bandwidth [--threads 2] [--megabytes 2048] [--json]

Each thread reads its part of the buffer as four streams with software prefetch, in whole cache lines, on
huge pages where the system gives them. The median over passes is the rate; a slow one means that others use
the memory too. `cache_gb_per_s` is the same over 64 MB, which a large last-level cache holds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

STREAMS, LINE, AHEAD = 4, 64, 2048
"""Streams per thread, bytes of a cache line, and how many bytes ahead of a stream is prefetched."""
MEGABYTES, CACHED, PASSES = 2048, 64, 9


IR = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define void @read(ptr %base, i64 %part) {
entry:
  br label %loop
loop:
  %at = phi i64 [0, %entry], [%next, %loop]
@BODY
  %next = add i64 %at, @LINE
  %more = icmp ult i64 %next, %part
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""
STREAM = """
  %start@N = mul i64 %part, @N
  %offset@N = add i64 %start@N, %at
  %here@N = getelementptr i8, ptr %base, i64 %offset@N
  %there@N = getelementptr i8, ptr %here@N, i64 @AHEAD
  call void @llvm.prefetch.p0(ptr %there@N, i32 0, i32 3, i32 1)
  %line@N = load volatile <16 x float>, ptr %here@N, align 64
"""


def _kernel() -> tuple[Any, Callable[[int, int], None]]:
    """(what keeps it alive, a function that reads STREAMS parts of some length from an address).

    Loads are volatile, so that none is left out."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    body = "".join(STREAM.replace("@N", str(n)).replace("@AHEAD", str(AHEAD)) for n in range(STREAMS))
    module = llvm.parse_assembly(IR.replace("@BODY", body).replace("@LINE", str(LINE)))
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    compiled = llvm.create_mcjit_compiler(module, machine)
    compiled.finalize_object()
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    return compiled, signature(compiled.get_function_address("read"))


def _buffer(size: int) -> npt.NDArray[np.uint8]:
    space = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        space.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(space, np.uint8)
    found[::] = 1
    return found


def measure(threads: int, megabytes: int) -> dict[str, Any]:
    """Rates in this process: median and best pass over the whole buffer, and over its first 64 MB."""
    kept, read = _kernel()
    buffer = _buffer(megabytes << 20)
    with ThreadPoolExecutor(threads) as pool:

        def rate(size: int, times: int) -> float:
            each = size // threads // (STREAMS * LINE) * (STREAMS * LINE)

            def work(thread: int) -> None:
                for _ in range(times):
                    read(buffer.ctypes.data + thread * each, each // STREAMS)

            began = time.perf_counter()
            list(pool.map(work, range(threads)))
            return threads * each * times / (time.perf_counter() - began)

        rates = [rate(buffer.nbytes, 1) for _ in range(PASSES)]
        cached = [rate(CACHED << 20, 8) for _ in range(PASSES)]
    del kept
    return {
        "threads": threads,
        "gb_per_s": statistics.median(rates) / 1e9,
        "best_gb_per_s": max(rates) / 1e9,
        "cache_gb_per_s": statistics.median(cached) / 1e9,
    }


def probe(threads: int, megabytes: int = MEGABYTES) -> float:
    """Bytes per second read from memory by `threads` threads of another process.

    Raises CalledProcessError where that process fails."""
    command = [sys.executable, "-m", "benchmarks.bandwidth", "--json"]
    command += ["--threads", str(threads), "--megabytes", str(megabytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["gb_per_s"]) * 1e9


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.threads, given.megabytes)
    print(json.dumps(found) if given.json else "  ".join(f"{k} {v:.4g}" for k, v in found.items()))


if __name__ == "__main__":
    main()
