"""The nodes of a mixture of experts on one chip, from a configuration's numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mapper_gpu.routing import routing_of

if TYPE_CHECKING:
    from mapper_gpu.shape import Mixture, Writer


def divide(count: int, by: int) -> int:
    """Parts of a count on one of `by` chips: whole ones, at least one."""
    return max(1, math.ceil(count / by))


def active_experts(mixture: Mixture, tokens: float) -> float:
    """Experts that at least one of `tokens` chooses, each token choosing evenly: E (1 - (1 - k/E)^tokens)."""
    return float(mixture.count * (1 - (1 - mixture.chosen / mixture.count) ** tokens))


def write_experts(w: Writer, e: Mixture) -> None:
    """Experts that some token chose, each with its share of the rows; a tensor-parallel chip holds a slice
    of every expert, an expert-parallel one whole experts, of which the fullest group counts, with exchanges
    before and behind where the groups are in several replicas."""
    p, hidden = w.parallel, w.shape.hidden
    w.linear("mlp_in", "router", e.count, hidden, "", out_dtype="f32")
    w.value("chosen", e.chosen, "f32")
    w.add("route", ["router"], "chosen", name="route")
    groups = max(1, min(p.expert, e.count))
    between = groups > 1 and p.spread > 1
    inside = groups // p.spread if between else groups
    inner = divide(e.inner, max(1, p.tensor // max(1, inside)))
    tokens = w.rows * (p.data if between else 1)
    used, filled = _fullest(e, tokens, groups)
    rows = max(1, math.ceil(filled / used))
    held = divide(e.count, groups)
    source = "mlp_in"
    if between:
        w.value("dispatched", hidden, w.precision.operand, rows=max(1, used * rows))
        source = w.add("alltoall", ["mlp_in", "chosen"], "dispatched", name="dispatch")
    mats = ("expert.gate", "expert.up") if w.shape.gated else ("expert.up",)
    for name in mats:
        w.linear(source, name, inner, hidden, count=used, total=held, rows=rows)
    w.value("expert.inner", inner * used, w.precision.operand)
    w.add("gate" if w.shape.gated else "point", mats, "expert.inner", name="gate")
    w.linear("expert.inner", "expert.down", hidden, inner, "k", count=used, total=held, rows=rows)
    made = "expert.down"
    if between:
        w.value("returned", hidden, w.precision.activations, rows=max(1, used * rows))
        made = w.add("alltoall", ["expert.down"], "returned", name="combine")
    w.value("mlp_out", hidden, w.precision.activations)
    if e.shared:
        width = divide(e.shared, p.tensor)
        for name in ("shared.gate", "shared.up"):
            w.linear("mlp_in", name, width, hidden)
        w.value("shared.inner", width, w.precision.operand)
        w.add("gate", ["shared.gate", "shared.up"], "shared.inner", name="gate")
        w.linear("shared.inner", "shared.down", hidden, width, "k")
        w.add("combine", [made, "chosen", "shared.down"], "mlp_out", name="combine")
    else:
        w.add("combine", [made, "chosen"], "mlp_out", name="combine")


def _fullest(e: Mixture, tokens: int, groups: int) -> tuple[int, float]:
    """(experts, rows) of the fullest of some groups; of the mean one where experts do not divide."""
    if groups == 1 or e.count % groups:
        return max(1, math.ceil(active_experts(e, tokens) / groups)), tokens * e.chosen / groups
    how = routing_of(tokens, e.count, e.chosen).shared(tokens, groups)
    return max(1, math.ceil(how.distinct - 1e-9)), how.fullest
