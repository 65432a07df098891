"""Mutation operators of the lpu target: each breaks one rule of ISA.md, or changes what is computed.

All random choices come from `rng`. An operator returns None where the schedule has nothing that it could
break.
"""

from __future__ import annotations

from mapper.schedule.mutate import Mutation
from mapper_lpu import isa
from mapper_lpu import mutate_args as change
from mapper_lpu.mutate_base import OnOpcodes
from mapper_lpu.mutate_steps import Duplicate, PermuteEntry, SwapSteps, load_pair, plane_pair

_MEM = ("mem.read", "mem.write", "mem.gather", "mem.scatter")
_VXM = (*isa.BINARY_OPS, *isa.UNARY_OPS, "vxm.cast")
_STREAMS = tuple(name for name in isa.OPCODES if name != "mxm.install")
_DIRECTED = (*_MEM, *_VXM, "sxm.permute")

MUTATIONS: tuple[Mutation, ...] = (
    OnOpcodes("shift_stream_cycle", _STREAMS, change.shift),
    OnOpcodes("stream_number", _STREAMS, change.stream),
    OnOpcodes("stream_direction", _DIRECTED, change.direction),
    OnOpcodes("other_alu", _VXM, change.alu),
    OnOpcodes("swap_sub_operands", ("vxm.sub",), change.swap_operands),
    OnOpcodes("vxm_opcode", tuple(change.INSTEAD), change.opcode),
    OnOpcodes("wrong_row", _MEM, change.row_of_buffer),
    OnOpcodes("wrong_buffer", _MEM, change.buffer_of_slice),
    OnOpcodes("drop_instruction", isa.OPCODES, change.drop),
    OnOpcodes("drop_install", ("mxm.install",), change.drop),
    OnOpcodes("load_group", ("mxm.load",), change.load_group),
    OnOpcodes("index_stream", ("mem.gather", "mem.scatter"), change.index_stream),
    OnOpcodes("immediate", _VXM, change.immediate),
    OnOpcodes("type_code", ("vxm.cast", "mxm.activate"), change.type_code),
    SwapSteps("swap_load_groups", ("mxm.load",), load_pair),
    SwapSteps("swap_byte_planes", _MEM, plane_pair),
    Duplicate(),
    PermuteEntry(),
)
"""The operators of this target, beside the shared ones."""
