"""Every error that a user can cause: one class per cause, all below `MapperError`.

The command line prints `str(error)` on one line and exits with `error.exit_code`:
1 where a result does not match or a check fails, 2 for bad input or usage.
"""

from __future__ import annotations

MAX_LINE = 1000  # characters; names in files may have any length


def printable(text: str) -> str:
    """`text` with escapes for what would steer the terminal, break the line, or reverse the order of what is
    shown: names in hostile files may hold any of it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class MapperError(Exception):
    """Root of all errors that a user can cause. `str()` is one line that names the cause."""

    exit_code = 2

    def __str__(self) -> str:
        line = " ".join(super().__str__().split())
        if len(line) > MAX_LINE:
            line = f"{line[:MAX_LINE]}..."
        return printable(line)


class UsageError(MapperError):
    """An option or argument that means nothing here: unknown target, bad combination, wrong range."""


class ModelError(MapperError):
    """The model file is malformed or hostile: truncated, cyclic, escaping its folder, lying about sizes."""


class UnsupportedModelError(MapperError):
    """The model is well formed, but `mapper` refuses it. Names the node, its op and the reason."""


class WeightsMissingError(MapperError):
    """A weight's bytes were asked for and are not there (metadata-only model, missing external file)."""


class SubstitutionError(ModelError):
    """A weight cannot be replaced in the model's file. Names the weight and the reason."""


class MachineError(MapperError):
    """A machine file is missing, malformed, or lacks a constant that the target needs."""


class CapacityError(MapperError):
    """The model does not fit the machine. Names the memory, the bytes needed and the bytes there."""


class LoweringError(MapperError):
    """The target cannot map this op or request. Names the op and its place in the model."""


class ScheduleError(MapperError):
    """A schedule directory is missing, truncated, of another version, or inconsistent."""


class ExecutionFault(MapperError):
    """The executor met a step that real hardware could not have run: unwritten operand, missing stream..."""

    exit_code = 1


class CheckFailedError(MapperError):
    """A schedule breaks a check. Names the check, the steps, the unit, the cycle and the limit."""

    exit_code = 1


class MismatchError(MapperError):
    """Executed results differ from the oracle by more than the tolerance."""

    exit_code = 1
