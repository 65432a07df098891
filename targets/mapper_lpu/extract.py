"""The decoder in a serving-form graph: which op is which, found by following values, not by names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xdsl.ir import SSAValue

from mapper.errors import LoweringError
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.sections import Section
from mapper_lpu.spec import Attention, Decoder, Matrix, Mlp, Norm, Rope

HEADS_AND_TOKENS = (0, 2, 1, 3)


@dataclass(frozen=True)
class Numbering:
    """Row of the ops table of each op."""

    ids: Mapping[DataflowOp, int]

    def __call__(self, op: DataflowOp) -> int:
        return self.ids[op]


def extract(graph: Graph, phase: str, numbers: Mapping[DataflowOp, int], context: int) -> Decoder:
    """The decoder of a serving form. Raises LoweringError naming the op that this target does not map."""
    sections = graph.sections()
    if [s.repeat is not None for s in sections] != [False, True, False]:
        raise LoweringError(
            f"{phase}: the lpu target maps one run of equal layers between an embedding and a head"
        )
    before, layers, after = sections
    number = Numbering(numbers)
    embed = _only(before.ops, "embed", "before the layers", sole=True)
    batch, tokens, width = embed.result_shape()
    layer = _Layer(layers, number)
    norm = _only(after.ops, "norm", "after the layers")
    head = _only(after.ops, "lm_head", "after the layers")
    _check_rest(after.ops, {norm, head})
    if head.operands[0] is not norm.results[0] or norm.operands[0] is not layers.carried[0].result:
        raise _refuse(head, "the head does not read the normed result of the layers")
    vocabulary = head.result_shape()[-1]
    attention_norm, attention, mlp_norm, mlp = layer.read()
    return Decoder(
        batch=batch,
        tokens=tokens,
        context=context,
        width=width,
        vocabulary=vocabulary,
        layers=layers.count,
        embedding=embed.attr("table"),
        embed_op=number(embed),
        attention_norm=attention_norm,
        attention=attention,
        mlp_norm=mlp_norm,
        mlp=mlp,
        final_norm=_norm(norm, number),
        head=_matrix(head, "weight", "transposed", width, vocabulary, number(head)),
        table=dict(layers.table),
    )


def _refuse(op: DataflowOp, why: str) -> LoweringError:
    place = op.node or op.mnemonic
    return LoweringError(f"lpu does not map {op.mnemonic} ({place}): {why}")


def _only(ops: Sequence[DataflowOp], mnemonic: str, where: str, sole: bool = False) -> DataflowOp:
    found = [op for op in ops if op.mnemonic == mnemonic]
    if len(found) != 1:
        raise LoweringError(f"the lpu target needs one {mnemonic} {where}, the model has {len(found)}")
    if sole:
        _check_rest(ops, {found[0]})
    return found[0]


def _check_rest(ops: Sequence[DataflowOp], known: set[DataflowOp]) -> None:
    for op in ops:
        if op not in known and op.mnemonic not in ("output", "yield"):
            raise _refuse(op, "it is not part of a decoder layer that this target knows")


def _norm(op: DataflowOp, number: Numbering) -> Norm:
    if op.attr("kind") != "rms" or op.attr("bias") is not None:
        raise _refuse(
            op, f"{op.attr('kind')} norm{' with bias' if op.attr('bias') else ''}; only rms without bias"
        )
    return Norm(op.attr("weight"), op.attr("weight_offset"), op.attr("eps"), number(op))


def _matrix(op: DataflowOp, weight: str, flag: str, k: int, n: int, op_id: int) -> Matrix:
    if op.attr("round_block"):
        raise _refuse(op, "its activations are rounded to 8 bits; products are in fp16 here")
    bias = {"weight": "bias"}.get(weight, f"{weight}_bias")
    if op.attr(bias) is not None:
        raise _refuse(op, "a bias")
    return Matrix(op.attr(weight), op.attr(flag), k, 0, n, op_id)


def _owner(value: SSAValue) -> DataflowOp | None:
    return value.owner if isinstance(value.owner, DataflowOp) else None


class _Layer:
    """Reads one layer from the repeat section."""

    def __init__(self, section: Section, number: Numbering) -> None:
        self.section, self.number = section, number
        self.seen: set[DataflowOp] = set()

    def read(self) -> tuple[Norm, Attention, Norm, Mlp]:
        if len(self.section.carried) != 1:
            raise LoweringError("lpu: more than one value is carried from layer to layer")
        x = self.section.carried[0].argument
        attend = _only(self.section.ops, "cached_attention", "per layer")
        mlp_op = _only(self.section.ops, "gated_mlp", "per layer")
        output, residual, gathered = self._output(attend, x)
        norm = self._norm_of(x)
        attention = self._attention(attend, norm, output, residual)
        self.seen |= {attend, output, residual, *gathered}
        second = self._norm_of(residual.results[0])
        if mlp_op.operands[0] is not second.results[0]:
            raise _refuse(mlp_op, "it does not read the norm after attention")
        last = self._add(mlp_op.results[0], residual.results[0])
        if self.section.carried[0].yielded is not last.results[0]:
            raise _refuse(last, "the layer's result is not its second residual sum")
        self.seen |= {mlp_op, last, norm, second}
        _check_rest(self.section.ops, self.seen)
        return _norm(norm, self.number), attention, _norm(second, self.number), self._mlp(mlp_op, last)

    def _norm_of(self, value: SSAValue) -> DataflowOp:
        users = [u.operation for u in value.uses]
        found = [u for u in users if isinstance(u, DataflowOp) and u.mnemonic == "norm"]
        if len(found) != 1:
            raise LoweringError("lpu: a residual is not read by exactly one norm")
        return found[0]

    def _add(self, a: SSAValue, b: SSAValue) -> DataflowOp:
        for use in a.uses:
            op = use.operation
            if isinstance(op, DataflowOp) and op.mnemonic == "add" and set(op.operands) == {a, b}:
                return op
        owner = _owner(a)
        assert owner is not None
        raise _refuse(owner, "its result is not added to the residual")

    def _output(self, attend: DataflowOp, x: SSAValue) -> tuple[DataflowOp, DataflowOp, list[DataflowOp]]:
        """The output projection, the residual add and the ops between attention and the projection."""
        op = attend
        between: list[DataflowOp] = []
        while True:
            consumers = op.consumers()
            if len(consumers) != 1:
                raise _refuse(op, "its result is used more than once")
            op = consumers[0]
            if op.mnemonic == "linear":
                return op, self._add(op.results[0], x), between
            if op.mnemonic == "transpose" and tuple(op.attr("perm")) != HEADS_AND_TOKENS:
                raise _refuse(op, "another order than heads and tokens swapped")
            if op.mnemonic not in ("transpose", "reshape"):
                raise _refuse(op, "it stands between attention and its output projection")
            between.append(op)

    def _projection(self, value: SSAValue, norm: DataflowOp) -> tuple[Matrix, Rope | None]:
        """The linear layer (columns of it) and the rotary embedding that make q, k or v."""
        rope: Rope | None = None
        begin = end = -1
        op = _owner(value)
        while op is not None:
            self.seen.add(op)
            if op.mnemonic == "rope_at" and rope is None:
                rope = Rope(op.attr("table"), op.attr("style"), op.attr("rotary_dim"), self.number(op))
            elif op.mnemonic == "linear":
                if op.operands[0] is not norm.results[0]:
                    raise _refuse(op, "it does not read the layer's norm")
                columns = op.result_shape()[-1]
                begin, end = (0, columns) if end < 0 else (begin, end)
                full = _matrix(op, "weight", "transposed", op.operand_shape(0)[-1], columns, self.number(op))
                return Matrix(full.slot, full.transposed, full.k, begin, end, full.op), rope
            elif op.mnemonic == "split" and end < 0 and op.attr("axis") in (-1, len(op.operand_shape(0)) - 1):
                index = [r is value for r in op.results].index(True)
                sizes = op.attr("sizes")
                begin, end = sum(sizes[:index]), sum(sizes[: index + 1])
            elif op.mnemonic not in ("transpose", "reshape"):
                raise _refuse(op, "it stands between a projection and attention")
            elif op.mnemonic == "transpose" and tuple(op.attr("perm")) != HEADS_AND_TOKENS:
                raise _refuse(op, "another order than heads and tokens swapped")
            value = op.operands[0]
            op = _owner(value)
        raise LoweringError("lpu: query, key or value is not made by a linear layer")

    def _attention(
        self, attend: DataflowOp, norm: DataflowOp, output: DataflowOp, residual: DataflowOp
    ) -> Attention:
        for name, none in (("window", 0), ("chunk", 0), ("softcap", 0.0), ("slopes", None)):
            if attend.attr(name) != none:
                raise _refuse(attend, f"{name} = {attend.attr(name)}")
        if attend.operand("sinks") is not None:
            raise _refuse(attend, "attention sinks")
        q_value, k_value, v_value = attend.operands[:3]
        q, q_rope = self._projection(q_value, norm)
        k_append, v_append = _owner(k_value), _owner(v_value)
        if k_append is None or v_append is None or {k_append.mnemonic, v_append.mnemonic} != {"cache_append"}:
            raise _refuse(attend, "keys and values do not come from a cache")
        self.seen |= {k_append, v_append}
        k, k_rope = self._projection(k_append.operands[1], norm)
        v, v_rope = self._projection(v_append.operands[1], norm)
        same = (q_rope is None) == (k_rope is None) and (
            q_rope is None
            or k_rope is None
            or (q_rope.table, q_rope.style, q_rope.rotary) == (k_rope.table, k_rope.style, k_rope.rotary)
        )
        if not same or v_rope is not None:
            raise _refuse(attend, "query and key have different rotary embeddings")
        _, heads, _, head_dim = attend.operand_shape(0)
        kv_heads = attend.operand_shape(1)[1]
        o = _matrix(
            output, "weight", "transposed", heads * head_dim, output.result_shape()[-1], self.number(output)
        )
        return Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=attend.attr("scale"),
            rope=q_rope,
            q=q,
            k=k,
            v=v,
            o=o,
            op=self.number(attend),
            k_rope_op=k_rope.op if k_rope is not None else k.op,
            k_append_op=self.number(k_append),
            v_append_op=self.number(v_append),
            residual_op=self.number(residual),
        )

    def _mlp(self, op: DataflowOp, residual: DataflowOp) -> Mlp:
        if op.attr("act") != "silu":
            raise _refuse(op, f"activation {op.attr('act')}")
        width = op.operand_shape(0)[-1]
        number = self.number(op)
        sizes = self._inner(op)
        parts = {}
        for name, k, n in (("gate", width, sizes), ("up", width, sizes), ("down", sizes, width)):
            parts[name] = _matrix(op, name, f"{name}_transposed", k, n, number)
        return Mlp(parts["gate"], parts["up"], parts["down"], number, self.number(residual))

    def _inner(self, op: DataflowOp) -> int:
        symbol = self.section.table.get(op.attr("gate"), (op.attr("gate"),))[0]
        graph_op = op.get_toplevel_object()
        for found in graph_op.walk():
            if (
                found.name == "dataflow.weight"
                and isinstance(found, DataflowOp)
                and found.attr("sym_name") == symbol
            ):
                shape = found.attr("type").ints
                return int(shape[0] if op.attr("gate_transposed") else shape[1])
        raise _refuse(op, f"weight {symbol} is not declared")
