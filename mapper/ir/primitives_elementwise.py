"""Elementwise primitives: one value in or two with NumPy broadcasting, one out."""

from __future__ import annotations

from typing import ClassVar

from xdsl.irdl import attr_def, irdl_op_definition, operand_def, opt_attr_def, result_def

from mapper.ir.op import BOOL, DTYPE, DataflowOp
from mapper.ir.types import TensorType


class UnaryOp(DataflowOp):
    """y = f(x), element by element, of x's type (bool for not, isnan, isinf)."""

    ELEMENTWISE: ClassVar[bool] = True
    x = operand_def(TensorType)
    y = result_def(TensorType)


class BinaryOp(DataflowOp):
    """y = f(a, b) with NumPy broadcasting; a and b share their element type."""

    ELEMENTWISE: ClassVar[bool] = True
    a = operand_def(TensorType)
    b = operand_def(TensorType)
    y = result_def(TensorType)


class CompareOp(BinaryOp):
    """A binary op whose result is bool."""


@irdl_op_definition
class NegOp(UnaryOp):
    """-x."""

    name = "dataflow.neg"


@irdl_op_definition
class AbsOp(UnaryOp):
    """|x|."""

    name = "dataflow.abs"


@irdl_op_definition
class ExpOp(UnaryOp):
    """e to the x."""

    name = "dataflow.exp"


@irdl_op_definition
class LogOp(UnaryOp):
    """Natural logarithm."""

    name = "dataflow.log"


@irdl_op_definition
class SqrtOp(UnaryOp):
    """Square root."""

    name = "dataflow.sqrt"


@irdl_op_definition
class RsqrtOp(UnaryOp):
    """1 / sqrt(x)."""

    name = "dataflow.rsqrt"


@irdl_op_definition
class ReciprocalOp(UnaryOp):
    """1 / x."""

    name = "dataflow.reciprocal"


@irdl_op_definition
class SinOp(UnaryOp):
    """Sine."""

    name = "dataflow.sin"


@irdl_op_definition
class CosOp(UnaryOp):
    """Cosine."""

    name = "dataflow.cos"


@irdl_op_definition
class TanOp(UnaryOp):
    """Tangent."""

    name = "dataflow.tan"


@irdl_op_definition
class AtanOp(UnaryOp):
    """Arc tangent."""

    name = "dataflow.atan"


@irdl_op_definition
class TanhOp(UnaryOp):
    """Hyperbolic tangent."""

    name = "dataflow.tanh"


@irdl_op_definition
class ErfOp(UnaryOp):
    """Error function."""

    name = "dataflow.erf"


@irdl_op_definition
class SigmoidOp(UnaryOp):
    """1 / (1 + exp(-x))."""

    name = "dataflow.sigmoid"


@irdl_op_definition
class SoftplusOp(UnaryOp):
    """Log(1 + exp(x))."""

    name = "dataflow.softplus"


@irdl_op_definition
class ReluOp(UnaryOp):
    """Max(x, 0)."""

    name = "dataflow.relu"


@irdl_op_definition
class FloorOp(UnaryOp):
    """Round down."""

    name = "dataflow.floor"


@irdl_op_definition
class CeilOp(UnaryOp):
    """Round up."""

    name = "dataflow.ceil"


@irdl_op_definition
class RoundOp(UnaryOp):
    """Round half to even."""

    name = "dataflow.round"


@irdl_op_definition
class SignOp(UnaryOp):
    """-1, 0 or 1."""

    name = "dataflow.sign"


@irdl_op_definition
class NotOp(UnaryOp):
    """Logical not."""

    name = "dataflow.not"


@irdl_op_definition
class IsNaNOp(UnaryOp):
    """Whether x is NaN."""

    name = "dataflow.isnan"


@irdl_op_definition
class IsInfOp(UnaryOp):
    """Whether x is infinite."""

    name = "dataflow.isinf"


@irdl_op_definition
class AddOp(BinaryOp):
    """a + b."""

    name = "dataflow.add"


@irdl_op_definition
class SubOp(BinaryOp):
    """a - b."""

    name = "dataflow.sub"


@irdl_op_definition
class MulOp(BinaryOp):
    """a * b."""

    name = "dataflow.mul"


@irdl_op_definition
class DivOp(BinaryOp):
    """a / b; integers truncate towards zero."""

    name = "dataflow.div"


@irdl_op_definition
class PowOp(BinaryOp):
    """a to the b, of a's type; b may have another type."""

    name = "dataflow.pow"


@irdl_op_definition
class MinOp(BinaryOp):
    """The smaller."""

    name = "dataflow.min"


@irdl_op_definition
class MaxOp(BinaryOp):
    """The larger."""

    name = "dataflow.max"


@irdl_op_definition
class AndOp(BinaryOp):
    """Logical or bitwise and."""

    name = "dataflow.and"


@irdl_op_definition
class OrOp(BinaryOp):
    """Logical or bitwise or."""

    name = "dataflow.or"


@irdl_op_definition
class XorOp(BinaryOp):
    """Logical or bitwise exclusive or."""

    name = "dataflow.xor"


@irdl_op_definition
class EqOp(CompareOp):
    """a == b."""

    name = "dataflow.eq"


@irdl_op_definition
class NeOp(CompareOp):
    """a != b."""

    name = "dataflow.ne"


@irdl_op_definition
class LtOp(CompareOp):
    """a < b."""

    name = "dataflow.lt"


@irdl_op_definition
class LeOp(CompareOp):
    """a <= b."""

    name = "dataflow.le"


@irdl_op_definition
class GtOp(CompareOp):
    """a > b."""

    name = "dataflow.gt"


@irdl_op_definition
class GeOp(CompareOp):
    """a >= b."""

    name = "dataflow.ge"


@irdl_op_definition
class ModOp(BinaryOp):
    """Remainder with the divisor's sign (`fmod` false), or with the dividend's (`fmod` true, as C does)."""

    name = "dataflow.mod"
    fmod = opt_attr_def(BOOL, BOOL.encode(False))


@irdl_op_definition
class CastOp(DataflowOp):
    """x in element type `dtype`; float to integer truncates, anything to bool is != 0."""

    name = "dataflow.cast"
    ELEMENTWISE: ClassVar[bool] = True
    x = operand_def(TensorType)
    y = result_def(TensorType)
    dtype = attr_def(DTYPE)


@irdl_op_definition
class SelectOp(DataflowOp):
    """a where `condition` (bool) else b, with broadcasting over all three."""

    name = "dataflow.select"
    ELEMENTWISE: ClassVar[bool] = True
    condition = operand_def(TensorType)
    a = operand_def(TensorType)
    b = operand_def(TensorType)
    y = result_def(TensorType)
