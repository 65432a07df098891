"""The oracle: onnxruntime, run on the original model, with the same roles as the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError, WeightsMissingError
from mapper.runtime.inputs import Entry, Interface
from mapper.runtime.weights import file_sha256

Array = npt.NDArray[Any]
_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """onnxruntime on one model. `caches` are the shapes [B, Hkv, *, D] of its caches (length ignored);
    `sha256` is the digest of the model file."""

    session: Any
    model: Interface
    caches: Mapping[Entry, tuple[int, ...]]
    sha256: str = ""

    @property
    def name(self) -> str:
        """What the oracle is, with its version."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The model's outputs by name. Raises ModelError where onnxruntime refuses the inputs."""
        names = [o.name for o in self.session.get_outputs()]
        try:
            return dict(zip(names, self.session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # onnxruntime raises its own types, none of them public
            raise ModelError(f"onnxruntime: {error}") from error

    def inputs(self, ids: Array, past: int, caches: Mapping[Entry, Array]) -> dict[str, Array]:
        """The model's inputs for tokens `ids` [B, S] after `past` positions; `caches` [B, Hkv, past, D]."""
        batch, tokens = ids.shape
        position = np.arange(past, past + tokens)
        given: dict[str, Array] = {self.model.token_ids: ids}
        for node in self.session.get_inputs():
            kind = _TYPES.get(node.type, np.float32)
            if node.name == self.model.attention_mask:
                given[node.name] = np.ones((batch, past + tokens), kind)
            elif node.name in self.model.positions:
                whole = position if len(node.shape) == 1 else np.broadcast_to(position, (batch, tokens))
                given[node.name] = whole.astype(kind)
            elif node.name == self.model.token_ids:
                given[node.name] = ids.astype(kind)
        for entry, name in self.model.past.items():
            b, h, _, d = self.caches[entry]
            cache = caches.get(entry, np.zeros((b, h, 0, d), np.float32))
            kind = next(_TYPES.get(n.type, np.float32) for n in self.session.get_inputs() if n.name == name)
            given[name] = np.ascontiguousarray(self.model.from_state(cache).astype(kind))
        return given

    def step(self, ids: Array, past: int, caches: Mapping[Entry, Array]) -> tuple[Array, dict[Entry, Array]]:
        """(logits [B, S, V], caches after the step [B, Hkv, past + S, D])."""
        out = self.run(self.inputs(ids, past, caches))
        present = {e: self.model.to_state(out[n]) for e, n in self.model.present.items() if n in out}
        return out[self.model.logits], present


def oracle(path: str | Path, model: Interface, caches: Mapping[Entry, tuple[int, ...]]) -> Oracle:
    """onnxruntime on the model file at `path`. Raises WeightsMissingError, ModelError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own types, none of them public
        text = str(error)
        if "external data" in text.lower() or "cannot open" in text.lower() or "No such file" in text:
            raise WeightsMissingError(f"onnxruntime cannot read the weights of {path}: {text}") from error
        raise ModelError(f"onnxruntime cannot load {path}: {text}") from error
    return Oracle(session, model, caches, file_sha256(Path(path)))
