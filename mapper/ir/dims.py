"""Symbolic tensor dimensions: integer polynomials over named symbols, with `//`, `%`, `max` and `min`.

A `Dim` is kept in a normal form (sum of sorted monomials with integer coefficients), so that equal
polynomials are equal objects. Symbols stand for integers >= 0. Text form is a Python expression:
`2*batch*sequence - 1`, `(past + 7)//8`, `max(a, b)`; a symbol that is no plain identifier is quoted:
`'batch size' + 1`.
"""

from __future__ import annotations

import ast
import keyword
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from mapper.errors import ModelError

_LONGEST_TEXT = 4096
_MOST_PRODUCTS = 4096
_MOST_ATOMS = 256  # inside // % max min, where nesting doubles them
_FUNCTIONS: dict[str, Callable[[int, int], int]] = {
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "max": max,
    "min": min,
}


@dataclass(frozen=True)
class Call:
    """A non-polynomial atom: `fn` is one of `//`, `%` (two arguments), `max`, `min` (two or more, sorted)."""

    fn: str
    args: tuple[Dim, ...]

    def __str__(self) -> str:
        if self.fn in ("max", "min"):
            return f"{self.fn}({', '.join(map(str, self.args))})"
        return self.fn.join(str(a) if a.is_const else f"({a})" for a in self.args)


Atom = str | Call
Monomial = tuple[Atom, ...]


def _quoted(name: str) -> str:
    plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    return name if plain and name not in ("max", "min") else repr(name)


def _atom_text(atom: Atom) -> str:
    if isinstance(atom, str):
        return _quoted(atom)
    return str(atom) if atom.fn in ("max", "min") else f"({atom})"


def _key(monomial: Monomial) -> tuple[int, tuple[str, ...]]:
    return (-len(monomial), tuple(_atom_text(a) for a in monomial))


