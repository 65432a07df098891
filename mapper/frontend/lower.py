"""The operator registry: how each ONNX operator becomes canonical primitives.

A lowering takes a `Call` and returns its output values. Sources of the semantics: the public ONNX operator
specification, opsets 11 to 28, and onnxruntime's contrib operator documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend.guard import label
from mapper.frontend.net import Array, Net, Value
from mapper.frontend.proto import Attribute, NodeRecord, TensorRecord
from mapper.frontend.tensors import DTYPES
from mapper.ir.dims import Dim

MS = "com.microsoft"  # the domain of onnxruntime's contrib operators


@dataclass(frozen=True)
class Call:
    """One ONNX node being lowered: its operands (None where absent) and how to read its attributes."""

    net: Net
    node: NodeRecord
    ins: Sequence[Value | None]
    opset: int
    tensor: Callable[[TensorRecord], Array]

    def has(self, index: int) -> bool:
        """Whether operand `index` is given."""
        return index < len(self.ins) and self.ins[index] is not None

    def x(self, index: int = 0) -> Value:
        """Operand `index`. Raises ModelError where it is absent."""
        found = self.ins[index] if index < len(self.ins) else None
        if found is None:
            raise ModelError(f"{label(self.node)} lacks operand {index}")
        return found

    def value(self, name: str) -> Attribute:
        """An attribute's raw value, None where absent."""
        found = self.node.attributes.get(name)
        return found.value if found else None

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        found = self.value(name)
        if found is not None and not isinstance(found, int):
            raise ModelError(f"{label(self.node)}: attribute {name!r} is no integer")
        return default if found is None else found

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        found = self.value(name)
        if found is not None and not isinstance(found, (float, int)):
            raise ModelError(f"{label(self.node)}: attribute {name!r} is no number")
        return default if found is None else float(found)

    def integers(self, name: str) -> list[int] | None:
        """A list of integers, None where absent."""
        found = self.value(name)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(v, int) for v in found):
            raise ModelError(f"{label(self.node)}: attribute {name!r} is no list of integers")
        return [v for v in found if isinstance(v, int)]

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        found = self.value(name)
        return found.decode(errors="replace") if isinstance(found, bytes) else default

    def content(self, index: int, what: str) -> tuple[Dim, ...]:
        """The contents of an integer operand. Raises UnsupportedModelError where they depend on data."""
        found = self.x(index)
        if found.content is None:
            raise self.refuse(f"{what} depends on the data")
        return found.content

    def refuse(self, reason: str) -> UnsupportedModelError:
        """The error that names this node, its operator and the reason."""
        return UnsupportedModelError(f"{label(self.node)}: {reason}")

    def axis(self, default: int, rank: int | None = None) -> int:
        """The `axis` attribute as a non-negative number. Raises ModelError where it is out of range."""
        limit = self.x().rank if rank is None else rank
        axis = self.integer("axis", default)
        if not -limit <= axis < max(limit, 1):
            raise ModelError(f"{label(self.node)}: axis {axis} of a tensor of rank {limit}")
        return axis % max(limit, 1)

    def axes(self, operand: int, moved_at: int) -> list[int] | None:
        """Axes from the attribute, or from operand `operand` since opset `moved_at`; None where absent."""
        given = self.integers("axes")
        if given is None and self.opset >= moved_at and self.has(operand):
            given = [d.value for d in self.content(operand, "axes")]
        return given


Lowering = Callable[[Call], list[Value]]
LOWERINGS: dict[tuple[str, str], Lowering] = {}


def lowers(*names: str, domain: str = "") -> Callable[[Lowering], Lowering]:
    """Registers a lowering for operators of one domain."""

    def register(function: Lowering) -> Lowering:
        for name in names:
            LOWERINGS[domain, name] = function
        return function

    return register


REFUSED: dict[str, str] = {
    "Scan": "recurrence over a sequence is not supported",
    "Loop": "data-dependent loops are not supported",
    "LSTM": "recurrence is not supported",
    "GRU": "recurrence is not supported",
    "RNN": "recurrence is not supported",
    "LinearAttention": "linear-attention recurrence is not supported",
    "CausalConvWithState": "state-space recurrence is not supported",
    "SequenceEmpty": "tensor sequences are not supported",
    "SequenceInsert": "tensor sequences are not supported",
    "SequenceConstruct": "tensor sequences are not supported",
    "SequenceAt": "tensor sequences are not supported",
    "NonZero": "the size of the result depends on the data, as in a loop over experts",
    "Unique": "the size of the result depends on the data",
    "Compress": "the size of the result depends on the data",
    "NonMaxSuppression": "the size of the result depends on the data",
    "RandomNormal": "random numbers are not supported",
    "RandomUniform": "random numbers are not supported",
    "RandomNormalLike": "random numbers are not supported",
    "RandomUniformLike": "random numbers are not supported",
    "Multinomial": "random numbers are not supported",
    "Bernoulli": "random numbers are not supported",
}


APPENDS = frozenset(
    (
        "Concat",
        "TensorScatter",
        "ScatterND",
        "ScatterElements",
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "DecoderMaskedMultiHeadAttention",
    )
)
"""Operators that may add new rows to a key-value cache."""


def lower(call: Call) -> list[Value]:
    """The outputs of one node. Raises UnsupportedModelError naming node, operator and reason."""
    node = call.node
    reason = REFUSED.get(node.op)
    if reason:
        raise call.refuse(reason)
    found = LOWERINGS.get((node.domain, node.op))
    if found is None:
        known = {d for d, _ in LOWERINGS}
        why = (
            "this operator is not supported"
            if node.domain in known
            else f"unknown domain {node.domain[:40]!r}"
        )
        raise call.refuse(why)
    call.net.origin = label(node)
    call.net.name = node.name or next(iter(node.outputs), "")
    if node.op in APPENDS:
        call.net.caches.spelled[call.net.name] = node.op
    try:
        return found(call)
    except (IndexError, ValueError, ArithmeticError, TypeError, KeyError, StopIteration) as error:
        raise ModelError(f"{label(node)}: operands do not fit the operator ({error})") from error


def type_name(call: Call, name: str, default: int | None = None) -> str:
    """The dtype of a type-code attribute."""
    code = call.integer(name, default if default is not None else -1)
    if code not in DTYPES:
        raise call.refuse(f"data type code {code} is not supported")
    return DTYPES[code][0]


def array_constant(net: Net, array: Array) -> Value:
    """A constant of the array's own type."""
    from mapper.ir.types import dtype_name

    return net.constant(np.ascontiguousarray(array).reshape(array.shape), dtype_name(array.dtype))
