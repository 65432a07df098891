"""onnxruntime on the model builder's ONNX model (GroupQueryAttention), its cache kept in place by IO
binding.

f32: as built. int8: dynamic quantisation, a scale per output and one per activation tensor; variant
`blocks`: MatMulNBits, 8 bits. int4: MatMulNBits, blocks of 32, accuracy level 4 (int8 activations).
Keys and values are in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import builder
from benchmarks.peers.harness import Job, Peer, main
from benchmarks.peers.stored import dynamic_weights, nbits_weights
from benchmarks.weights import Matrix


def model(job: Job) -> Path:
    """The ONNX file of a job."""
    if job.weights == "int8" and job.variant != "blocks":
        return builder.dynamic(job.shape)
    return builder.model(job.shape, job.weights) / "model.onnx"


class Ort:
    """One session; its cache is one buffer per layer, both past and present."""

    def __init__(self, job: Job) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = job.threads
        self.session = ort.InferenceSession(str(model(job)), options, providers=["CPUExecutionProvider"])
        s = job.shape
        self.past, self.vocab = 0, s.vocab
        self.caches: dict[str, Any] = {}
        rng = np.random.default_rng(3)
        for i in range(s.layers):
            for kind in ("key", "value"):
                array = rng.standard_normal((1, s.kv_heads, job.room, s.head_dim), np.float32)
                self.caches[f"{i}.{kind}"] = ort.OrtValue.ortvalue_from_numpy(array)
        self.ids = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1), np.int64))
        self.logits = ort.OrtValue.ortvalue_from_shape_and_type((1, 1, s.vocab), np.float32)
        self.masks = np.ones((1, job.room), np.int64)
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input("input_ids", self.ids)
        self.binding.bind_ortvalue_output("logits", self.logits)
        for name, value in self.caches.items():
            self.binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self.binding.bind_ortvalue_output(f"present.{name}", value)

    def fill(self, context: int) -> None:
        """The buffers hold random content already."""
        self.past = context

    def step(self, token: int) -> Any:
        """Logits [vocab]."""
        self.past += 1
        self.ids.update_inplace(np.array([[token]], np.int64))
        self.binding.bind_cpu_input("attention_mask", self.masks[:, : self.past])
        self.session.run_with_iobinding(self.binding)
        return self.logits.numpy().reshape(self.vocab)


def describe(job: Job) -> dict[str, Any]:
    """Versions and what precision means here."""
    import onnxruntime as ort

    blocks = f"MatMulNBits, blocks of {builder.BLOCK}, accuracy level {builder.ACCURACY} (int8 activations)"
    said = {
        "f32": "float32",
        "int8": f"8-bit {blocks}" if job.variant else "dynamic, scale per output, activations per tensor",
        "int4": f"4-bit {blocks}",
    }
    return {"versions": {"onnxruntime": ort.__version__}, "kv": "f32", "precision": said[job.weights]}


def stored(job: Job) -> Matrix:
    """The weights in the ONNX file, dequantised."""
    if job.weights == "int8" and not job.variant:
        return dynamic_weights(job.shape, model(job))
    return nbits_weights(job.shape, model(job))


PEER = Peer("ort", ("f32", "int8", "int4"), Ort, describe, stored, ("", "blocks"))

if __name__ == "__main__":
    main(PEER)