@dataclass(frozen=True)
class Dim:
    """One dimension. `terms` is the normal form: ((atoms sorted by text), coefficient != 0) sorted; () is
    zero.

    Make one with `Dim.of(8)`, `Dim.of("past + 1")`, `Dim.symbol("batch")`; combine with + - * // % and
    `Dim.max`/`Dim.min`.
    """

    terms: tuple[tuple[Monomial, int], ...]

    # construction ------------------------------------------------------------------------------------------

    @staticmethod
    def of(value: int | str | Dim) -> Dim:
        """An int, an expression in text, or a Dim. Text that is no expression becomes one opaque symbol."""
        if isinstance(value, Dim):
            return value
        if isinstance(value, str):
            try:
                return Dim.parse(value)
            except ModelError:
                return Dim.symbol(value)
        return _const(int(value))

    @staticmethod
    def symbol(name: str) -> Dim:
        """The symbol `name`, whatever characters it has."""
        return Dim((((name,), 1),))

    @staticmethod
    def parse(text: str) -> Dim:
        """Inverse of `str()`. Raises ModelError where `text` is no dimension expression."""
        if len(text) > _LONGEST_TEXT:
            raise ModelError(f"dimension expression of {len(text)} characters")
        try:
            return _from_ast(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError) as error:
            raise ModelError(f"not a dimension expression: {text[:60]!r}") from error

    @staticmethod
    def max(*values: int | str | Dim) -> Dim:
        """The largest of the values."""
        return _extreme("max", [Dim.of(v) for v in values])

    @staticmethod
    def min(*values: int | str | Dim) -> Dim:
        """The smallest of the values."""
        return _extreme("min", [Dim.of(v) for v in values])

    # queries -----------------------------------------------------------------------------------------------

    @property
    def is_const(self) -> bool:
        """Whether this is a plain integer."""
        return not self.terms or (len(self.terms) == 1 and not self.terms[0][0])

    @property
    def value(self) -> int:
        """The integer. Raises ModelError on a symbolic dimension."""
        if not self.is_const:
            raise ModelError(f"dimension {self} is symbolic where a number is needed")
        return self.terms[0][1] if self.terms else 0

    @property
    def symbols(self) -> frozenset[str]:
        """Names of all symbols in it."""
        return frozenset(_symbols(self))

    def evaluate(self, env: Mapping[str, int]) -> int:
        """The integer for the given symbol values. Raises ModelError for a missing symbol or division by
        zero."""
        total = 0
        for monomial, coefficient in self.terms:
            total += coefficient * math.prod(_evaluate_atom(a, env) for a in monomial)
        return total

    def substitute(self, env: Mapping[str, int | Dim]) -> Dim:
        """Replaces the symbols named in `env`; the others stay."""
        if self.is_const:
            return self
        total = ZERO
        for monomial, coefficient in self.terms:
            product = _const(coefficient)
            for atom in monomial:
                product = product * _substitute_atom(atom, env)
            total = total + product
        return total

    # arithmetic --------------------------------------------------------------------------------------------

    def __add__(self, other: int | Dim) -> Dim:
        return _sum([*self.terms, *Dim.of(other).terms])

    def __radd__(self, other: int) -> Dim:
        return self + other

    def __neg__(self) -> Dim:
        return Dim(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: int | Dim) -> Dim:
        return self + -Dim.of(other)

    def __rsub__(self, other: int) -> Dim:
        return -self + other

    def __mul__(self, other: int | Dim) -> Dim:
        right = Dim.of(other).terms
        if len(self.terms) * len(right) > _MOST_PRODUCTS:
            raise ModelError("a dimension is too complex an expression")
        return _sum([(_sorted([*a, *b]), ca * cb) for a, ca in self.terms for b, cb in right])

    def __rmul__(self, other: int) -> Dim:
        return self * other

    def __floordiv__(self, other: int | Dim) -> Dim:
        divisor = Dim.of(other)
        if not divisor.terms:
            raise ModelError(f"dimension {self} divided by zero")
        whole, rest = _divide(self, divisor)
        if rest.is_const and divisor.is_const:
            return whole + rest.value // divisor.value
        return whole + _atom(Call("//", (rest, divisor))) if rest.terms else whole

    def __mod__(self, other: int | Dim) -> Dim:
        divisor = Dim.of(other)
        if not divisor.terms:
            raise ModelError(f"dimension {self} modulo zero")
        _, rest = _divide(self, divisor)
        if rest.is_const and divisor.is_const:
            return _const(rest.value % divisor.value)
        return _atom(Call("%", (rest, divisor))) if rest.terms else ZERO

    def __str__(self) -> str:
        return _text(self)

    def __repr__(self) -> str:
        return f"Dim({self})"


@lru_cache(maxsize=4096)
def _const(value: int) -> Dim:
    return Dim((((), value),)) if value else Dim(())


def _atom(atom: Atom) -> Dim:
    if isinstance(atom, Call) and sum(_atoms(a) for a in atom.args) > _MOST_ATOMS:
        raise ModelError("a dimension is too complex an expression")
    return Dim((((atom,), 1),))


def _atoms(dim: Dim) -> int:
    """Atoms of an expression, those inside others included."""
    found = 0
    for monomial, _ in dim.terms:
        for atom in monomial:
            found += 1 if isinstance(atom, str) else 1 + sum(_atoms(a) for a in atom.args)
    return found


def _sorted(atoms: Iterable[Atom]) -> Monomial:
    return tuple(sorted(atoms, key=_atom_text))


def _sum(terms: Iterable[tuple[Monomial, int]]) -> Dim:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    if set(total) <= {()}:
        return _const(total.get((), 0))
    return Dim(tuple(sorted(((m, c) for m, c in total.items() if c), key=lambda t: _key(t[0]))))


def _quotient(monomial: Monomial, by: Monomial) -> Monomial | None:
    have = Counter(monomial)
    need = Counter(by)
    return None if need - have else _sorted((have - need).elements())


