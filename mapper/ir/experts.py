"""Routed experts: which experts each token goes to, and what the chosen ones compute.

N tokens of width D, E experts of inner width F, k of them chosen. Routing and experts are two ops, so that
experts whose routing is of no known kind still count as routed: only the chosen ones' weights are read.
"""

from __future__ import annotations

from xdsl.irdl import attr_def, irdl_op_definition, operand_def, opt_attr_def, result_def

from mapper.ir.op import BOOL, FLOAT, INT, WEIGHT, DataflowOp, TextKind
from mapper.ir.transformer import ACTIVATION
from mapper.ir.types import TensorType

SCORING = TextKind(("softmax", "sigmoid", "topk_softmax", "none"))
GROUP_SCORE = TextKind(("max", "top2"))
PACKING = TextKind(("none", "halves", "interleaved"))
_NO, _ZERO, _ONE = BOOL.encode(False), FLOAT.encode(0.0), FLOAT.encode(1.0)


@irdl_op_definition
class RouteOp(DataflowOp):
    """Chooses `top_k` experts per token from logits [..., E]: index [..., k] i64, and their share [..., k].

    Scores are the softmax over all experts, the sigmoid of each, the logits themselves (none), or
    (topk_softmax) the softmax over the chosen logits only. Experts are chosen by score + `correction` [E],
    which the shares leave out; best first, of equal ones the lower number. With `groups`, experts are split
    into that many equal runs and only the `top_groups` best runs stay eligible (a run counts as its best
    score, or the sum of its best two); the others' scores become `group_fill`. `normalise` divides the shares
    by their sum plus `epsilon`; then they are multiplied by `scale`. Source of the grouped form: DeepSeek-V3
    technical report, section 2.1.2."""

    name = "dataflow.route"
    logits = operand_def(TensorType)
    index = result_def(TensorType)
    share = result_def(TensorType)
    top_k = attr_def(INT)
    scoring = opt_attr_def(SCORING, SCORING.encode("softmax"))
    correction = opt_attr_def(WEIGHT)
    groups = opt_attr_def(INT, INT.encode(0))
    top_groups = opt_attr_def(INT, INT.encode(0))
    group_score = opt_attr_def(GROUP_SCORE, GROUP_SCORE.encode("max"))
    group_fill = opt_attr_def(FLOAT, _ZERO)
    normalise = opt_attr_def(BOOL, _NO)
    epsilon = opt_attr_def(FLOAT, _ZERO)
    scale = opt_attr_def(FLOAT, _ONE)


@irdl_op_definition
class MoeOp(DataflowOp):
    """The share-weighted sum of the chosen experts' outputs: x [..., D], index, share [..., k] -> [..., D].

    An expert is down(act(gate x) (up x + up_offset)), or down(act(up x)) without a gate; with biases. gate
    and up are [E, D, F], down [E, F, D], each with its last two axes exchanged where its `transposed` flag is
    set. `packing`: `up` holds gate and up in 2F columns, as two halves (gate first) or alternating (gate
    first), and there is no `gate`. `limit` > 0 clamps the gate from above and up from both sides.
    `share_input`: the share multiplies the expert's input, not its output.
    `round_block` > 0: the operand of each product is rounded first, as `round_blocks` does."""

    name = "dataflow.moe"
    x = operand_def(TensorType)
    index = operand_def(TensorType)
    share = operand_def(TensorType)
    y = result_def(TensorType)
    act = attr_def(ACTIVATION)
    gate = opt_attr_def(WEIGHT)
    up = attr_def(WEIGHT)
    down = attr_def(WEIGHT)
    gate_bias = opt_attr_def(WEIGHT)
    up_bias = opt_attr_def(WEIGHT)
    down_bias = opt_attr_def(WEIGHT)
    gate_transposed = opt_attr_def(BOOL, _NO)
    up_transposed = opt_attr_def(BOOL, _NO)
    down_transposed = opt_attr_def(BOOL, _NO)
    packing = opt_attr_def(PACKING, PACKING.encode("none"))
    limit = opt_attr_def(FLOAT, _ZERO)
    up_offset = opt_attr_def(FLOAT, _ZERO)
    share_input = opt_attr_def(BOOL, _NO)
    round_block = opt_attr_def(INT, INT.encode(0))
