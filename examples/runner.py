"""Run an exported graph with ONNX Runtime, step by step over its cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Runner:
    """A graph and the cache of what it has read so far."""

    def __init__(self, graph: Path, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.outputs: list[str] = [value.name for value in self.session.get_outputs()]
        self.caches = {
            value.name: (int(value.shape[1]), int(value.shape[3]))
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.past: dict[str, Floats] = {}
        self.mask: Ids = np.zeros((0, 0), np.int64)

    def reset(self, batch: int) -> None:
        """Forget everything: an empty cache."""
        self.past = {
            name: np.zeros((batch, heads, 0, dim), np.float32) for name, (heads, dim) in self.caches.items()
        }
        self.mask = np.zeros((batch, 0), np.int64)

    def step(self, input_ids: Ids, mask: Ids | None = None) -> Floats:
        """Feed tokens (a mask of zeros marks padding) and return their logits."""
        new_mask = np.ones_like(input_ids) if mask is None else mask
        self.mask = np.concatenate((self.mask, new_mask), axis=1)
        # A token's position counts the real tokens before it, whatever padding there is.
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -input_ids.shape[1] :]
        feed = {"input_ids": input_ids, "attention_mask": self.mask, "position_ids": positions, **self.past}
        results: dict[str, Floats] = dict(
            zip(self.outputs, self.session.run(self.outputs, feed), strict=True)
        )
        self.past = {name: results[name.replace("past_key_values.", "present.")] for name in self.caches}
        return results["logits"]
