"""Primitives that move elements without computing: views, slices, gathers, and what makes or reads shapes.

Where a parameter may be data (the target shape of a reshape, the bounds of a slice), it is an attribute
when it is known and an optional operand otherwise; never both.
"""

from __future__ import annotations

from xdsl.irdl import (
    AttrSizedOperandSegments,
    attr_def,
    irdl_op_definition,
    operand_def,
    opt_attr_def,
    opt_operand_def,
    result_def,
    var_operand_def,
    var_result_def,
)

from mapper.ir.op import BOOL, BYTES, DIMS, DTYPE, FLOAT, INT, INTS, WEIGHT, DataflowOp, TextKind
from mapper.ir.types import TensorType


@irdl_op_definition
class ConstantOp(DataflowOp):
    """A small tensor held in the text: raw little-endian bytes in C order, of the result's type."""

    name = "dataflow.constant"
    y = result_def(TensorType)
    value = attr_def(BYTES)


@irdl_op_definition
class LoadOp(DataflowOp):
    """The whole tensor of weight symbol `weight` as a value, for primitives."""

    name = "dataflow.load"
    y = result_def(TensorType)
    weight = attr_def(WEIGHT)


@irdl_op_definition
class ReshapeOp(DataflowOp):
    """x with the same elements in another shape: `dims` (one may be -1), or operand `shape` (i64, one may be
    -1; 0 copies x's dimension unless `allowzero`)."""

    name = "dataflow.reshape"
    x = operand_def(TensorType)
    shape = opt_operand_def(TensorType)
    y = result_def(TensorType)
    dims = opt_attr_def(DIMS)
    allowzero = opt_attr_def(BOOL, BOOL.encode(False))


@irdl_op_definition
class SqueezeOp(DataflowOp):
    """x without the dimensions `axes`, which are 1."""

    name = "dataflow.squeeze"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    axes = attr_def(INTS)


@irdl_op_definition
class UnsqueezeOp(DataflowOp):
    """x with dimensions of 1 inserted, at `axes` of the result."""

    name = "dataflow.unsqueeze"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    axes = attr_def(INTS)


@irdl_op_definition
class TransposeOp(DataflowOp):
    """Dimension i of the result is dimension perm[i] of x."""

    name = "dataflow.transpose"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    perm = attr_def(INTS)


@irdl_op_definition
class ExpandOp(DataflowOp):
    """x broadcast against shape `dims` or operand `shape` (both ways, as ONNX Expand)."""

    name = "dataflow.expand"
    x = operand_def(TensorType)
    shape = opt_operand_def(TensorType)
    y = result_def(TensorType)
    dims = opt_attr_def(DIMS)


@irdl_op_definition
class ConcatOp(DataflowOp):
    """The operands joined along `axis`."""

    name = "dataflow.concat"
    parts = var_operand_def(TensorType)
    y = result_def(TensorType)
    axis = attr_def(INT)


@irdl_op_definition
class SplitOp(DataflowOp):
    """x cut along `axis` into pieces of `sizes`, one result each."""

    name = "dataflow.split"
    x = operand_def(TensorType)
    parts = var_result_def(TensorType)
    axis = attr_def(INT)
    sizes = attr_def(INTS)


@irdl_op_definition
class SliceOp(DataflowOp):
    """x[starts:ends:steps] along `axes`, with Python's clamping. `starts` and `ends` are attributes (Dim
    each) or i64 operands `begin` and `end`. `steps` defaults to ones."""

    name = "dataflow.slice"
    x = operand_def(TensorType)
    begin = opt_operand_def(TensorType)
    end = opt_operand_def(TensorType)
    y = result_def(TensorType)
    axes = attr_def(INTS)
    starts = opt_attr_def(DIMS)
    ends = opt_attr_def(DIMS)
    steps = opt_attr_def(INTS)
    irdl_options = (AttrSizedOperandSegments(as_property=False),)


