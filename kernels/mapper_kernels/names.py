"""Names and numbers of the kernels' variants, importable without the compiler."""

from __future__ import annotations

ACTIVATIONS = {
    name: number
    for number, name in enumerate(
        ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "sigmoid", "tanh", "identity")
    )
}
"""Activation -> number."""

ELEMENTWISE = {
    name: number
    for number, name in enumerate(
        (
            "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "atan", "tanh",
            "erf",
            "sigmoid", "softplus", "relu", "floor", "ceil", "round", "sign", "not", "isnan", "isinf",
            "add", "sub",
            "mul", "div", "pow", "min", "max", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
            "mod", "fmod",
            "cast", "select",
        )
    )
}  # fmt: skip
"""Elementwise operation -> number."""

REDUCTIONS = ("sum", "mean", "max", "min", "prod", "sum_square", "l2", "l1", "log_sum_exp")
"""Reductions; the position is the number."""

COMBINATIONS = ("none", "add", "mul", "max", "min")
"""How a scatter combines what is there with an update; the position is the number."""

SCORINGS = ("softmax", "sigmoid", "topk_softmax", "none")
"""How router scores become shares; the position is the number."""

PACKINGS = ("none", "halves", "interleaved")
"""How the gate and up parts of an expert lie in memory; the position is the number."""

EPILOGUES = ("plain", "residual", "gate", "activation")
"""What follows the products of `fused.project`: nothing but the biases; y += residual; y = act(first) second;
y = act(first). The position is the number."""

NORMS = ("none", "rms", "layer")
"""What comes before them; the position is the number."""

PROJECT_HEAD = 10
"""Arguments of `fused.project` before those of its matrices: m, k, norm, whether it has a weight, and a bias,
epsilon, offset (float64 bits), epilogue, activation, number of matrices."""

PROJECT_EACH = 4
"""Arguments of a matrix of `fused.project`: n, format, whether it has zeros, and a bias."""

ATTEND_HEAD = 17
"""Arguments of `fused.attend_cached` before the slopes: batch, heads, D, key heads, L, Dv, window, has sinks,
number of slopes, scale, softcap (float64 bits), rotary width, whether interleaved, rows of the rotary
table, splits of the cache, its format's code, chunk (as window: 0 is none)."""
