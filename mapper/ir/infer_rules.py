"""The inference rules of every op, complete: importing this module loads all that register some."""

from __future__ import annotations

from collections.abc import Mapping

from mapper.ir import infer_experts, infer_primitives, infer_shape, infer_transformer
from mapper.ir.infer import REGISTERED, Rule
from mapper.ir.op import DataflowOp

SOURCES = (infer_experts, infer_primitives, infer_shape, infer_transformer)
"""The modules that register rules."""

RULES: Mapping[type[DataflowOp], Rule] = REGISTERED
"""Op class (or base class) -> rule."""
