"""In which format the weights of products are held: as they are stored, where the kernels read that, else
float32."""

from __future__ import annotations

from mapper.ir.graph import Graph
from mapper.ir.weights import Packing, WeightSymbol
from mapper_kernels.formats import BLOCK, FORMATS, Format

_PLAIN = ("f16", "bf16")


def native(symbol: WeightSymbol, transposed: bool) -> Format:
    """The format of a matrix of a serving program; `transposed` says that it is [N, K], or a
    stack [E, N, K] of them."""
    if symbol.packing is not None:
        name = _packed(symbol.packing) if transposed and len(symbol.shape) in (2, 3) else None
        return FORMATS[name or "f32"]
    return FORMATS[symbol.dtype if symbol.dtype in _PLAIN else "f32"]


def _packed(packing: Packing) -> str | None:
    scheme, scales, zeros = packing.scheme, packing.scales.dtype, packing.zeros
    if scheme.layout != "rows" or packing.order is not None or (zeros is not None and zeros.dtype != "u8"):
        return None
    key = (scheme.kind, scheme.bits, scheme.block, scales)
    found = {
        ("int", 8, BLOCK, "f16"): "int8",
        ("int", 8, BLOCK, "f32"): "int8f",
        ("int", 8, 0, "f32"): "int8row",
        ("int", 4, BLOCK, "f16"): "int4",
        ("int", 4, BLOCK, "f32"): "int4f",
        ("e4m3", 8, 0, "f32"): "f8e4m3",
        ("e2m1", 4, BLOCK, "u8"): "mxfp4",
    }.get(key)
    return None if found is None or (zeros is not None and not FORMATS[found].zeros) else found


def row_bytes(symbol: WeightSymbol, transposed: bool) -> int:
    """Bytes of such a matrix, or of one of a stack, scales and zero points included."""
    n, k = symbol.shape[-2:] if transposed else symbol.shape[:-3:-1]
    held = native(symbol, transposed)
    given = symbol.packing is not None and symbol.packing.zeros is not None
    return n * (held.value_bytes(k) + held.scale_bytes(k) + (held.zero_bytes(k) if given else 0))


def is_serving(graph: Graph) -> bool:
    """Whether a graph runs once per token: its products' weights are held as `native` says, all others'
    in float32."""
    return bool(graph.inputs_with_role("past_length"))
