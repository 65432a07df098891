"""Dimensions: normal form, arithmetic against Python integers, exact print and parse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapper.errors import ModelError
from mapper.ir.dims import Dim

NAMES = ("batch", "past", "s17", "odd name", "max", "x'y\\z", "?0")
Evaluator = Callable[[dict[str, int]], int]


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[Dim, Evaluator]:
    """A Dim, and the same expression over plain integers, built without any Dim code."""
    if depth == 0 or draw(st.booleans()):
        if draw(st.booleans()):
            number = draw(st.integers(-9, 9))
            return Dim.of(number), lambda env: number
        name = draw(st.sampled_from(NAMES))
        return Dim.symbol(name), lambda env: env[name]
    (a, fa), (b, fb) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    kind = draw(st.sampled_from(["+", "-", "*", "max", "min", "//", "%"]))
    divisor = draw(st.integers(1, 6))
    table: dict[str, tuple[Dim, Evaluator]] = {
        "+": (a + b, lambda env: fa(env) + fb(env)),
        "-": (a - b, lambda env: fa(env) - fb(env)),
        "*": (a * b, lambda env: fa(env) * fb(env)),
        "max": (Dim.max(a, b), lambda env: max(fa(env), fb(env))),
        "min": (Dim.min(a, b), lambda env: min(fa(env), fb(env))),
        "//": (a // divisor, lambda env: fa(env) // divisor),
        "%": (a % divisor, lambda env: fa(env) % divisor),
    }
    return table[kind]


values = st.fixed_dictionaries({name: st.integers(0, 40) for name in NAMES})


@settings(max_examples=200, deadline=None)
@given(expressions(), values)
def test_arithmetic_is_that_of_integers(pair: tuple[Dim, Evaluator], env: dict[str, int]) -> None:
    dim, plain = pair
    assert dim.evaluate(env) == plain(env)
    assert dim.substitute(env) == Dim.of(plain(env))


@settings(max_examples=200, deadline=None)
@given(expressions())
def test_print_parse_round_trip_is_exact(pair: tuple[Dim, Evaluator]) -> None:
    dim, _ = pair
    assert Dim.parse(str(dim)) == dim
    assert str(Dim.parse(str(dim))) == str(dim)


def test_equal_polynomials_are_equal() -> None:
    a, b = Dim.symbol("a"), Dim.symbol("b")
    assert (a + b) * (a - b) == a * a - b * b
    assert (2 * a + 6) // 2 == a + 3
    assert (6 * a + 7) % 3 == Dim.of(1)
    assert a * b * 64 // (a * b) == Dim.of(64)
    assert Dim.max(a, 3, Dim.max(b, 5)) == Dim.max(b, 5, a)
    assert a - a == Dim.of(0)


@pytest.mark.parametrize(
    "text", ["", "a b", "2.5", "f(x)", "a +", "(" * 300 + ")" * 300, "True", "1 // 0", "a if b else c"]
)
def test_text_that_is_no_expression_is_refused_or_opaque(text: str) -> None:
    with pytest.raises(ModelError):
        Dim.parse(text)
    assert Dim.of(text) == Dim.symbol(text)


def test_missing_symbols_and_symbolic_values_are_errors() -> None:
    with pytest.raises(ModelError, match="no value for dimension 'past'"):
        Dim.of("past + 1").evaluate({})
    with pytest.raises(ModelError, match="symbolic"):
        _ = Dim.of("past + 1").value
    with pytest.raises(ModelError, match="zero"):
        Dim.of("8 // past").evaluate({"past": 0})
