"""Small decoders, one per convention of the key-value cache: where a cache comes from, how new rows get into
it, and what of it is an output. Norms and MLPs are those of `tiny`, the decoder around them is `decoders`."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.frontend.decoders import (
    FLOAT,
    HALF,
    INT,
    OPTIONS,
    ROOM,
    Attend,
    Case,
    count,
    decoder,
    flat,
    future,
    heads,
    later,
    scores,
)
from tests.frontend.tiny import (
    HEAD,
    HEADS,
    KV,
    SHARP,
    WIDTH,
    repeat,
    rope,
    split,
)  # fmt: skip

PERMS = {"BHLD": (0, 1, 2, 3), "BLHD": (0, 2, 1, 3), "BHDL": (0, 1, 3, 2), "LBHD": (2, 0, 1, 3)}


def growing(layout: str) -> Attend:
    """Caches of some layout that new rows are joined to."""
    perm = PERMS[layout]
    back = [perm.index(i) for i in range(4)]
    sizes: dict[str, int | str] = {"B": "B", "H": KV, "L": "P", "D": HEAD}
    shape = [sizes[a] for a in layout]

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, *shape)
            new = new if layout == "BHLD" else c.op("Transpose", new, perm=list(perm))
            joined = c.out(c.op("Concat", past, new, axis=layout.index("L")), f"new_{n}{i}")
            whole.append(joined if layout == "BHLD" else c.op("Transpose", joined, perm=back))
        return scores(c, q, whole, future(c, whole[0]))

    return attend


def merged_heads(c: Case, i: int, q: str, k: str, v: str) -> str:
    """Keys [B*H, D, P] and values [B*H, P, D], as older BLOOM exports have them."""
    whole = []
    for n, new, order in (("k", k, [0, 1, 3, 2]), ("v", v, [0, 1, 2, 3])):
        axis = 2 if n == "k" else 1
        past = c.given(f"past_{n}{i}", FLOAT, f"B*{KV}", *((HEAD, "P") if n == "k" else ("P", HEAD)))
        rows = c.op("Transpose", new, perm=order)
        size = [c.op("Shape", rows, start=j, end=j + 1) for j in (2, 3)]
        flat = c.op("Reshape", rows, c.op("Concat", c.ints(-1), *size, axis=0))
        joined = c.out(c.op("Concat", past, flat, axis=axis), f"new_{n}{i}")
        size = [c.op("Shape", joined, start=j, end=j + 1) for j in (1, 2)]
        wide = c.op("Reshape", joined, c.op("Concat", c.ints(-1, KV), *size, axis=0))
        whole.append(c.op("Transpose", wide, perm=order))
    return scores(c, q, whole, future(c, whole[0]))


def flat_rows(axis: int, written: bool = False) -> Attend:
    """Caches [B, P, Hkv*D], joined before the heads are split; or (`written`, opset 24) [B, M, Hkv*D]."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, "B", "M" if written else "P", KV * HEAD)
            if written:
                rows = c.op("TensorScatter", past, flat(c, new), c.given("starts", INT, "B"), axis=axis)
            else:
                rows = c.op("Concat", past, flat(c, new), axis=axis)
            wide = c.op("Reshape", c.out(rows, f"new_{n}{i}"), c.ints(0, 0, KV, HEAD))
            whole.append(c.op("Transpose", wide, perm=[0, 2, 1, 3]))
        if not written:
            return scores(c, q, whole, future(c, whole[0]))
        return c.op("Attention", q, *whole, "", "", "", c.given("lengths", INT, "B"), is_causal=1)

    return attend


def layer_stack(c: Case, i: int, q: str, k: str, v: str) -> str:
    """One [2, B, H, P, D] tensor per layer."""
    past = c.given(f"past_{i}", FLOAT, 2, "B", KV, "P", HEAD)
    whole = [
        c.op("Concat", c.op("Gather", past, c.const(j, np.int64), axis=0), new, axis=2)
        for j, new in enumerate((k, v))
    ]
    parts = [c.op("Unsqueeze", x, c.ints(0)) for x in whole]
    c.out(c.op("Concat", *parts, axis=0), f"new_{i}")
    return scores(c, q, whole, future(c, whole[0]))


