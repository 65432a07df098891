"""The oracle: onnxruntime, run on the original model, with the same roles as the schedule."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError, SubstitutionError, WeightsMissingError
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
    note: str = ""

    @property
    def name(self) -> str:
        """What the oracle is, with its version, and what is special about its model."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}{self.note and f' on {self.note}'}"

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


@dataclass(frozen=True)
class Substitute:
    """An array to stand for a stored weight of `shape`, at `offset` of `file` (None: in the model itself).

    `load` gives the array. `looked_up`: rows of the weight are looked up too, and those stay as they are.
    """

    shape: tuple[int, ...]
    file: str | None
    offset: int
    load: Callable[[], Array]
    looked_up: bool = False


def oracle(path: str | Path, model: Interface, caches: Mapping[Entry, tuple[int, ...]]) -> Oracle:
    """onnxruntime on the model file at `path`. Raises WeightsMissingError, ModelError."""
    return Oracle(_session(str(path), _options(), path), model, caches, file_sha256(Path(path)))


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # else products of dequantised weights round their activations to 8 bits, which no node of the model says
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def _session(model: str | bytes, options: Any, path: str | Path) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own types, none of them public
        text = str(error)
        if "external data" in text.lower() or "cannot open" in text.lower() or "No such file" in text:
            raise WeightsMissingError(f"onnxruntime cannot read the weights of {path}: {text}") from error
        raise ModelError(f"onnxruntime cannot load {path}: {text}") from error


@contextmanager
def substituted(
    path: str | Path, plain: Oracle, weights: Mapping[str, Substitute], note: str
) -> Iterator[Oracle]:
    """The oracle `plain` of the model file at `path` with other weights, by the name of their initializer.

    The arrays lie in a temporary file, which is gone afterwards; only one is in memory at a time. Raises
    SubstitutionError where a weight is no initializer of the file, WeightsMissingError, ModelError.
    """
    import onnx
    import onnxruntime

    proto = onnx.load(str(path), load_external_data=False)
    places = {name: _replaceable(proto.graph, name, one) for name, one in weights.items()}
    options = _options()
    # constant folding would read the initializers of the file, not those that are added here
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(_FOLDER_KEY, str(Path(path).resolve().parent))
    with tempfile.TemporaryFile(prefix="mapper-") as file:
        held = []
        for name, one in weights.items():
            kind = onnx.helper.tensor_dtype_to_np_dtype(places[name].data_type)
            array = _mapped(file, np.ascontiguousarray(one.load(), kind))
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
            options.add_initializer(places[name].name, held[-1])
        session = _session(proto.SerializeToString(), options, path)
        yield replace(plain, session=session, note=note)


_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
"""Where onnxruntime looks for weight files of a model that it gets as bytes."""


def _mapped(file: Any, array: Array) -> Array:
    """The array, appended to the file and mapped from there."""
    start = file.seek(0, 2)
    start = file.seek(start + -start % 4096)
    array.tofile(file)
    file.flush()
    return np.memmap(file, array.dtype, "r", start, array.shape)


def _replaceable(graph: Any, name: str, one: Substitute) -> Any:
    """The initializer that `name` replaces; a copy that only products read where its rows are looked up."""
    found = [t for t in graph.initializer if t.name == name]
    if len(found) != 1 or tuple(found[0].dims) != one.shape:
        raise SubstitutionError(f"weight {name!r} is no initializer of the model file as it stands")
    tensor = found[0]
    where = {entry.key: entry.value for entry in tensor.external_data}
    if where and (where["location"], int(where.get("offset", "0"))) != (one.file, one.offset):
        raise SubstitutionError(f"weight {name!r} lies elsewhere in the model file")
    if not one.looked_up:
        return tensor
    copy = graph.initializer.add()
    copy.CopyFrom(tensor)
    copy.name = f"{name}:product"
    for node in graph.node:
        if any(a.HasField("g") for a in node.attribute):
            raise SubstitutionError(f"weight {name!r} is looked up in a model with sub-graphs")
        if name in node.input and not _looks_up(graph, node, name):
            node.input[:] = [copy.name if i == name else i for i in node.input]
    return copy


def _looks_up(graph: Any, node: Any, name: str) -> bool:
    """Whether a node that reads the value `name` looks rows up, itself or behind views. Raises
    SubstitutionError where it also does something else."""
    if node.op_type not in _VIEWS:
        return node.op_type in _LOOK_UPS and node.input[0] == name
    made = node.output[0]
    kinds = {_looks_up(graph, n, made) for n in graph.node if made in n.input}
    if len(kinds) > 1:
        raise SubstitutionError(f"weight {name!r} is looked up and multiplied behind one {node.op_type}")
    return True in kinds


_VIEWS = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")
_LOOK_UPS = ("Gather",)
