"""llama.cpp through the bindings of llama-cpp-python; every matrix in one format.

f32, bf16, int8 = Q8_0, int4 = Q4_0 (blocks of 32, float16 scales; activations in int8 blocks), repacked
where it has kernels for that. Keys and values in float16, in float32 beside float32 weights. Variants:
with flash attention (`flash`), without (`plain`). The weights are loaded into memory, not mapped, so
that they lie on huge pages.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from benchmarks.peers import gguf_
from benchmarks.peers.harness import Job, Peer, main
from benchmarks.weights import Matrix, folder, prompt

BATCH = 512
GGML_F32, GGML_F16 = 0, 1


class LlamaCpp:
    """One context of one sequence."""

    def __init__(self, job: Job) -> None:
        import llama_cpp as lib

        self.lib, self.job = lib, job
        self.quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.quiet, None)
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.load_mode = lib.LLAMA_LOAD_MODE_NONE
        path = str(gguf_.model(job.shape, job.weights)).encode()
        self.model = lib.llama_model_load_from_file(path, options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path.decode()}")
        self.context = lib.llama_init_from_model(self.model, self._options())
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")

    def _options(self) -> Any:
        options = self.lib.llama_context_default_params()
        options.n_ctx = -(-self.job.room // 256) * 256
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = self.job.threads
        options.type_k = options.type_v = GGML_F32 if self.job.weights == "f32" else GGML_F16
        options.flash_attn_type = int(self.job.variant == "flash")
        options.no_perf = True
        return options

    def _decode(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")

    def fill(self, context: int) -> None:
        """The state after a prefill of a prompt; kept in the cache, since a prefill takes long."""
        name = f"state-{self.job.weights}-{self.job.variant}-{context}-{self.lib.__version__}.bin"
        path, tokens = folder(self.job.shape) / name, prompt(self.job.shape, context)
        array = (ctypes.c_int32 * context)(*tokens)
        if path.is_file():
            count = ctypes.c_size_t()
            if not self.lib.llama_state_load_file(
                self.context, str(path).encode(), array, context, ctypes.byref(count)
            ):
                raise RuntimeError(f"llama.cpp cannot read {path}; remove it")
            return
        for first in range(0, context, BATCH):
            self._decode(tokens[first : first + BATCH])
        made = path.with_suffix(".part")
        self.lib.llama_state_save_file(self.context, str(made).encode(), array, context)
        made.rename(path)

    def step(self, token: int) -> Any:
        """Logits [vocab]."""
        self._decode([token])
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.job.shape.vocab,))


def describe(job: Job) -> dict[str, Any]:
    """Versions and what precision means here."""
    import llama_cpp

    words = {"f32": "float32", "bf16": "bf16 weights", "int8": "Q8_0", "int4": "Q4_0, all matrices"}
    return {
        "versions": {"llama-cpp-python": llama_cpp.__version__},
        "kv": "f32" if job.weights == "f32" else "f16",
        "precision": words[job.weights],
        "features": llama_cpp.llama_print_system_info().decode().strip(),
    }


def stored(job: Job) -> Matrix:
    """The weights in the file, dequantised."""
    found: Matrix = gguf_.stored(job.shape, job.weights)
    return found


PEER = Peer("llamacpp", ("f32", "bf16", "int8", "int4"), LlamaCpp, describe, stored, ("flash", "plain"))

if __name__ == "__main__":
    main(PEER)
