"""What the serving view needs of a target: how long one iteration takes, and how many cached tokens fit.

A backend that offers it implements `Serves` beside the Backend protocol. An iteration is one forward pass of
the model as in-flight batching runs it: all sequences that decode, and some tokens of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapper.ir.graph import Graph
    from mapper.machine import Machine


@dataclass(frozen=True)
class Iteration:
    """One forward pass. `decode` sequences take `width` new tokens each, with `context` tokens of cache on
    average; beside them `prefill` tokens of prompts, which see `seen` tokens each on average, of themselves
    and before; `prompts` is how many prompts they are of.
    """

    decode: int = 0
    context: float = 0.0
    width: int = 1
    prefill: int = 0
    seen: float = 0.0
    prompts: int = 0


@dataclass(frozen=True)
class Deployment:
    """How a model is served: number formats of weights, cache and routed experts (None: the target's widest,
    and for experts that of the weights), chips, and how they are split.

    `chips` is the tensor-parallel group; `experts` of these hold whole experts instead of slices; `replicas`
    groups among them hold a copy of attention each (attention data parallelism). `stack` names the serving
    software whose kernels and host are meant; None: the target's own kernels.
    """

    chips: int = 1
    weights: str | None = None
    cache: str | None = None
    experts: int = 1
    replicas: int = 1
    stack: str | None = None
    expert_weights: str | None = None


@dataclass(frozen=True)
class Policy:
    """How iterations are made up.

    At most `tokens` tokens of prompts and decode in one iteration, at most `sequences` sequences at a time.
    `mixed`: prompts ride along with decoding; else they are taken first, alone. `chunked`: a prompt may be
    split over iterations; else one that exceeds `tokens` makes an iteration that is longer. `reserve`: the
    whole request's cache is set aside when it starts; else the cache grows, and the latest request is put
    back when it is full.
    """

    tokens: int = 8192
    sequences: int = 2048
    mixed: bool = True
    chunked: bool = True
    reserve: bool = True


class Phases(Protocol):
    """A model compiled for serving."""

    @property
    def capacity(self) -> int:
        """Tokens of cache that fit beside the weights, of all sequences together."""

    def seconds(self, iteration: Iteration) -> float:
        """Time of one iteration, with the host's part where a stack was named."""


@dataclass(frozen=True)
class Stack:
    """A serving software as a target knows it: releases of `framework` of the years `since` .. `until`."""

    name: str
    summary: str
    framework: str
    since: int
    until: int
    policy: Policy = field(default_factory=Policy)


@runtime_checkable
class Serves(Protocol):
    """What a backend offers beside the Backend protocol where its models can be served."""

    def phases(self, graph: Graph, machine: Machine, deployment: Deployment) -> Phases:
        """Iteration times of `graph` on `machine`. Raises CapacityError where the weights do not fit,
        UsageError for formats or splits that the machine does not have."""

    def stacks(self) -> Sequence[Stack]:
        """The serving software that `Deployment.stack` may name."""