def _divide(value: Dim, divisor: Dim) -> tuple[Dim, Dim]:
    """(whole, rest) with value = whole * divisor + rest: whole takes all that is a multiple for any symbol
    values."""
    if value == divisor:
        return ONE, ZERO
    if len(divisor.terms) != 1:
        return ZERO, value
    ((by, unit),) = divisor.terms
    whole: list[tuple[Monomial, int]] = []
    rest: list[tuple[Monomial, int]] = []
    for monomial, coefficient in value.terms:
        quotient = _quotient(monomial, by)
        share = coefficient // unit if quotient is not None and (not by or coefficient % unit == 0) else 0
        if quotient is not None and share:
            whole.append((quotient, share))
        rest.append((monomial, coefficient - share * unit))
    return _sum(whole), _sum(rest)


def _extreme(fn: str, values: list[Dim]) -> Dim:
    flat: list[Dim] = []
    for value in values:
        inner = value.terms[0][0][0] if len(value.terms) == 1 and len(value.terms[0][0]) == 1 else None
        nested = isinstance(inner, Call) and inner.fn == fn and value.terms[0][1] == 1
        flat += inner.args if nested and isinstance(inner, Call) else [value]
    constants = [v.value for v in flat if v.is_const]
    distinct = {v for v in flat if not v.is_const}
    if constants:
        distinct.add(_const(max(constants) if fn == "max" else min(constants)))
    if not distinct:
        raise ModelError(f"{fn} of no dimensions")
    args = tuple(sorted(distinct, key=str))
    return args[0] if len(args) == 1 else _atom(Call(fn, args))


def _evaluate_atom(atom: Atom, env: Mapping[str, int]) -> int:
    if isinstance(atom, str):
        if atom not in env:
            raise ModelError(f"no value for dimension {atom!r}")
        return env[atom]
    first, *others = [a.evaluate(env) for a in atom.args]
    for other in others:
        if atom.fn in ("//", "%") and other == 0:
            raise ModelError(f"dimension {atom} divides by zero")
        first = _FUNCTIONS[atom.fn](first, other)
    return first


def _apply(fn: str, args: list[Dim]) -> Dim:
    if fn == "//":
        return args[0] // args[1]
    if fn == "%":
        return args[0] % args[1]
    return _extreme(fn, args)


def _substitute_atom(atom: Atom, env: Mapping[str, int | Dim]) -> Dim:
    if isinstance(atom, str):
        return Dim.of(env[atom]) if atom in env else _atom(atom)
    return _apply(atom.fn, [a.substitute(env) for a in atom.args])


def _symbols(dim: Dim) -> Iterator[str]:
    for monomial, _ in dim.terms:
        for atom in monomial:
            if isinstance(atom, str):
                yield atom
            else:
                for arg in atom.args:
                    yield from _symbols(arg)


@lru_cache(maxsize=16384)
def _text(dim: Dim) -> str:
    parts: list[str] = []
    for monomial, coefficient in dim.terms:
        factors = [_atom_text(a) for a in monomial]
        if abs(coefficient) != 1 or not factors:
            factors.insert(0, str(abs(coefficient)))
        sign = "-" if coefficient < 0 else "+"
        text = "*".join(factors)
        parts.append((f" {sign} " if parts else "-" * (coefficient < 0)) + text)
    return "".join(parts) or "0"


def _from_ast(node: ast.expr) -> Dim:
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("a truth value")
        case ast.Constant(value=int() as number):
            return _const(number)
        case ast.Constant(value=str() as name) | ast.Name(id=name):
            return Dim.symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_from_ast(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(op, _from_ast(left), _from_ast(right))
        case ast.Call(func=ast.Name(id="max" | "min" as fn), args=args, keywords=[]) if args:
            return _extreme(fn, [_from_ast(a) for a in args])
    raise ValueError(f"{type(node).__name__} in a dimension expression")


def _binary(op: ast.operator, left: Dim, right: Dim) -> Dim:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.FloorDiv():
            return left // right
        case ast.Mod():
            return left % right
        case ast.Pow() if right.is_const and 0 <= right.value <= 8:
            return math.prod([left] * right.value, start=ONE)
    raise ValueError(f"{type(op).__name__} in a dimension expression")


ZERO = _const(0)
ONE = _const(1)
