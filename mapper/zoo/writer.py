"""Writing ONNX graphs whose weights lie outside the file, described but not there.

Standard operators of opset 23. Names of weights are the models' usual ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 23, 10
ALIGNMENT = 64
"""Bytes that every weight's offset is a multiple of."""
TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
SIZES = {"f32": 4, "f16": 2, "bf16": 2}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Weight:
    """One weight outside the file. `fan_in` and `gain` say how random ones are drawn: normal, of standard
    deviation gain / sqrt(fan_in), around `mean`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    fan_in: int
    gain: float
    mean: float

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


@dataclass
class Writer:
    """Collects nodes, weights and small constants. `dtype` is that of weights and activations."""

    name: str
    dtype: str
    data_file: str
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    tensors: list[TensorProto] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    prefix: str = ""
    end: int = 0
    _constants: dict[Any, str] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        """Adds a node of the standard domain; the name, or the names, of its results."""
        number = len(self.nodes)
        names = [f"v{number}" if outputs == 1 else f"v{number}.{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, f"{self.prefix}{kind}_{number}", **attrs)
        )
        return names[0] if outputs == 1 else names

    def weight(self, name: str, *shape: int, fan_in: int = 0, gain: float = 1.0, mean: float = 0.0) -> str:
        """Declares a weight once; its name. `fan_in` 0 is the first axis of a matrix, else 1."""
        if name not in self.weights:
            rows = fan_in or (shape[-2] if len(shape) > 1 else 1)
            made = Weight(name, shape, self.end, rows, gain, mean)
            self.weights[name] = made
            self.end += -(-made.elements * SIZES[self.dtype] // ALIGNMENT) * ALIGNMENT
        return name

    def constant(self, array: Array) -> str:
        """A small constant in the file; equal ones once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self.tensors.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float, dtype: str | None = None) -> str:
        """A scalar of the activations' type, or of `dtype`."""
        kind = dtype or self.dtype
        key = (kind, value)
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self.tensors.append(helper.make_tensor(self._constants[key], TYPES[kind], [], [value]))
        return self._constants[key]

    def ones(self, size: int) -> str:
        """A vector of ones of the activations' type."""
        key = (self.dtype, "ones", size)
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            made = helper.make_tensor(self._constants[key], TYPES[self.dtype], [size], [1.0] * size)
            self.tensors.append(made)
        return self._constants[key]

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps a dimension, -1 is the rest."""
        return str(self.op("Reshape", x, self.ints(*shape)))

    def transpose(self, x: str, *perm: int) -> str:
        """Permutation of axes."""
        return str(self.op("Transpose", x, perm=list(perm)))

    def slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        """x[start:end:step] along an axis."""
        parts = (self.ints(start), self.ints(end), self.ints(axis), self.ints(step))
        return str(self.op("Slice", x, *parts))

    def split(self, x: str, *sizes: int) -> list[str]:
        """Parts along the last axis."""
        made = self.op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=-1)
        return [str(v) for v in made]

    def cast(self, x: str, dtype: str | None = None) -> str:
        """Conversion to the activations' type, or to `dtype`; from f32 to f32 nothing."""
        kind = dtype or self.dtype
        return x if self.dtype == "f32" and kind == "f32" else str(self.op("Cast", x, to=TYPES[kind]))

    def input(self, name: str, shape: Sequence[int | str], kind: int | None = None) -> str:
        """A graph input, of the activations' type unless told otherwise."""
        self.inputs.append(helper.make_tensor_value_info(name, kind or TYPES[self.dtype], list(shape)))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        """A graph output."""
        self.nodes.append(helper.make_node("Identity", [value], [name], f"{self.prefix}{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, TYPES[self.dtype], list(shape)))

    def model(self) -> ModelProto:
        """The finished model; its weights are references into the data file."""
        graph = GraphProto(name=self.name)
        graph.node.extend(self.nodes)
        graph.input.extend(self.inputs)
        graph.output.extend(self.outputs)
        graph.initializer.extend(self.tensors)
        for weight in self.weights.values():
            tensor = graph.initializer.add(name=weight.name, data_type=TYPES[self.dtype], dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            size = weight.elements * SIZES[self.dtype]
            for key, value in (("location", self.data_file), ("offset", weight.offset), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mapper zoo"
        )
