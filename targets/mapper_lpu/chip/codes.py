"""Numbers that the compiled loop understands: operations, columns of the instruction matrix, faults."""

from __future__ import annotations

LANES = 320
STREAMS = 32
PLANES = 4  # MXM planes: east 0, east 1, west 0, west 1
ALUS = 16

I8, I16, I32, F16, F32 = range(5)
IMMEDIATE, OUTER, INNER, ACC = range(4)

OPERATIONS = {
    name: number
    for number, name in enumerate(
        (
            "mem.read",
            "mem.write",
            "mem.gather",
            "mem.scatter",
            "vxm.add",
            "vxm.sub",
            "vxm.mul",
            "vxm.max",
            "vxm.min",
            "vxm.iadd",
            "vxm.neg",
            "vxm.copy",
            "vxm.relu",
            "vxm.exp2",
            "vxm.rsqrt",
            "vxm.tanh",
            "vxm.cast",
            "mxm.load",
            "mxm.install",
            "mxm.activate",
            "mxm.emit",
            "sxm.permute",
        )
    )
}
"""The executor's own number of each opcode, whatever the schedule's table of opcodes says."""

(READ, WRITE, GATHER, SCATTER) = range(4)
(ADD, SUB, MUL, MAX, MIN, IADD, NEG, COPY, RELU, EXP2, RSQRT, TANH, CAST) = range(4, 17)
(LOAD, INSTALL, ACTIVATE, EMIT, PERMUTE) = range(17, 22)

# Columns of the instruction matrix.
CYCLE = 0
UNIT = 1  # row of isa.UNITS
OPERATION = 2
X = 3  # position
LOCAL = 4  # number of the ALU or MXM plane
ARGS = 5  # ten columns; the VXM's are always: A(3), B(3) (kind -1: none), out(2), from, to
MEMORY = 15
ADDRESS = 16
ROWS = 17
OUT_DIRECTION = 18
OUT_STREAM = 19
OUT_WIDTH = 20  # streams produced; 0: none
OUT_CYCLE = 21
OUT_ROW = 22  # first row of the pool that holds what is produced
COLUMNS = 23

FAULTS = (
    "",
    "the queue is taken by an earlier instruction",
    "two producers on one stream register in one cycle",
    "no valid vector on a stream it consumes",
    "reads bytes that nothing has written",
    "its address is outside the memory",
    "an index is outside the table",
    "its inner operand was not produced by an ALU in this cycle",
    "its inner operand comes from an ALU against the direction of the stream",
    "its output register holds no result yet",
    "its output register holds a result of another width",
    "installs a load buffer of which a row was never loaded",
    "no weights are installed",
    "the other plane of the fp16 pair is not activated likewise in this cycle",
    "no activation was accepted at the cycle whose result it emits",
)
(
    OK,
    TAKEN,
    COLLISION,
    NO_VECTOR,
    UNWRITTEN,
    OUTSIDE,
    BAD_INDEX,
    NOT_INNER,
    AGAINST,
    NO_RESULT,
    OTHER_WIDTH,
    NOT_LOADED,
    NO_WEIGHTS,
    NO_PAIR,
    NO_ACTIVATION,
) = range(15)
