"""onnxruntime-genai with models of its model builder and its own generator.

int4 and int8: MatMulNBits, blocks of 32, accuracy level 4 (int8 activations). Keys and values in float32.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from benchmarks.peers import builder
from benchmarks.peers.harness import Job, Peer, main
from benchmarks.peers.stored import nbits_weights
from benchmarks.weights import Matrix, prompt

CHUNK = 512
"""Prompt tokens that are prefilled at once."""


class GenAi:
    """One generator, greedy."""

    def __init__(self, job: Job) -> None:
        import onnxruntime_genai as og

        self.shape = job.shape
        config = og.Config(str(builder.model(job.shape, job.weights)))
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": job.threads}}}})
        )
        self.model = og.Model(config)
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=job.room, do_sample=False)
        self.generator = og.Generator(self.model, params)

    def fill(self, context: int) -> None:
        """Prefill a prompt."""
        ids = prompt(self.shape, context)
        for first in range(0, context, CHUNK):
            self.generator.append_tokens(np.array(ids[first : first + CHUNK], np.int32))

    def step(self, token: int) -> Any:
        """Logits [vocab] of a given token."""
        self.generator.append_tokens(np.array([token], np.int32))
        return np.asarray(self.generator.get_logits()).reshape(-1)[-self.shape.vocab :]


def advance(decoder: Any, token: int) -> int:
    """The generator's own greedy step."""
    decoder.generator.generate_next_token()
    if decoder.generator.is_done():
        raise RuntimeError("the generator stopped at an end-of-sequence token")
    return 0


def describe(job: Job) -> dict[str, Any]:
    """Versions and what precision means here."""
    import onnxruntime as ort
    import onnxruntime_genai as og

    blocks = f"MatMulNBits, blocks of {builder.BLOCK}, accuracy level {builder.ACCURACY} (int8 activations)"
    said = {"f32": "float32", "int8": f"8-bit {blocks}", "int4": f"4-bit {blocks}"}
    versions = {"onnxruntime-genai": og.__version__, "onnxruntime": ort.__version__}
    return {"versions": versions, "kv": "f32", "precision": said[job.weights]}


def stored(job: Job) -> Matrix:
    """The weights in the ONNX file, dequantised."""
    return nbits_weights(job.shape, builder.model(job.shape, job.weights) / "model.onnx")


PEER = Peer("genai", ("f32", "int8", "int4"), GenAi, describe, stored, advance=advance)

if __name__ == "__main__":
    main(PEER)
