"""The oracle: onnxruntime, run on the original model, with the same roles as the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError, WeightsMissingError
from mapper.runtime.caches import Entry
from mapper.runtime.inputs import Interface
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
        nodes = self.session.get_inputs()
        declared = {n.name: (_TYPES.get(n.type, np.float32), n.shape) for n in nodes}
        return self.model.inputs(declared, self.caches, ids, past, caches)

    def step(self, ids: Array, past: int, caches: Mapping[Entry, Array]) -> tuple[Array, dict[Entry, Array]]:
        """(logits [B, S, V], caches after the step [B, Hkv, past + S, D])."""
        out = self.run(self.inputs(ids, past, caches))
        found = self.model.states(out, ids.shape[0], given=False)
        return out[self.model.logits], {e: c[:, :, : past + ids.shape[1]] for e, c in found.items()}


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
