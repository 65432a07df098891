"""Emission of vector code: a thin layer over llvmlite's builder, for the kernels' inner loops.

Vectors are LLVM vectors of fixed length; the code generator splits them to what the processor has, so that
the same text runs everywhere with the same results. Only `dot4` has a form of its own for one instruction
set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
Value = Any


@cache
def features() -> frozenset[str]:
    """Names of the instruction sets of this processor, as the code generator calls them."""
    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


def vector(kind: Any, n: int) -> Any:
    """The type of a vector."""
    return ir.VectorType(kind, n)


class Emitter:
    """Appends code where `builder` stands. Addresses are int64 values; loads and stores may be unaligned."""

    def __init__(self, builder: Any, vnni: bool) -> None:
        self.b = builder
        self.vnni = vnni

    def number(self, n: int) -> Value:
        """An int64."""
        return ir.Constant(I64, n)

    def fill(self, kind: Any, n: int, value: float) -> Value:
        """A vector of equal constants."""
        return ir.Constant(vector(kind, n), [value] * n)

    def constant(self, kind: Any, values: Sequence[float]) -> Value:
        """A vector of constants."""
        return ir.Constant(vector(kind, len(values)), list(values))

    def at(self, base: Value, *terms: tuple[Value | int, Value | int]) -> Value:
        """base + sum of products."""
        for a, b in terms:
            a, b = (self.number(v) if isinstance(v, int) else v for v in (a, b))
            base = self.b.add(base, self.b.mul(a, b))
        return base

    def load(self, address: Value, kind: Any) -> Value:
        """One value of any type."""
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)

    def load_part(self, address: Value, kind: Any, mask: Value) -> Value:
        """The elements of a vector whose `mask` holds; zero for the others, which are not touched."""
        named = f"llvm.masked.load.v{kind.count}{_letters(kind.element)}.p0"
        pointer = self.b.inttoptr(address, kind.as_pointer())
        return self.call(named, kind, pointer, ir.Constant(I32, 1), mask, ir.Constant(kind, [0] * kind.count))

    def store(self, value: Value, address: Value) -> None:
        """One value of any type."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def store_part(self, value: Value, address: Value, mask: Value) -> None:
        """Those elements of a vector whose `mask` holds."""
        kind = value.type
        named = f"llvm.masked.store.v{kind.count}{_letters(kind.element)}.p0"
        pointer = self.b.inttoptr(address, kind.as_pointer())
        self.call(named, ir.VoidType(), value, pointer, ir.Constant(I32, 1), mask)

    def mask(self, n: int, count: Value) -> Value:
        """<n x i1>: lane < count."""
        lanes = self.constant(I64, range(n))
        return self.b.icmp_signed("<", lanes, self.splat(count, n))

    def splat(self, scalar: Value, n: int) -> Value:
        """A vector of n equal values."""
        undefined = ir.Constant(vector(scalar.type, n), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(vector(I32, n), [0] * n))

    def pick(self, a: Value, lanes: Sequence[int], b: Value | None = None) -> Value:
        """Lanes of `a`, then of `b`."""
        other = ir.Constant(a.type, ir.Undefined) if b is None else b
        return self.b.shuffle_vector(a, other, ir.Constant(vector(I32, len(lanes)), list(lanes)))

    def call(self, name: str, result: Any, *args: Value) -> Value:
        """Call an LLVM intrinsic."""
        kinds = [a.type for a in args]
        declare: Any = cgutils.get_or_insert_function
        function = declare(self.b.module, ir.FunctionType(result, kinds), name)
        return self.b.call(function, args)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once."""
        return self.call(f"llvm.fma.v{a.type.count}{_letters(a.type.element)}", a.type, a, b, c)

    def unary(self, name: str, a: Value) -> Value:
        """An LLVM intrinsic of one vector: fabs, rint, sqrt."""
        return self.call(f"llvm.{name}.v{a.type.count}{_letters(a.type.element)}", a.type, a)

    def larger(self, a: Value, b: Value) -> Value:
        """Elementwise maximum of numbers."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def total(self, a: Value) -> Value:
        """Sum of the lanes, halves added to halves: the same order everywhere."""
        add = self.b.fadd if isinstance(a.type.element, ir.FloatType) else self.b.add
        while a.type.count > 1:
            n = a.type.count // 2
            a = add(self.pick(a, range(n)), self.pick(a, range(n, 2 * n)))
        return self.b.extract_element(a, ir.Constant(I32, 0))

    def peak(self, a: Value) -> Value:
        """Largest lane."""
        while a.type.count > 1:
            n = a.type.count // 2
            a = self.larger(self.pick(a, range(n)), self.pick(a, range(n, 2 * n)))
        return self.b.extract_element(a, ir.Constant(I32, 0))

    def prefetch(self, address: Value, level: int = 1) -> None:
        """Ask for a cache line that will be read, into the caches from this level on."""
        pointer = self.b.inttoptr(address, I8.as_pointer())
        hints = [ir.Constant(I32, n) for n in (0, 4 - level, 1)]
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *hints)

    def dot4(self, total: Value, a: Value, b: Value) -> Value:
        """total [i32] + sums of four products each of unsigned bytes a and signed bytes b."""
        if self.vnni:
            kind = vector(I32, 16)
            return self.call("llvm.x86.avx512.vpdpbusd.512", kind, total, a, b)
        n = a.type.count
        wide = [
            extend(extend(v, vector(I16, n)), vector(I32, n))
            for extend, v in ((self.b.zext, a), (self.b.sext, b))
        ]
        products = self.b.mul(*wide)
        for _ in range(2):
            m = products.type.count
            even, odd = self.pick(products, range(0, m, 2)), self.pick(products, range(1, m, 2))
            products = self.b.add(even, odd)
        return self.b.add(total, products)

    def lookup(self, index: Value, table: Sequence[int]) -> Value:
        """table[index], bytes: a table of 16 and indices below 16."""
        if self.vnni:  # the same processors have byte shuffles
            kind = index.type
            return self.call("llvm.x86.avx512.pshuf.b.512", kind, self.constant(I8, list(table) * 4), index)
        n = index.type.count
        found = self.fill(I8, n, table[0])
        for number, value in enumerate(table):
            same = self.b.icmp_unsigned("==", index, self.fill(I8, n, number))
            found = self.b.select(same, self.fill(I8, n, value), found)
        return found

    def loop(
        self,
        begin: Value,
        end: Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], list[Value]],
    ) -> list[Value]:
        """for i in begin..end - 1: carried = body(i, carried); what is carried in the end."""
        before = self.b.block
        inside, after = self.b.append_basic_block("loop"), self.b.append_basic_block("done")
        self.b.cbranch(self.b.icmp_signed("<", begin, end), inside, after)
        self.b.position_at_end(inside)
        i = self.b.phi(I64)
        i.add_incoming(begin, before)
        now = []
        for value in carried:
            now.append(self.b.phi(value.type))
            now[-1].add_incoming(value, before)
        made = body(i, list(now))
        last = self.b.block
        following = self.b.add(i, self.number(1))
        i.add_incoming(following, last)
        for phi, value in zip(now, made, strict=True):
            phi.add_incoming(value, last)
        self.b.cbranch(self.b.icmp_signed("<", following, end), inside, after)
        self.b.position_at_end(after)
        return self._joined(before, carried, last, made)

    def when(
        self, condition: Value, carried: Sequence[Value], body: Callable[[list[Value]], list[Value]]
    ) -> list[Value]:
        """carried, or body(carried) where the condition holds."""
        before = self.b.block
        inside, after = self.b.append_basic_block("then"), self.b.append_basic_block("after")
        self.b.cbranch(condition, inside, after)
        self.b.position_at_end(inside)
        made = body(list(carried))
        last = self.b.block
        self.b.branch(after)
        self.b.position_at_end(after)
        return self._joined(before, carried, last, made)

    def _joined(self, before: Any, carried: Sequence[Value], last: Any, made: Sequence[Value]) -> list[Value]:
        """What is carried where the ways from two blocks meet."""
        found = []
        for value, new in zip(carried, made, strict=True):
            found.append(self.b.phi(value.type))
            found[-1].add_incoming(value, before)
            found[-1].add_incoming(new, last)
        return found


def _letters(kind: Any) -> str:
    return {F16: "f16", F32: "f32"}.get(kind) or f"i{kind.width}"
