"""Recognition by meaning: primitives become transformer ops where that is numerically verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mapper.frontend.agree import Checker
from mapper.frontend.cut import View
from mapper.frontend.find_attention import attentions
from mapper.frontend.find_cache import appends
from mapper.frontend.find_experts import experts
from mapper.frontend.find_latent import latents
from mapper.frontend.find_linear import activations, heads, linears
from mapper.frontend.find_mlp import mlps
from mapper.frontend.find_norm import norms
from mapper.frontend.find_rope import ropes
from mapper.frontend.find_route import routes
from mapper.frontend.masks import classify
from mapper.frontend.net import Net
from mapper.frontend.rewrite import Match, rebuild

Finder = Callable[[View, Checker], list[Match]]


def routed(view: View, checker: Checker) -> list[Match]:
    """Routed experts and how they are chosen."""
    found = experts(view, checker)
    return found + routes(view, checker, found)


STAGES: tuple[tuple[Finder, ...], ...] = (
    (linears,),
    (norms, activations, ropes, attentions, appends),
    (mlps, heads, routed, latents),
)


def recognise(net: Net, folder: Path) -> Net:
    """The net with everything recognised that could be verified; what does not hold stays primitives."""
    checker = Checker(folder)
    for stage in STAGES:
        view = View.of(net)
        net = rebuild(net, [match for find in stage for match in find(view, checker)])
    return classify(net, folder)