def full_stack(kinds: bool, layers: int = 2) -> Attend:
    """One [N, 2, B, H, P, D] tensor for all layers, or (`kinds`) one [N, B, H, P, D] tensor for keys and one
    for values."""
    held: dict[str, list[str]] = {"k": [], "v": []}

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        whole = []
        for j, (n, new) in enumerate((("k", k), ("v", v))):
            shape: list[int | str] = ["B", KV, "P", HEAD]
            if kinds:
                past = c.op(
                    "Gather", c.given(f"past_{n}", FLOAT, layers, *shape), c.const(i, np.int64), axis=0
                )
            else:
                layer = c.op(
                    "Slice", c.given("past", FLOAT, layers, 2, *shape), c.ints(i), c.ints(i + 1), c.ints(0)
                )
                part = c.op("Split", c.op("Squeeze", layer, c.ints(0)), c.ints(1, 1), axis=0)
                c.nodes[-1].output.append(part + "b")
                past = c.op("Squeeze", part + ("b" if j else ""), c.ints(0))
            whole.append(c.op("Concat", past, new, axis=2))
            held[n].append(c.op("Unsqueeze", whole[-1], c.ints(0)))
        if i == layers - 1:
            stacks = {n: c.op("Concat", *held[n], axis=0) for n in "kv"}
            if kinds:
                for n in "kv":
                    c.out(stacks[n], f"new_{n}")
            else:
                c.out(c.op("Concat", *(c.op("Unsqueeze", stacks[n], c.ints(1)) for n in "kv"), axis=1), "new")
        return scores(c, q, whole, future(c, whole[0]))

    return attend


def half(c: Case, i: int, q: str, k: str, v: str) -> str:
    """Caches in f16 under f32 arithmetic."""
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", HALF, "B", KV, "P", HEAD)
        joined = c.op("Concat", past, c.op("Cast", new, to=HALF), axis=2)
        whole.append(c.op("Cast", c.out(joined, f"half_{n}{i}"), to=FLOAT))
    return scores(c, q, whole, future(c, whole[0]))


def beams(c: Case, i: int, q: str, k: str, v: str) -> str:
    """The batch of every cache is chosen by beam indices first."""
    if "beams" not in c.inputs:
        c.given("beams", INT, "B")
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.op("Gather", c.given(f"past_{n}{i}", FLOAT, "B", KV, "P", HEAD), "beams", axis=0)
        whole.append(c.out(c.op("Concat", past, new, axis=2), f"new_{n}{i}"))
    return scores(c, q, whole, future(c, whole[0]))


def rolling(c: Case, i: int, q: str, k: str, v: str) -> str:
    """The oldest rows leave as new ones come; a mask [B, ROOM] says which rows hold tokens."""
    if "mask" not in c.inputs:
        c.given("mask", INT, "B", ROOM)
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", FLOAT, "B", KV, ROOM, HEAD)
        rest = c.op("Slice", past, c.op("Shape", "ids", start=1, end=2), c.ints(ROOM), c.ints(2))
        whole.append(c.out(c.op("Concat", rest, new, axis=2), f"new_{n}{i}"))
    padding = c.op("Not", c.op("Cast", c.op("Unsqueeze", "mask", c.ints(1, 2)), to=TensorProto.BOOL))
    return scores(c, q, whole, c.op("Or", future(c, whole[0]), padding))