@irdl_op_definition
class GatherOp(DataflowOp):
    """x taken along `axis` at `indices` (negative ones count from the end); index dimensions replace the
    axis."""

    name = "dataflow.gather"
    x = operand_def(TensorType)
    indices = operand_def(TensorType)
    y = result_def(TensorType)
    axis = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class GatherElementsOp(DataflowOp):
    """y[i,j,..] = x[.., indices[i,j,..] at `axis`, ..]; of the indices' shape."""

    name = "dataflow.gather_elements"
    x = operand_def(TensorType)
    indices = operand_def(TensorType)
    y = result_def(TensorType)
    axis = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class GatherNdOp(DataflowOp):
    """x at index vectors: the last dimension of `indices` indexes x's dimensions after `batch_dims`."""

    name = "dataflow.gather_nd"
    x = operand_def(TensorType)
    indices = operand_def(TensorType)
    y = result_def(TensorType)
    batch_dims = opt_attr_def(INT, INT.encode(0))


REDUCTION = TextKind(("none", "add", "mul", "max", "min"))


@irdl_op_definition
class ScatterNdOp(DataflowOp):
    """x with `updates` written (or combined by `reduction`) at the index vectors in `indices`."""

    name = "dataflow.scatter_nd"
    x = operand_def(TensorType)
    indices = operand_def(TensorType)
    updates = operand_def(TensorType)
    y = result_def(TensorType)
    reduction = opt_attr_def(REDUCTION, REDUCTION.encode("none"))


@irdl_op_definition
class ScatterElementsOp(DataflowOp):
    """x with x[.., indices[i,j,..] at `axis`, ..] replaced by (or combined with) updates[i,j,..]."""

    name = "dataflow.scatter_elements"
    x = operand_def(TensorType)
    indices = operand_def(TensorType)
    updates = operand_def(TensorType)
    y = result_def(TensorType)
    axis = opt_attr_def(INT, INT.encode(0))
    reduction = opt_attr_def(REDUCTION, REDUCTION.encode("none"))


@irdl_op_definition
class PadOp(DataflowOp):
    """x with `pads` (all begins, then all ends; negative crops) of the constant `value`."""

    name = "dataflow.pad"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    pads = attr_def(INTS)
    value = opt_attr_def(FLOAT, FLOAT.encode(0.0))


@irdl_op_definition
class TileOp(DataflowOp):
    """x repeated `repeats` times per dimension (attribute, or i64 operand `times`)."""

    name = "dataflow.tile"
    x = operand_def(TensorType)
    times = opt_operand_def(TensorType)
    y = result_def(TensorType)
    repeats = opt_attr_def(DIMS)


@irdl_op_definition
class RangeOp(DataflowOp):
    """start, start + delta, ... below `limit`; three scalars."""

    name = "dataflow.range"
    start = operand_def(TensorType)
    limit = operand_def(TensorType)
    delta = operand_def(TensorType)
    y = result_def(TensorType)


@irdl_op_definition
class ShapeOfOp(DataflowOp):
    """Dimensions start..end of x's shape as an i64 vector; negative bounds count from the end, `end` absent:
    all."""

    name = "dataflow.shape_of"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    start = opt_attr_def(INT, INT.encode(0))
    end = opt_attr_def(INT)


@irdl_op_definition
class FillOp(DataflowOp):
    """A tensor full of `value`, of shape `dims` or operand `shape`."""

    name = "dataflow.fill"
    shape = opt_operand_def(TensorType)
    y = result_def(TensorType)
    dims = opt_attr_def(DIMS)
    value = opt_attr_def(FLOAT, FLOAT.encode(0.0))
    dtype = attr_def(DTYPE)


@irdl_op_definition
class TriluOp(DataflowOp):
    """The upper (or lower) triangle of the last two dimensions from diagonal `k` on, zero elsewhere."""

    name = "dataflow.trilu"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    upper = opt_attr_def(BOOL, BOOL.encode(True))
    k = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class OneHotOp(DataflowOp):
    """1 at each index along a new last dimension of size `depth`, 0 elsewhere, in element type `dtype`."""

    name = "dataflow.one_hot"
    indices = operand_def(TensorType)
    y = result_def(TensorType)
    depth = attr_def(INT)
    dtype = attr_def(DTYPE)


@irdl_op_definition
class NonzeroOp(DataflowOp):
    """Indices of the elements that are not zero, i64 [rank, count]; the count is known only from the data."""

    name = "dataflow.nonzero"
    x = operand_def(TensorType)
    y = result_def(TensorType)
