"""`load`: a model file to a graph of recognised transformer ops."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from mapper.errors import MapperError, ModelError
from mapper.frontend import symbols
from mapper.frontend.abridge import abridge
from mapper.frontend.caches import find_caches, flat_heads
from mapper.frontend.emit import emit
from mapper.frontend.extend import NotAlike, extend
from mapper.frontend.foreign import refuse_foreign
from mapper.frontend.guard import GuardedModel, read_model
from mapper.frontend.importer import Reading, declared_dims, import_model
from mapper.frontend.modes import declared_mode, questions, with_modes
from mapper.frontend.net import Net
from mapper.frontend.recognise import recognise as recognise_net
from mapper.frontend.rewrite import topological
from mapper.frontend.roles import find_roles
from mapper.frontend.split import Split, find_split, phases
from mapper.ir.graph import Graph


def load(
    path: str | Path, recognise: bool = True, external_root: str | Path | None = None, identify: bool = True
) -> Graph:
    """The graph of an ONNX file, verified; reads no weights.

    With `recognise`, transformer ops and repeated layers are found; without, there are primitives alone.
    Weights lie in the model's folder or, where it is given, in `external_root` (links are followed).
    Without `identify` the file is not hashed, which takes seconds for one of gigabytes.
    Raises ModelError for a malformed or hostile file, and for a model that is refused UnsupportedModelError,
    which names node, operator and reason.
    """
    model = replace(read_model(path, external_root), identify=identify)
    split = find_split(model)
    if split is not None:
        return phases(split, lambda taken: load_whole(model, recognise, Reading((split.node, taken)), split))
    mode = declared_mode(model.record)
    if mode is None:
        return load_reading(model, recognise)
    graph = load_reading(model, recognise, Reading(mode=mode))
    return with_modes(
        graph,
        mode,
        lambda other: load_reading(model, recognise, Reading(mode=other)),
        lambda: questions(canonical(model, Reading(mode="inside")), graph),
    )


def load_reading(model: GuardedModel, recognise: bool, reading: Reading | None = None) -> Graph:
    """The graph of a model, of one reading where there are several; layers that repeat others are not looked
    at where that is enough."""
    short = abridge(model) if recognise else None
    if short is not None:
        try:
            graph = extend(load_whole(short.model, recognise, reading), short)
            graph.verify()
            return graph
        except (NotAlike, MapperError):
            pass  # the whole model tells what is wrong
    return load_whole(model, recognise, reading)


def load_whole(
    model: GuardedModel,
    recognise: bool = True,
    reading: Reading | None = None,
    split: Split | None = None,
) -> Graph:
    """The graph of a model, every layer looked at."""
    try:
        net = canonical(model, reading)
        refuse_foreign(net)
        if recognise:
            net = recognise_net(net, model.path.parent)
        roles = find_roles(net)
        if split is not None:
            roles["inputs"][split.name] = "use_cache"
        graph = emit(net, model.path, digest(model), roles)
    except RecursionError as error:
        raise ModelError(f"{model.path}: the graph is nested too deeply") from error
    graph = grouped(graph) if recognise else graph
    graph.verify()
    return graph


def canonical(model: GuardedModel, reading: Reading | None = None) -> Net:
    """The model as canonical primitives, its sizes named batch, sequence and past where it is a decoder."""
    tags = symbols.tags(declared_dims(model))
    raw = import_model(model, tags, reading)
    caches = find_caches(raw, topological(raw))
    if any(cache.node.outputs[0].rank == 3 for cache in caches):
        reading = replace(reading or Reading(), heads=flat_heads(raw, topological(raw)))
        raw = import_model(model, tags, reading)
    if not tags:
        return raw
    pairs = symbols.equations(raw)
    if any("?" in cache.layout for cache in caches):
        # axes of caches that only show once sizes are known to be equal
        known = symbols.solve(raw.equal)
        clearer = import_model(model, {s: t.substitute(known) for s, t in tags.items()}, reading)
        pairs = [*raw.equal, *symbols.equations(clearer)]
    return import_model(model, symbols.untag(symbols.solve(pairs), tags), reading)


def digest(model: GuardedModel) -> str:
    """SHA-256 of the model file, "" where it is not to be identified."""
    if not model.identify:
        return ""
    with model.path.open("rb") as file:  # mapped pages would count as memory of this process
        return hashlib.file_digest(file, "sha256").hexdigest()


def grouped(graph: Graph) -> Graph:
    """The graph with its repeated layers in `repeat` regions."""
    from mapper.passes.repeat import Repeat

    return Repeat().apply(graph)
