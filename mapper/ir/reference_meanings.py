"""The reference semantics of every op, complete: importing this module loads all that register some."""

from __future__ import annotations

from collections.abc import Mapping

from mapper.ir import reference_compute, reference_experts, reference_shape, reference_transformer
from mapper.ir.reference import REGISTERED, Meaning

SOURCES = (reference_compute, reference_experts, reference_shape, reference_transformer)
"""The modules that register semantics."""

MEANINGS: Mapping[str, Meaning] = REGISTERED
"""Mnemonic -> meaning, of every op but the structural ones."""
