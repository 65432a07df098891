"""Files whose fused operators can be fed with caches that grow or with buffers of fixed length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mapper.errors import ModelError
from mapper.frontend.emit import emit
from mapper.frontend.net import Array, Net
from mapper.frontend.ops_cache import MODES
from mapper.frontend.proto import ModelRecord
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from mapper.ir.switch import Switch

FUSED = "GroupQueryAttention"
_QUESTIONS = ("start", "total", "past", "count")


def declared_mode(record: ModelRecord) -> str | None:
    """The mode that the declared shapes ask for: "inside" where a cache leaves as long as it came, else
    "plain"; None where no cache of the file leaves the choice."""
    given = {v.name: v.dims for v in record.graph.inputs}
    made = {v.name: v.dims for v in record.graph.outputs}
    found = [n for n in record.graph.nodes if n.op == FUSED and len(n.inputs) > 4 and n.inputs[3]]
    if not found:
        return None
    for node in found:
        past, present = given.get(node.inputs[3]), made.get(node.outputs[1] if len(node.outputs) > 1 else "")
        if (
            past
            and present
            and len(past) == len(present) == 4
            and past[2] is not None
            and past[2] == present[2]
        ):
            return "inside"
    return "plain"


def questions(net: Net, graph: Graph) -> Graph:
    """The graph that says where each cache's new rows start, how many tokens there are, the cache's rows and
    the new ones: outputs start.<i>, total.<i>, past.<i>, count.<i>."""
    outputs = []
    for i, (start, total, past, count) in enumerate(net.caches.asked):
        answers = (start, total, net.ints([past], 0), net.ints([count], 0))
        outputs += [(f"{name}.{i}", value) for name, value in zip(_QUESTIONS, answers, strict=True)]
    asking = Net(list(net.inputs), outputs, net.nodes)
    assert graph.path is not None
    return emit(asking, graph.path, graph.sha256, {"inputs": {}, "outputs": {}})


@dataclass(eq=False)
class Modes:
    """The graphs of a file by mode, loaded when they are first asked for. `ask` gives the graph that answers
    `questions`."""

    known: dict[str, Graph]
    load: Callable[[str], Graph]
    ask: Callable[[], Graph]
    asking: list[Graph] = field(default_factory=list)

    def graph(self, mode: str) -> Graph:
        """The graph read in a mode."""
        if mode not in self.known:
            self.known[mode] = self.load(mode)
        return self.known[mode]

    def choose(self, inputs: Mapping[str, Array]) -> str:
        """The mode that inputs are meant for. Raises ModelError where caches are meant differently."""
        if not self.asking:
            self.asking.append(self.ask())
        known = evaluate(self.asking[0], inputs)
        found = {_mode(known, i) for i in range(len(known) // len(_QUESTIONS))}
        if len(found) != 1:
            raise ModelError(f"the caches given are used in different ways: {sorted(found)}")
        return found.pop()


def _mode(known: Mapping[str, Array], i: int) -> str:
    start, total, past, count = (known[f"{name}.{i}"] for name in _QUESTIONS)
    if bool(np.all(start == past)) and int(total) == int(past) + int(count):
        return MODES[0]
    return MODES[1] if int(total) <= int(past) else MODES[2]


def with_modes(graph: Graph, mode: str, load: Callable[[str], Graph], ask: Callable[[], Graph]) -> Graph:
    """The graph, read in `mode`, with the switch to the other modes."""
    modes = Modes({mode: graph}, load, ask)
    return replace(graph, switch=Switch(modes.choose, modes.graph))
