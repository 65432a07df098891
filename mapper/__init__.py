"""Maps transformer inference onto hardware: one ONNX model in, an executed schedule out, per architecture.

    graph = mapper.load("model.onnx")
    schedule = mapper.compile(graph, target="lpu", out="out/lpu")
    mapper.check("out/lpu")
    outputs = mapper.execute("out/lpu", inputs)
    outputs = mapper.run(graph, inputs)          # the graph itself, on the host's kernels

Names are looked up on first use (PEP 562), so `import mapper` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mapper import errors
from mapper.errors import MapperError

if TYPE_CHECKING:
    from mapper.driver import check, compile, execute, load, run

__version__ = "0.1.0"
__all__ = ["MapperError", "__version__", "check", "compile", "errors", "execute", "load", "run"]

_DRIVER = frozenset({"check", "compile", "execute", "load", "run"})


def __getattr__(name: str) -> Any:
    if name in _DRIVER:
        return getattr(import_module("mapper.driver"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
