"""Primitives that combine elements: matrix product, convolution, reductions, scans and sorting."""

from __future__ import annotations

from xdsl.irdl import (
    attr_def,
    irdl_op_definition,
    operand_def,
    opt_attr_def,
    opt_operand_def,
    result_def,
)

from mapper.ir.op import BOOL, INT, INTS, DataflowOp, TextKind
from mapper.ir.types import TensorType

REDUCE_KINDS = ("sum", "mean", "max", "min", "prod", "sum_square", "l2", "l1", "log_sum_exp")
_REDUCE = TextKind(REDUCE_KINDS)


@irdl_op_definition
class MatmulOp(DataflowOp):
    """NumPy's matmul: a [..., M, K] times b [..., K, N], leading dimensions broadcast, vectors allowed."""

    name = "dataflow.matmul"
    a = operand_def(TensorType)
    b = operand_def(TensorType)
    y = result_def(TensorType)


@irdl_op_definition
class ConvOp(DataflowOp):
    """Correlation of x [B, C, spatial...] with w [F, C/group, kernel...] plus bias [F]; 1 or 2 spatial
    dimensions.

    `pads` are begins, then ends."""

    name = "dataflow.conv"
    x = operand_def(TensorType)
    w = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    y = result_def(TensorType)
    strides = attr_def(INTS)
    pads = attr_def(INTS)
    dilations = attr_def(INTS)
    group = opt_attr_def(INT, INT.encode(1))


@irdl_op_definition
class ReduceOp(DataflowOp):
    """Reduction of x over `axes` (all of them where absent) by `kind`."""

    name = "dataflow.reduce"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    kind = attr_def(_REDUCE)
    axes = opt_attr_def(INTS)
    keepdims = opt_attr_def(BOOL, BOOL.encode(True))


@irdl_op_definition
class SoftmaxOp(DataflowOp):
    """exp(x) / sum(exp(x)) along `axis`, with the maximum subtracted first; its logarithm where `log`."""

    name = "dataflow.softmax"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    axis = opt_attr_def(INT, INT.encode(-1))
    log = opt_attr_def(BOOL, BOOL.encode(False))


@irdl_op_definition
class CumsumOp(DataflowOp):
    """Running sum along `axis`; `exclusive` leaves out the element itself, `reverse` runs from the end."""

    name = "dataflow.cumsum"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    axis = attr_def(INT)
    exclusive = opt_attr_def(BOOL, BOOL.encode(False))
    reverse = opt_attr_def(BOOL, BOOL.encode(False))


@irdl_op_definition
class ArgmaxOp(DataflowOp):
    """Index (i64) of the largest element along `axis`, the first one on a tie."""

    name = "dataflow.argmax"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    axis = opt_attr_def(INT, INT.encode(-1))
    keepdims = opt_attr_def(BOOL, BOOL.encode(False))


@irdl_op_definition
class TopkOp(DataflowOp):
    """The `k` largest (or smallest) along `axis` in order, and their indices (i64); ties go to the lower
    index."""

    name = "dataflow.topk"
    x = operand_def(TensorType)
    values = result_def(TensorType)
    indices = result_def(TensorType)
    k = attr_def(INT)
    axis = opt_attr_def(INT, INT.encode(-1))
    largest = opt_attr_def(BOOL, BOOL.encode(True))


@irdl_op_definition
class RoundBlocksOp(DataflowOp):
    """x with each run of `block` elements along the last axis (the last run may be shorter) rounded to whole
    multiples, at most 127 in size, of a 127th of its largest magnitude: what a product with 8-bit activations
    computes on. Source: onnxruntime's MatMulNBits, accuracy level 4."""

    name = "dataflow.round_blocks"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    block = attr_def(INT)
