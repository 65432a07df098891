"""The `dataflow` dialect: every op and attribute, and a context that parses it."""

from __future__ import annotations

from functools import cache

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin
from xdsl.ir import Dialect

from mapper.errors import ModelError
from mapper.ir import (
    experts,
    primitives_compute,
    primitives_elementwise,
    primitives_shape,
    serving,
    structure,
    transformer,
)
from mapper.ir.op import DataflowOp
from mapper.ir.types import BytesAttr, DimsAttr, TensorType


def _ops_of(module: object) -> list[type[DataflowOp]]:
    found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, DataflowOp)]
    return [v for v in found if v.__module__ == getattr(module, "__name__", "") and "name" in vars(v)]


_PRIMITIVES = [*_ops_of(primitives_elementwise), *_ops_of(primitives_shape), *_ops_of(primitives_compute)]
_ALL = [*_PRIMITIVES, *_ops_of(transformer), *_ops_of(experts), *_ops_of(serving), *_ops_of(structure)]

OPS: dict[str, type[DataflowOp]] = {cls.name.removeprefix("dataflow."): cls for cls in _ALL}
"""Every op class by its mnemonic: OPS["add"] is AddOp."""

PRIMITIVES: frozenset[str] = frozenset(cls.name.removeprefix("dataflow.") for cls in _PRIMITIVES)
"""Mnemonics of the primitives."""

Dataflow = Dialect("dataflow", list(OPS.values()), [TensorType, DimsAttr, BytesAttr])


def op_class(op: str | type[DataflowOp]) -> type[DataflowOp]:
    """The op class of a mnemonic ("add"); a class is returned as it is. Raises ModelError."""
    if not isinstance(op, str):
        return op
    if op not in OPS:
        raise ModelError(f"no dataflow op is called {op!r}")
    return OPS[op]


@cache
def context() -> Context:
    """A parsing context that knows `builtin` and `dataflow`."""
    made = Context()
    made.load_dialect(Builtin)
    made.load_dialect(Dataflow)
    return made