def counter(c: Case, i: int, q: str, k: str, v: str) -> str:
    """Static caches written from a counter `used` [] on; rotary tables are cut there, too."""
    if not i:
        at = c.given("counter", INT)
        end = c.op("Add", at, count(c, "ids", 1))
        c.known = [c.op("Range", at, end, c.const(1, np.int64))]
        angle = np.arange(64)[:, None] * 10.0 ** (-np.arange(HEAD // 2) / 2)
        ends = [c.op("Unsqueeze", x, c.ints(0)) for x in (at, end)]
        c.known += [c.op("Slice", c.const(f(np.tile(angle, 2))), *ends, c.ints(0)) for f in (np.cos, np.sin)]
    rows, cos, sin = c.known
    q, k = rope(c, OPTIONS, q, cos, sin), rope(c, OPTIONS, k, cos, sin)
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", FLOAT, "B", KV, ROOM, HEAD)
        index = c.op("Expand", c.op("Reshape", rows, c.ints(1, 1, -1, 1)), c.op("Shape", new))
        whole.append(c.out(c.op("ScatterElements", past, index, new, axis=2), f"new_{n}{i}"))
    return scores(c, q, whole, later(c, rows))


def static(kind: str) -> Attend:
    """Caches of fixed length, written at an input of row numbers [S] by `kind` (ScatterND or
    ScatterElements)."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if "rows" not in c.inputs:
            c.given("rows", INT, "S")
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, "B", KV, ROOM, HEAD)
            if kind == "ScatterND":
                first, back = [2, 0, 1, 3], [1, 2, 0, 3]
                index = c.op("Unsqueeze", "rows", c.ints(1))
                operands = [c.op("Transpose", x, perm=first) for x in (past, new)]
                made = c.op("Transpose", c.op("ScatterND", operands[0], index, operands[1]), perm=back)
            else:
                index = c.op("Expand", c.op("Reshape", "rows", c.ints(1, 1, -1, 1)), c.op("Shape", new))
                made = c.op("ScatterElements", past, index, new, axis=2)
            whole.append(c.out(made, f"new_{n}{i}"))
        return scores(c, q, whole, later(c, "rows"))

    return attend


def tensor_scatter(mode: str, fused: bool) -> Attend:
    """Opset 24: TensorScatter at write indices [B]; attention fused with lengths [B], or in primitives."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if "starts" not in c.inputs:
            c.given("starts", INT, "B")
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, "B", KV, "M", HEAD)
            whole.append(c.out(c.op("TensorScatter", past, new, "starts", axis=2, mode=mode), f"new_{n}{i}"))
        if fused:
            if "lengths" not in c.inputs:
                c.given("lengths", INT, "B")
            return c.op("Attention", q, *whole, "", "", "", "lengths", is_causal=1)
        zero, one = c.const(0, np.int64), c.const(1, np.int64)
        steps = c.op("Range", zero, count(c, "ids", 1), one)
        places = c.op("Add", c.op("Unsqueeze", "starts", c.ints(1)), steps)
        rows = c.op("Range", zero, count(c, "past_k0", 2), one)
        hidden = c.op("Greater", rows, c.op("Unsqueeze", places, c.ints(1, 3)))
        return scores(c, q, whole, hidden)

    return attend


def crossed(first: bool) -> Attend:
    """Self-attention with a cache and cross-attention to encoder keys and values [B, Hkv, E, D]: projected
    from `encoder` [B, E, W] and handed out (`first`), or given and passed on."""
    own = starting if first else growing("BHLD")

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if not i:
            padding = c.op("Cast", c.given("encoder_mask", INT, "B", "E"), to=TensorProto.BOOL)
            c.known = [c.op("Unsqueeze", c.op("Not", padding), c.ints(1, 2))]
            c.given("encoder", FLOAT, "B", "E", WIDTH)
        whole = []
        for n in "kv":
            weight = c.weight(WIDTH, KV * HEAD, gain=SHARP)
            given = c.given(f"cross_{n}{i}", FLOAT, "B", KV, "C", HEAD)
            made = split(c, c.op("MatMul", "encoder", weight), KV) if first else given
            whole.append(made)
            c.out(made, f"new_cross_{n}{i}")
        y = own(c, i, q, k, v)
        return c.op("Add", y, scores(c, q, whole, c.known[0]))

    return attend


def grouped(lengths: str = "mask", rows: str = "P") -> Attend:
    """GroupQueryAttention, its lengths computed from a mask [B, T] or inputs; caches of `rows` rows."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if not i:
            if lengths == "mask":
                mask = c.given("tokens", INT, "B", "T")
                last = c.op("Sub", c.op("ReduceSum", mask, c.ints(1), keepdims=0), c.ints(1))
                c.known = [c.op("Cast", last, to=TensorProto.INT32)]
                c.known += [c.op("Cast", count(c, "tokens", 1), to=TensorProto.INT32)]
            else:
                c.known = [c.given("last", TensorProto.INT32, "B"), c.given("total", TensorProto.INT32, 1)]
        past = [c.given(f"past_{n}{i}", FLOAT, "B", KV, rows, HEAD) for n in "kv"]
        operands = [*(flat(c, x) for x in (q, k, v)), *past, *c.known]
        y = c.ms("GroupQueryAttention", *operands, outputs=3, num_heads=HEADS, kv_num_heads=KV)[0]
        c.nodes[-1].output[1:] = [f"new_{n}{i}" for n in "kv"]
        c.outputs += [f"new_{n}{i}" for n in "kv"]
        return heads(c, y)

    return attend


def buffered(kind: str) -> Attend:
    """MultiHeadAttention (or its decoder form) with a buffer of fixed length, of which an input says how much
    is valid."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if not i:
            c.given("used", TensorProto.INT32, 1)
        past = [c.given(f"past_{n}{i}", FLOAT, "B", HEADS, "M", HEAD) for n in "kv"]
        operands = [flat(c, q), *(flat(c, repeat(c, x)) for x in (k, v))]
        if kind == "MultiHeadAttention":
            operands += ["", "", "", *past, "used"]
            attrs = {"unidirectional": 1}
        else:
            operands += ["", "", *past, "used"]
            attrs = {"past_present_share_buffer": 1}
        y, *made = c.ms(kind, *operands, outputs=3, num_heads=HEADS, **attrs)
        for n, value in zip("kv", made, strict=True):
            c.out(value, f"new_{n}{i}")
        return heads(c, y)

    return attend


def starting(c: Case, i: int, q: str, k: str, v: str) -> str:
    """No cache yet: its first rows are outputs."""
    whole = [c.out(new, f"new_{n}{i}") for n, new in (("k", k), ("v", v))]
    return scores(c, q, whole, future(c, whole[0]))


def merged(
    negated: bool = False, first: Attend = starting, then: Attend | None = None
) -> tuple[onnx.ModelProto, Case]:
    """A merged decoder: an If on `use_cache` [1] holds the graph that starts a cache and the one that grows
    it; both read the weights of the graph around them."""
    cases = [decoder(first), decoder(then or growing("BHLD"))]
    outer: dict[bytes, onnx.TensorProto] = {}
    branches = [_branch(case, f"b{i}_", outer) for i, case in enumerate(cases)]
    info = helper.make_tensor_value_info
    case = cases[1]
    case.given("use_cache", TensorProto.BOOL, 1)
    condition = "not_use_cache" if negated else "use_cache"
    taken, other = branches if negated else branches[::-1]
    nodes = [helper.make_node("Not", ["use_cache"], [condition])] if negated else []
    nodes.append(
        helper.make_node("If", [condition], case.outputs, "split", then_branch=taken, else_branch=other)
    )
    given = [info(n, t, s) for n, (t, s) in case.inputs.items()]
    made = [info(n, FLOAT, None) for n in case.outputs]
    graph = helper.make_graph(nodes, "merged", given, made, list(outer.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), case


def _branch(case: Case, tag: str, outer: dict[bytes, onnx.TensorProto]) -> onnx.GraphProto:
    """The graph of a case without inputs, its names tagged; float tensors go to `outer`, equal ones once."""
    names = {n: n for n in (*case.inputs, "")}
    own = []
    for tensor in case.tensors:
        if tensor.dims and tensor.data_type == FLOAT:
            key = tensor.SerializeToString()[-len(tensor.raw_data) :]
            if key not in outer:
                outer[key] = onnx.TensorProto()
                outer[key].CopyFrom(tensor)
                outer[key].name = f"w{len(outer)}"
            names[tensor.name] = outer[key].name
        else:
            own.append(tensor)
            names[tensor.name] = tensor.name = tag + tensor.name
    for node in case.nodes:
        node.name = tag + node.name if node.name else ""
        node.input[:] = [names.get(n, tag + n) for n in node.input]
        node.output[:] = [tag + n for n in node.output]
    order = ["logits", *sorted(o for o in case.outputs if o != "logits")]
    case.outputs = order
    outputs = [helper.make_tensor_value_info(tag + n, FLOAT, None) for n in order]
    return helper.make_graph(case.nodes, tag, [], outputs, own)
