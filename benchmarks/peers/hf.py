"""The weights as a Hugging Face folder: config.json, safetensors by layer, a tokenizer for form's sake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.shapes import Shape
from benchmarks.weights import EMBEDDING, Weights, folder, making


def model(shape: Shape) -> Path:
    """The folder; made if it is not there yet."""
    base = folder(shape) / "hf"
    if not base.is_dir():
        with making(base) as made:
            _write(shape, made)
    return base


def _write(shape: Shape, into: Path) -> None:
    from safetensors.numpy import save_file

    weights, shards = Weights.of(shape), dict[str, list[str]]()
    for name in [EMBEDDING, *(n for n, _, _ in shape.products()), *shape.vectors()]:
        layer = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(layer, []).append(name)
    where = {}
    for number, names in enumerate(shards.values()):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file({n: np.ascontiguousarray(weights(n)) for n in names}, into / file, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": where}
    (into / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (into / "config.json").write_text(json.dumps(config(shape), indent=1), encoding="utf-8")
    _tokenizer(shape, into)


def config(shape: Shape) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _tokenizer(shape: Shape, into: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"t{i}": i for i in range(shape.vocab)}
    Tokenizer(WordLevel(words, unk_token="t0")).save(str(into / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "t0",
        "bos_token": "t1",
        "eos_token": "t2",
    }
    (into / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
