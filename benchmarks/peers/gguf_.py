"""The weights as GGUF files: every matrix in one format, norms in float32, no vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import Shape
from benchmarks.weights import EMBEDDING, F32, Weights, folder, making

TYPES = {"f32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {EMBEDDING: "token_embd", "lm_head.weight": "output", "model.norm.weight": "output_norm"}


def model(shape: Shape, weights: str) -> Path:
    """The file in a format of TYPES; made if it is not there yet."""
    base = folder(shape) / f"gguf-{weights}"
    if not base.is_dir():
        with making(base) as made:
            _write(shape, TYPES[weights], made / "model.gguf")
    return base / "model.gguf"


def gguf_name(name: str) -> str:
    """The name of a weight in GGUF files."""
    if name in OUTER:
        return f"{OUTER[name]}.weight"
    _, _, layer, *rest, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.weight"


def turned(shape: Shape, name: str, array: F32, back: bool = False) -> F32:
    """Rows of queries and keys from halves to the adjacent pairs that llama.cpp rotates, or `back`."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    half = shape.head_dim // 2
    parts = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return np.ascontiguousarray(array.reshape(parts).swapaxes(1, 2)).reshape(array.shape)


def _arrays(shape: Shape) -> Iterator[tuple[str, bool]]:
    yield EMBEDDING, True
    for name, _, _ in shape.products():
        yield name, True
    for name in shape.vectors():
        yield name, False


def _write(shape: Shape, kind: str, file: Path) -> None:
    import gguf

    weights, writer = Weights.of(shape), gguf.GGUFWriter(file, "llama")
    _describe(shape, writer)
    packed, plain = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    for name, matrix in _arrays(shape):
        form, array = packed if matrix else plain, weights(name)
        block, size = gguf.GGML_QUANT_SIZES[form]
        rows = (*array.shape[:-1], array.shape[-1] // block * size)
        raw = np.dtype(np.float32) if form == plain else np.dtype(np.uint8)
        dims = array.shape if form == plain else rows
        writer.add_tensor_info(
            gguf_name(name), dims, raw, int(np.prod(rows)), None if form == plain else form
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, matrix in _arrays(shape):
        array = turned(shape, name, np.ascontiguousarray(weights(name)))
        writer.write_tensor_data(gguf.quants.quantize(array, packed if matrix else plain))
    writer.close()


def _describe(shape: Shape, writer: Any) -> None:
    writer.add_name(shape.name)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")


def stored(shape: Shape, weights: str) -> Any:
    """The weights as the file has them, dequantised: a benchmarks.weights.Matrix."""
    import gguf

    found = {t.name: t for t in gguf.GGUFReader(model(shape, weights)).tensors}

    def weight(name: str) -> F32:
        tensor = found[gguf_name(name)]
        array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        return turned(shape, name, array, back=True)

    return weight
