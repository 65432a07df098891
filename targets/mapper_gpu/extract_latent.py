"""Latent attention as nodes, in its absorbed form (DeepSeek-V2 technical report, section 2.1): keys and
values of the heads are never made. With the up-projection of head h cut into its key half K_h [nope, rank]
and its value half V_h [value, rank],

    score = (K_h^T q_nope) . latent + q_rope . rope_key        out = V_h (sum of latent by their shares)

so that queries pass through K_h^T, all heads attend to the same cached rows, and what comes out passes
through V_h. K_h^T has columns of a low-bit weight as rows, so that the matrices are held dequantised."""

from __future__ import annotations

from mapper.ir.cost import attended_pairs
from mapper.ir.op import DataflowOp
from mapper_gpu.extractor import Extractor, View, rule
from mapper_gpu.hardware import COMPUTE, element_bytes
from mapper_gpu.nodes import Matrix, Pick


@rule("cached_latent_attention")
def _latent(c: Extractor, op: DataflowOp) -> None:
    q = c.view(op.operands[0], "joined")
    nope, rotated = (v for v in q.data) if len(q.data) == 2 else (None, None)
    latent, key = (c.view(op.operands[i], "state") for i in (1, 2))
    b, heads, s, wide = op.operand_shape(0)
    length, rank = op.operand_shape(1)[2:]
    rope, value, plain = op.operand_shape(2)[3], op.result_shape()[3], op.attr("nope_dim")
    if nope is None or rotated is None or c.values[nope.name].width != heads * plain:
        c.fail(f"queries of {wide} columns that are not {plain} and {rope} columns side by side")
    turned, symbol = not op.attr("transposed"), op.attr("weight")
    before, through = c.rows[c.row]["weight_bytes"], plain + value
    keys = Matrix(symbol, heads * rank, plain, c.form, turned=turned, flipped=rank,
                  pick=Pick(through, tuple(range(plain))))  # fmt: skip
    values = Matrix(symbol, heads * value, rank, c.form, turned=turned,
                    pick=Pick(through, tuple(range(plain, through))))  # fmt: skip
    past = length - s if c.phase == "decode" else 0
    pairs = attended_pairs(op).value if past else sum(min(i + 1, op.attr("window") or s) for i in range(s))
    elements = rank * heads * through
    c.rows[c.row]["weight_bytes"] = before + int(elements * element_bytes(c.form))
    c.rows[c.row]["flops"] = 2 * b * (heads * pairs * (2 * rank + rope) + s * elements)
    absorbed = c.add(
        "linear", [nope.name], c.fresh(heads * rank, rank), [keys], name="absorb_key", heads=heads
    )
    made = c.add(
        "attention", [absorbed, rotated.name, f"{latent.name}@", f"{key.name}@"],
        c.fresh(heads * rank, rank), batch=b, heads=heads, kv_heads=1, dim=rank + rope, value_dim=rank,
        all_heads=1, tokens=s, past=past, length=length, pairs=pairs, element=element_bytes(c.form),
        engine=COMPUTE[c.form], window=op.attr("window"), scale=op.attr("scale"), softcap=op.attr("softcap"),
        sinks=None, slopes=None, caches=(latent.name, key.name), shared=True, latent=rank,
        name="latent_attention",
    )  # fmt: skip
    out = c.add("linear", [made], c.fresh(heads * value, value), [values], name="absorb_value", heads=heads)
    c.views[op.results[0]] = View(out, "turned")
