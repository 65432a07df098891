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
