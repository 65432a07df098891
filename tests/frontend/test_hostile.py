"""Files made to take long or to need much memory, each given to a fresh process."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest

MAX_CPU, MAX_RSS = 6, 500 << 20
"""Seconds (of a slow machine with others on it: alone it is below 2) and bytes for `mapper inspect`."""


def number(value: int) -> bytes:
    """A varint."""
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def part(field: int, body: bytes | int) -> bytes:
    """A length-delimited field, or an integer one."""
    if isinstance(body, int):
        return number(field << 3) + number(body)
    return number(field << 3 | 2) + number(len(body)) + body


def node(op: str, ins: Iterable[str], outs: Iterable[str], more: bytes = b"") -> bytes:
    """A NodeProto in a graph."""
    names = b"".join(part(1, i.encode()) for i in ins) + b"".join(part(2, o.encode()) for o in outs)
    return part(1, names + part(4, op.encode()) + more)


def value(name: str, dims: Iterable[int | str] = ()) -> bytes:
    """A ValueInfoProto of floats."""
    sizes = b"".join(part(1, part(2, d.encode()) if isinstance(d, str) else part(1, d)) for d in dims)
    return part(1, name.encode()) + part(2, part(1, part(1, 1) + part(2, sizes)))


def tensor(name: str, more: bytes, code: int = 1) -> bytes:
    """An initializer."""
    return part(5, more + part(2, code) + part(8, name.encode()))


def model(nodes: bytes, tensors: bytes = b"", inputs: bytes | None = None, out: str = "y") -> bytes:
    """A ModelProto of opset 17, from x [2, 3] unless `inputs` are given."""
    given = part(11, value("x", [2, 3])) if inputs is None else inputs
    return part(8, part(2, 17)) + part(7, nodes + tensors + given + part(12, value(out)))


def chain(op: str, length: int) -> bytes:
    """y = op(op(...)), or op(x, op(x, ...))."""
    two = ["x"] if op in ("Add", "Mul") else []
    names = ["x", *(f"v{i}" for i in range(length - 1)), "y"]
    return model(b"".join(node(op, [*two, a], [b]) for a, b in pairwise(names)))


def calls(depth: int, width: int) -> bytes:
    """Functions that call the next one `width` times: width^depth nodes."""
    functions = b""
    for level in range(depth):
        functions += part(
            25, _function(f"F{level}", width, "Relu" if level == depth - 1 else f"F{level + 1}")
        )
    return model(node("F0", ["x"], ["y"], part(7, b"p"))) + functions


def _function(name: str, width: int, callee: str) -> bytes:
    body, domain = b"", b"" if callee == "Relu" else part(7, b"p")
    for a, b in pairwise(["i", *(f"o{k}" for k in range(width))]):
        body += part(7, part(1, a.encode()) + part(2, b.encode()) + part(4, callee.encode()) + domain)
    ends = part(4, b"i") + part(5, f"o{width - 1}".encode())
    return part(1, name.encode()) + ends + body + part(9, part(2, 17)) + part(10, b"p")


def branches(count: int) -> bytes:
    """Many If nodes in one graph."""
    inner = node("Identity", ["x"], ["q"]) + part(12, value("q"))
    then = part(5, part(1, b"then_branch") + part(6, inner) + part(20, 5))
    made = b"".join(node("If", ["c"], [f"v{i}"], then) for i in range(count - 1))
    return model(made + node("If", ["c"], ["y"], then), tensor("c", part(1, 1) + part(9, b"\1"), 9))


def external(count: int, location: Callable[[int], str]) -> bytes:
    """Many tensors in other files."""
    where = (part(13, part(1, b"location") + part(2, location(i).encode())) for i in range(count))
    made = b"".join(tensor(f"t{i}", part(1, 1) + w + part(14, 1)) for i, w in enumerate(where))
    return model(node("Identity", ["x"], ["y"]), made)


def attribute(more: bytes) -> bytes:
    """A node with one attribute."""
    return model(node("Relu", ["x"], ["y"], part(5, part(1, b"a") + more)))


def inputs(names: int, dims: Callable[[int], list[int | str]]) -> bytes:
    """Many inputs that meet each other pairwise."""
    given = b"".join(part(11, value(f"i{i}", dims(i))) for i in range(names))
    made = b"".join(node("Add", [f"i{i}", f"i{i + 1}"], [f"o{i}"]) for i in range(names - 1))
    return model(made, inputs=given, out="o0")


def slices(count: int) -> bytes:
    """x[1:][1:]..., of an unknown length."""
    ints = [("a", 1), ("b", 1 << 40), ("z", 0)]
    made = b"".join(tensor(n, part(1, 1) + part(9, v.to_bytes(8, "little")), 7) for n, v in ints)
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    steps = (node("Slice", [a, "a", "b", "z"], [b]) for a, b in pairwise(names))
    return model(b"".join(steps), made, part(11, value("x", ["n", 3])))


SUMS = "*".join(["(a+b+c+d+e+f+g)"] * 12)
FILES: dict[str, Callable[[], bytes]] = {
    "a chain of 100,000 nodes": lambda: chain("Relu", 100_000),
    "a chain of sums": lambda: chain("Add", 60_000),
    "2^15 nodes by functions": lambda: calls(15, 2),
    "10^15 nodes by functions": lambda: calls(15, 10),
    "many branches": lambda: branches(4_000),
    "long names": lambda: model(b"".join(node("Relu", ["x"], [f"{i}".ljust(65_000)]) for i in range(1_100))),
    "long strings": lambda: attribute(part(4, bytes(1 << 20)) * 70),
    "many integers": lambda: attribute(part(8, b"\1" * 2_000_000) + part(20, 7)),
    "many floats": lambda: attribute(part(7, bytes(8_000_000)) + part(20, 6)),
    "many dimensions": lambda: model(b"", tensor("w", part(1, b"\1" * 2_000_000))),
    "floats that are not raw": lambda: model(b"", tensor("w", part(1, 1 << 25) + part(4, bytes(1 << 27)))),
    "integers that are not raw": lambda: model(b"", tensor("w", part(1, 1) + part(5, bytes(1 << 24)), 6)),
    "integers one by one": lambda: model(b"", tensor("w", part(1, 900_000) + part(5, 1) * 900_000, 6)),
    "many tensors in a file": lambda: external(20_000, lambda i: "w.bin"),
    "many files": lambda: external(20_000, lambda i: f"d/w{i}.bin"),
    "a long path": lambda: external(50, lambda i: "a/" * 32_000 + f"w{i}"),
    "a product of 2480 bits": lambda: model(b"", tensor("w", part(1, 1 << 62) * 40)),
    "many sizes": lambda: inputs(10_000, lambda i: [f"s{i}_{k}+{k}" for k in range(6)]),
    "many equal sizes": lambda: inputs(1_000, lambda i: [f"s{i}", f"t{i}"]),
    "a product of sums": lambda: inputs(2, lambda i: [SUMS]),
    "many products of sums": lambda: inputs(300, lambda i: [SUMS.replace("a", f"a{i}")[:190]]),
    "a rank of 100,000": lambda: inputs(2, lambda i: [1] * 100_000),
    "many operands": lambda: model(node("Sum", ["x"] * 200_000, ["y"])),
    "slices of slices": lambda: slices(3_000),
    "names that steer the terminal": lambda: model(
        node("\x1b[31mEvil\nNext", ["x"], ["y"], part(7, b"\x1b]0;own\x07") + part(3, "\u202ex".encode()))
    ),
}  # fmt: skip


MEASURE = """
import json, resource, subprocess, sys
command = [sys.executable, "-m", "mapper", "inspect", sys.argv[1]]
done = subprocess.run(command, capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([done.returncode, done.stderr, used.ru_utime + used.ru_stime, peak]))
"""
"""Run in a small process: a child begins with the peak memory of its parent."""


@pytest.mark.parametrize("name", FILES)
def test_answered_quickly_in_little_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.onnx"
    path.write_bytes(FILES[name]())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True,
        env=os.environ | _sources(),
    )  # fmt: skip
    code, said, seconds, peak = json.loads(done.stdout)
    assert code in (0, 2), said
    assert (
        said.count("\n") == (1 if code else 0) and said.removesuffix("\n").isprintable() and len(said) < 1200
    )
    assert seconds < MAX_CPU and peak < MAX_RSS, f"{seconds:.1f} s, {peak >> 20} MiB"


def test_a_large_sparse_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.onnx"
    with path.open("wb") as file:
        file.write(model(node("Relu", ["x"], ["y"])) + number(30 << 3 | 2) + number(1900 << 20))
        file.truncate(file.tell() + (1900 << 20))
    limit = (8 << 30, 8 << 30)
    done = subprocess.run(
        [sys.executable, "-m", "mapper", "inspect", str(path)], capture_output=True, text=True, check=False,
        env=os.environ | _sources(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _sources() -> dict[str, str]:
    """The environment in which a new process finds the modules that this one has."""
    return {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
