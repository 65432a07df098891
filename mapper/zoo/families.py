"""From published fields to `Config`, one function per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mapper.errors import UsageError
from mapper.zoo.config import Config, Experts, Latent, Layer, Rope, raw

Fields = Mapping[str, Any]
Family = Callable[[str, Fields], Config]


def config(name: str) -> Config:
    """The configuration of a model of the zoo. Raises UsageError for an unknown name."""
    fields = raw(name)
    for prefix, family in _FAMILIES:
        if name.startswith(prefix):
            return family(name, fields)
    raise UsageError(f"model {name!r} is of no family that the zoo can make")


def _dim(f: Fields) -> int:
    return int(f.get("head_dim") or f["hidden_size"] // f["num_attention_heads"])


def _plain_rope(f: Fields, width: int | None = None) -> Rope:
    partial = float(f.get("partial_rotary_factor", 1.0))
    scaling = f.get("rope_scaling") or {}
    return Rope(float(f["rope_theta"]), width or int(_dim(f) * partial), scaling=scaling)


def _base(name: str, family: str, f: Fields, layer: Layer, **more: Any) -> Config:
    """What all families share; every layer like `layer`."""
    given: dict[str, Any] = {
        "name": name,
        "family": family,
        "hidden": f["hidden_size"],
        "heads": f["num_attention_heads"],
        "kv_heads": f["num_key_value_heads"],
        "head_dim": _dim(f),
        "vocab": f["vocab_size"],
        "context": f["max_position_embeddings"],
        "layers": (layer,) * f["num_hidden_layers"],
        "eps": float(f.get("rms_norm_eps", 1e-6)),
        "tied": bool(f.get("tie_word_embeddings", False)),
    }
    return Config(**{**given, **more})


def _llama(name: str, f: Fields) -> Config:
    layer = Layer(rope=_plain_rope(f), inner=f["intermediate_size"], window=f.get("sliding_window") or 0)
    return _base(name, "llama", f, layer, eps=float(f.get("rms_norm_eps", 1e-5)))


def _mixtral(name: str, f: Fields) -> Config:
    experts = Experts(
        f["num_local_experts"], f["num_experts_per_tok"], f["intermediate_size"], normalise=True
    )
    return _base(name, "mixtral", f, Layer(rope=_plain_rope(f), experts=experts))


def _qwen2(name: str, f: Fields) -> Config:
    return _base(name, "qwen2", f, Layer(rope=_plain_rope(f), inner=f["intermediate_size"]), qkv_bias=True)


def _qwen3(name: str, f: Fields) -> Config:
    layer = Layer(rope=_plain_rope(f), inner=f["intermediate_size"])
    if "num_experts" in f:
        chosen, inner = f["num_experts_per_tok"], f["moe_intermediate_size"]
        experts = Experts(f["num_experts"], chosen, inner, normalise=bool(f["norm_topk_prob"]))
        layer = Layer(rope=_plain_rope(f), experts=experts)
    return _base(name, "qwen3", f, layer, qk_norm="rms")


def _deepseek(name: str, f: Fields) -> Config:
    latent = Latent(
        f["q_lora_rank"], f["kv_lora_rank"], f["qk_nope_head_dim"], f["qk_rope_head_dim"], f["v_head_dim"]
    )
    rope = replace(_plain_rope(f, latent.rope), interleaved=True)
    experts = Experts(
        f["n_routed_experts"], f["num_experts_per_tok"], f["moe_intermediate_size"], "sigmoid",
        bool(f["norm_topk_prob"]), True, f["n_group"] if f["n_group"] > 1 else 0, f["topk_group"],
        float(f["routed_scaling_factor"]), f["n_shared_experts"] * f["moe_intermediate_size"],
    )  # fmt: skip
    dense = f["first_k_dense_replace"]
    layers = tuple(
        Layer(rope=rope, inner=f["intermediate_size"]) if i < dense else Layer(rope=rope, experts=experts)
        for i in range(f["num_hidden_layers"])
    )
    made = _base(name, "deepseek", f, layers[0], layers=layers, latent=latent)
    return replace(
        made, head_dim=latent.nope + latent.rope, note="latent rows are cached, not keys and values"
    )


def _gpt_oss(name: str, f: Fields) -> Config:
    experts = Experts(
        f["num_local_experts"], f["num_experts_per_tok"], f["intermediate_size"], "topk_softmax",
        biases=True, limit=float(f["swiglu_limit"]),
    )  # fmt: skip
    rope = _plain_rope(f)
    layers = tuple(
        Layer(window=f["sliding_window"] if i % 2 == 0 else 0, rope=rope, experts=experts)
        for i in range(f["num_hidden_layers"])
    )
    options = {"qkv_bias": True, "bias": True, "sinks": True, "act": "gelu_quick"}
    return _base(name, "gpt-oss", f, layers[0], layers=layers, **options)


def _llama4(name: str, f: Fields) -> Config:
    """Language model alone. Rotary pairs are interleaved; every fourth layer has none and sees everything."""
    rope = replace(_plain_rope(f), interleaved=True)
    inner, step = f["intermediate_size"], f["interleave_moe_layer_step"]
    experts = Experts(
        f["num_local_experts"], f["num_experts_per_tok"], inner, "sigmoid", shared=inner, share_input=True
    )
    layers = []
    for i in range(f["num_hidden_layers"]):
        local = (i + 1) % 4 != 0
        moe = (i + 1) % step == 0
        layers.append(
            Layer(
                chunk=f["attention_chunk_size"] if local else 0, rope=rope if local else None,
                tuned=not local,
                experts=experts if moe else None, inner=0 if moe else f["intermediate_size_mlp"],
            )
        )  # fmt: skip
    norm = "l2" if f.get("use_qk_norm") else "none"
    return _base(
        name, "llama4", f, layers[0], layers=tuple(layers), qk_norm=norm, note="language model alone"
    )


def _gpt(name: str, f: Fields) -> Config:
    fields = {**f, "num_key_value_heads": f.get("num_key_value_heads", f["num_attention_heads"])}
    act = "gelu_tanh" if f["hidden_act"] == "gelu_new" else f["hidden_act"]
    made = _base(name, "gpt", fields, Layer(inner=f["intermediate_size"]), eps=1e-5, act=act, gated=False)
    return replace(made, norm="layer", qkv_bias=True, bias=True, positions=f["max_position_embeddings"])


_QUERY_SCALES = {"gemma-2-27b": 144, "gemma-3-27b": 168}
"""query_pre_attn_scalar where it is not the head width (the models' config.json)."""


def _gemma(name: str, f: Fields) -> Config:
    third = name.startswith("gemma-3")
    whole = _plain_rope(f)
    if third and name != "gemma-3-1b":
        whole = replace(whole, scaling={"rope_type": "linear", "factor": 8.0})
    local = replace(whole, theta=float(f.get("rope_theta_local", f["rope_theta"])), scaling={})
    period = 6 if third else 2
    layers = tuple(
        Layer(rope=whole, inner=f["intermediate_size"]) if (i + 1) % period == 0
        else Layer(window=f["sliding_window"], rope=local, inner=f["intermediate_size"])
        for i in range(f["num_hidden_layers"])
    )  # fmt: skip
    options = {"act": "gelu_tanh", "norm": "rms1", "post_norms": True, "qk_norm": "rms1" if third else "none"}
    made = _base(name, "gemma3" if third else "gemma2", f, layers[0], layers=layers, **options)
    return replace(
        made, embedding_scale=float(f["hidden_size"]) ** 0.5, scale=_QUERY_SCALES.get(name, _dim(f)) ** -0.5,
        softcap=float(f.get("attn_logit_softcap", 0.0)), eps=1e-6,
        final_softcap=float(f.get("final_logit_softcap", 0.0)),
        note="language model alone" if third and name != "gemma-3-1b" else "",
    )  # fmt: skip


def _phi(name: str, f: Fields) -> Config:
    layer = Layer(f.get("sliding_window") or 0, rope=_plain_rope(f), inner=f["intermediate_size"])
    note = "long-context rope factors are not modelled" if name == "phi-4-mini" else ""
    return _base(name, "phi3", f, layer, packed=True, eps=1e-5, note=note)


_FAMILIES: tuple[tuple[str, Family], ...] = (
    ("llama-4", _llama4),
    ("llama-", _llama),
    ("mistral-", _llama),
    ("mixtral-", _mixtral),
    ("qwen2", _qwen2),
    ("qwen3", _qwen3),
    ("deepseek", _deepseek),
    ("kimi", _deepseek),
    ("gpt-oss", _gpt_oss),
    ("gpt", _gpt),
    ("gemma", _gemma),
    ("phi", _phi),
)


def shortened(made: Config, layers: int) -> Config:
    """The first `layers` layers. Raises UsageError where there are not so many."""
    if not 1 <= layers <= len(made.layers):
        raise UsageError(f"{made.name} has {len(made.layers)} layers; {layers} were asked for")
    return replace(made, layers=made.layers[:layers])


def shows_all(made: Config) -> int:
    """The fewest first layers that show every kind of layer."""
    kinds = {repr(layer) for layer in made.layers}
    shown = (n for n in range(1, len(made.layers) + 1) if {repr(x) for x in made.layers[:n]} == kinds)
    return next(shown)


def tiny(made: Config) -> Config:
    """The same structure at toy widths: runs anywhere, and shows all that the full model does."""
    heads = 4
    group = made.heads // made.kv_heads
    kv_heads = max(1, heads // min(group, heads))
    latent = replace(made.latent, query=24, rank=20, nope=12, rope=8, value=12) if made.latent else None
    head_dim = 20 if latent else 16
    layers = tuple(_tiny_layer(layer, 8 if latent else 0, made.head_dim) for layer in made.layers)
    return replace(
        made, hidden=48, heads=heads, kv_heads=heads if latent else kv_heads, head_dim=head_dim, vocab=96,
        context=64, layers=layers, latent=latent, positions=64 if made.positions else 0,
        embedding_scale=48.0**0.5 if made.embedding_scale != 1.0 else 1.0,
        scale=0.21 if made.scale else 0.0, tuning=(3.0, 0.5),
    )  # fmt: skip


def _tiny_layer(layer: Layer, rope_width: int, head_dim: int) -> Layer:
    rope, experts = layer.rope, layer.experts
    if rope is not None:
        width = rope_width or max(4, 16 * rope.width // head_dim // 2 * 2)
        scaling = dict(rope.scaling)
        if "original_max_position_embeddings" in scaling:
            scaling["original_max_position_embeddings"] = 32
        rope = replace(rope, width=width, scaling=scaling)
    if experts is not None:
        groups = min(experts.groups, 4)
        experts = replace(
            experts, count=8, chosen=min(experts.chosen, 3), inner=24, shared=24 if experts.shared else 0,
            groups=groups, top_groups=2 if groups else 0, limit=min(experts.limit, 1.0),
        )  # fmt: skip
    return replace(
        layer, window=min(layer.window, 5), chunk=min(layer.chunk, 4), rope=rope, experts=experts,
        inner=64 if layer.inner else 0,
    )  # fmt: skip
