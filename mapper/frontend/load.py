"""`load`: a model file to a graph of recognised transformer ops."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mapper.errors import MapperError, ModelError, UnsupportedModelError
from mapper.frontend import symbols
from mapper.frontend.abridge import abridge
from mapper.frontend.emit import emit
from mapper.frontend.extend import NotAlike, extend
from mapper.frontend.guard import GuardedModel, read_model
from mapper.frontend.importer import declared_dims, import_model
from mapper.frontend.net import Net
from mapper.frontend.recognise import recognise as recognise_net
from mapper.frontend.rewrite import data_values, topological
from mapper.frontend.roles import find_roles
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
    model = read_model(path, external_root)
    short = abridge(model) if recognise else None
    if short is not None:
        try:
            graph = extend(load_model(short.model, identify=identify), short)
            graph.verify()
            return graph
        except (NotAlike, MapperError):
            pass  # the whole model tells what is wrong
    return load_model(model, recognise, identify)


def load_model(model: GuardedModel, recognise: bool = True, identify: bool = True) -> Graph:
    """The graph of a model that was read, every layer looked at."""
    try:
        net = canonical(model)
        refuse_foreign(net)
        if recognise:
            net = recognise_net(net, model.path.parent)
        graph = emit(net, model.path, digest(model) if identify else "", find_roles(net))
    except RecursionError as error:
        raise ModelError(f"{model.path}: the graph is nested too deeply") from error
    graph = grouped(graph) if recognise else graph
    graph.verify()
    return graph


def canonical(model: GuardedModel) -> Net:
    """The model as canonical primitives, its sizes named batch, sequence and past where it is a decoder."""
    tags = symbols.tags(declared_dims(model))
    raw = import_model(model, tags)
    if not tags:
        return raw
    return import_model(model, symbols.untag(symbols.solve(symbols.equations(raw)), tags))


def refuse_foreign(net: Net) -> None:
    """Raises UnsupportedModelError for a graph with a convolution and no attention."""
    nodes = topological(net)
    data = data_values(nodes)
    if any(n.op == "softmax" and id(n.outputs[0]) in data for n in nodes):
        return
    for node in nodes:
        if node.op == "conv":
            reason = "a convolution in a graph without attention: not a transformer"
            raise UnsupportedModelError(f"node {node.origin!r} (Conv): {reason}")


def digest(model: GuardedModel) -> str:
    """SHA-256 of the model file."""
    with model.path.open("rb") as file:  # mapped pages would count as memory of this process
        return hashlib.file_digest(file, "sha256").hexdigest()


def grouped(graph: Graph) -> Graph:
    """The graph with its repeated layers in `repeat` regions."""
    from mapper.passes.repeat import Repeat

    return Repeat().apply(graph)
