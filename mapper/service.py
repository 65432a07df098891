"""The flow of `mapper serve`: model -> graph -> target's iteration times -> requests served -> measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapper import backend as targets
from mapper.catalog import machine_for
from mapper.driver import load
from mapper.errors import UsageError
from mapper.serving.batching import serve
from mapper.serving.measures import measure
from mapper.serving.phases import Deployment, Policy, Serves
from mapper.serving.speculative import Speculation
from mapper.serving.workload import Workload


@dataclass(frozen=True)
class Service:
    """What is to be served, how, and for whom. `tokens` and `sequences` replace the stack's limits of an
    iteration."""

    model: Path
    target: str
    machine: str | None
    deployment: Deployment
    workload: Workload
    speculation: Speculation
    tokens: int | None = None
    sequences: int | None = None


def run(service: Service) -> dict[str, Any]:
    """Serve it; the record that `mapper serve --json` prints.

    Raises UsageError where the target has no serving view or no such stack, CapacityError, ModelError.
    """
    backend = targets.load(service.target)
    if not isinstance(backend, Serves):
        raise UsageError(f"target {service.target!r} has no serving view: it gives no iteration times")
    policy = _policy(backend, service)
    machine = machine_for(backend, service.machine)
    phases = backend.phases(load(service.model, identify=False), machine, service.deployment)
    found = measure(serve(phases, service.workload, policy, service.speculation))
    return {
        "model": str(service.model),
        "target": service.target,
        "machine": machine.name,
        "chips": service.deployment.chips,
        "stack": service.deployment.stack,
        "concurrency": service.workload.concurrency,
        "rate": service.workload.rate,
        "tokens_in": service.workload.prompt,
        "tokens_out": service.workload.output,
        "cache_tokens": phases.capacity,
        "speculative": {
            "draft": service.speculation.draft,
            "acceptance": service.speculation.acceptance,
            "tokens_per_step": service.speculation.gain,
        },
        **found.record(),
    }


def _policy(backend: Serves, service: Service) -> Policy:
    name = service.deployment.stack
    known = {stack.name: stack.policy for stack in backend.stacks()}
    if name is not None and name not in known:
        raise UsageError(f"no serving software called {name!r}; known: {', '.join(known) or 'none'}")
    policy = known[name] if name is not None else Policy()
    tokens = policy.tokens if service.tokens is None else service.tokens
    sequences = policy.sequences if service.sequences is None else service.sequences
    return replace(policy, tokens=tokens, sequences=sequences)
