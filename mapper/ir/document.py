"""The table of ops in README.md, made from the op definitions: `python -m mapper.ir.document` rewrites it."""

from __future__ import annotations

from pathlib import Path

from mapper.ir.dialect import OPS
from mapper.ir.infer import operand_fields
from mapper.ir.op import DataflowOp, Field, fields

README = Path(__file__).with_name("README.md")
_BEGIN, _END = "<!-- ops: begin -->", "<!-- ops: end -->"


def op_table() -> str:
    """A Markdown table: op, class, operands, attributes with defaults, meaning."""
    lines = ["| op | class | operands | attributes | meaning |", "|---|---|---|---|---|"]
    for mnemonic, cls in OPS.items():
        operands = ", ".join(_operand(*f) for f in operand_fields(cls)) or "-"
        attributes = ", ".join(_attribute(n, f) for n, f in fields(cls).items()) or "-"
        lines.append(f"| `{mnemonic}` | {cls.__name__} | {operands} | {attributes} | {_meaning(cls)} |")
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """The README's text with the table brought up to date."""
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n{op_table()}\n{_END}{after}"


def _operand(name: str, kind: str) -> str:
    return name + {"one": "", "optional": "?", "many": "..."}[kind]


def _attribute(name: str, field: Field) -> str:
    kind = type(field.kind).__name__.removesuffix("Kind").lower()
    kind = {"text": "str", "weight": "@"}.get(kind, kind)
    if field.required:
        return f"{name}: {kind}"
    return f"{name}: {kind} = {field.default}" if field.default is not None else f"{name}?: {kind}"


def _meaning(cls: type[DataflowOp]) -> str:
    text = " ".join((cls.__doc__ or "").split())
    return text.replace("|", "\\|")


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
