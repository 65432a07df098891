"""The Graph: a module of the `dataflow` dialect with what every part of the compiler asks of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import DictionaryAttr, ModuleOp, StringAttr
from xdsl.ir import Block, Operation, SSAValue
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException

from mapper.errors import ModelError
from mapper.ir.dialect import context
from mapper.ir.op import DataflowOp, parent_op, tensor_type
from mapper.ir.params import parameters
from mapper.ir.sections import Section, sections_of
from mapper.ir.strings import check_strings
from mapper.ir.structure import GraphOp, OutputOp, RepeatOp, WeightOp
from mapper.ir.switch import Switch
from mapper.ir.types import Array, TensorType
from mapper.ir.weights import WeightSymbol

_MODEL = "dataflow.model"


@dataclass(frozen=True, eq=False)
class Graph:
    """One model. `path` is the model file it came from and `folder` where its weight files are (None:
    built in code). Where the file holds two graphs, this is the one that decodes, and `switch` leads to both.

    Passes never change a Graph; they return a new one, of this graph alone.
    """

    module: ModuleOp
    path: Path | None = None
    folder: Path | None = None
    switch: Switch | None = None

    # the other graph of the file ---------------------------------------------------------------------------

    def chosen(self, inputs: Mapping[str, Array]) -> Graph:
        """The graph that the file means for these inputs: this one unless a switch says otherwise."""
        return self if self.switch is None else self.switch.graph(self.switch.choose(inputs))

    def phase(self, name: str) -> Graph:
        """The file's graph for "prefill" or "decode": this one where both share it."""
        if self.switch is None or name not in self.switch.phases:
            return self
        return self.switch.graph(name)

    # the module's parts ------------------------------------------------------------------------------------

    @cached_property
    def op(self) -> GraphOp:
        """The graph op. Raises ModelError where the module has none, or more than one."""
        found = [op for op in self.module.ops if isinstance(op, GraphOp)]
        if len(found) != 1:
            raise ModelError(f"a module with {len(found)} graphs")
        return found[0]

    @property
    def block(self) -> Block:
        """The block of the graph's ops; its arguments are the inputs."""
        return self.op.body.block

    @cached_property
    def inputs(self) -> list[tuple[str, TensorType]]:
        """(name, type) of every input."""
        return [
            (n, tensor_type(v)) for n, v in zip(self.op.attr("input_names"), self.block.args, strict=True)
        ]

    @cached_property
    def outputs(self) -> list[tuple[str, TensorType]]:
        """(name, type) of every output."""
        return [(n, tensor_type(v)) for n, v in self.output_values.items()]

    @cached_property
    def input_values(self) -> dict[str, SSAValue]:
        """Input name -> its value."""
        return dict(zip(self.op.attr("input_names"), self.block.args, strict=True))

    @cached_property
    def output_values(self) -> dict[str, SSAValue]:
        """Output name -> its value."""
        last = self.block.last_op
        if not isinstance(last, OutputOp):
            raise ModelError("a graph without dataflow.output")
        return dict(zip(self.op.attr("output_names"), last.operands, strict=True))

    @cached_property
    def weights(self) -> dict[str, WeightSymbol]:
        """Every weight symbol by name."""
        found: dict[str, WeightSymbol] = {}
        for op in self.module.ops:
            if isinstance(op, WeightOp):  # parts of a packed weight stand before it
                found[op.attr("sym_name")] = WeightSymbol.from_op(op, self.folder, found)
        return found

    def know(self, weights: Mapping[str, WeightSymbol]) -> None:
        """Spares the decoding of weight ops that were just made of `weights`."""
        found = {
            n: w if w.file is None or w.folder == self.folder else replace(w, folder=self.folder)
            for n, w in weights.items()
        }
        self.__dict__["weights"] = found

    @cached_property
    def roles(self) -> dict[str, Any]:
        """{"inputs": {name: role}, "outputs": {name: role}, ...} as recognition left them."""
        return {"inputs": {}, "outputs": {}, **self.op.attr("roles")}

    def inputs_with_role(self, role: str) -> list[str]:
        """Names of the inputs whose role is `role`, or starts with `role` and a dot."""
        return [n for n, r in self.roles["inputs"].items() if r == role or r.startswith(role + ".")]

    def outputs_with_role(self, role: str) -> list[str]:
        """Names of the outputs whose role is `role`, or starts with `role` and a dot."""
        return [n for n, r in self.roles["outputs"].items() if r == role or r.startswith(role + ".")]

    # ops ---------------------------------------------------------------------------------------------------

    def top(self) -> list[DataflowOp]:
        """The graph's own ops in order, repeats as one op, without the final output op."""
        return [op for op in self.block.ops if isinstance(op, DataflowOp) and not isinstance(op, OutputOp)]

    def ops(self) -> Iterator[DataflowOp]:
        """All ops in order; a repeat op itself is followed by the ops of its body (each once)."""
        for op in self.top():
            yield op
            if isinstance(op, RepeatOp):
                yield from op.ops()

    def sections(self) -> list[Section]:
        """The graph cut at its repeats: stretches of plain ops (count 1) and repeats, in order."""
        return sections_of(self.top(), self.input_values, self.output_values)

    def weight(self, op: DataflowOp, attribute: str = "weight", iteration: int = 0) -> WeightSymbol | None:
        """The weight that an op's attribute names, through the slot table inside a repeat; or None."""
        name = op.attr(attribute)
        if name is None:
            return None
        repeat = parent_op(op, RepeatOp)
        if isinstance(repeat, RepeatOp):
            table: Mapping[str, tuple[str, ...]] = repeat.attr("table")
            name = table[name][iteration] if name in table else name
        return self.weights[name]

    # figures -----------------------------------------------------------------------------------------------

    @property
    def sha256(self) -> str:
        """Digest of the model file, "" where there is none."""
        return self._model().get("sha256", "")

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model().get("name", "")

    @cached_property
    def params(self) -> int:
        """Number of stored elements of the model's parameters; a weight that two symbols share counts once.

        Rotary frequencies and derived tables are no parameters, nor are weights that nothing uses."""
        seen: dict[Any, int] = {}
        for graph in (self, *map(self.phase, self.switch.phases if self.switch else ())):
            symbols = graph.weights
            parts = {p.name for w in symbols.values() if w.packing for p in w.packing.parts.values()}
            for name in parameters(graph) - parts:
                weight = symbols[name]
                stored = weight.root
                name = stored.name if weight.derivation is not None or weight.packing is not None else name
                key = (stored.file, stored.offset, stored.bytes) if stored.file is not None else name
                seen[key] = weight.elements  # of a packed weight those it stands for
        return sum(seen.values())

    @cached_property
    def layers(self) -> int:
        """Number of attention layers (those inside a repeat count once per iteration), or of key caches where
        more of them are known than attentions were recognised."""
        names = ("attention", "latent_attention", "cached_attention", "cached_latent_attention")
        found = sum(s.count * sum(op.mnemonic in names for op in s.ops) for s in self.sections())
        return max(found, len(self.inputs_with_role("past.key")), len(self.inputs_with_role("state.key")))

    @cached_property
    def files(self) -> list[str]:
        """The weight files, relative to `folder`, sorted."""
        return sorted({w.file for w in self.weights.values() if w.file is not None})

    def _model(self) -> dict[str, str]:
        attr = self.module.attributes.get(_MODEL)
        if not isinstance(attr, DictionaryAttr):
            return {}
        return {k: v.data for k, v in attr.data.items() if isinstance(v, StringAttr)}

    # text --------------------------------------------------------------------------------------------------

    def print(self) -> str:
        """The module as text; `Graph.parse` gives it back exactly."""
        out = StringIO()
        Printer(stream=out).print_op(self.module)
        return out.getvalue() + "\n"

    @staticmethod
    def parse(text: str, path: Path | None = None, folder: Path | None = None) -> Graph:
        """The graph of a printed module, verified. Raises ModelError."""
        check_strings(text)
        try:
            module = Parser(context(), text).parse_module()
        except (ParseError, VerifyException, ValueError, RecursionError) as error:
            raise ModelError(f"not a dataflow module: {error}") from error
        graph = Graph(module, path, folder)
        graph.verify()
        return graph

    def verify(self) -> None:
        """Checks structure (SSA, dominance, attributes) and every op's types. Raises ModelError naming the
        op."""
        from mapper.ir.verify import verify_types

        try:
            self.module.verify()
        except VerifyException as error:
            raise ModelError(f"malformed dataflow module: {error}") from error
        verify_types(self)

    def clone(self) -> Graph:
        """A deep copy, for a pass to change."""
        module: Operation = self.module.clone()
        assert isinstance(module, ModuleOp)
        return Graph(module, self.path, self.folder)
