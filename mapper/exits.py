"""How a command ends: exit codes, and errors as one line on standard error."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from typing import NoReturn

import typer

from mapper.errors import MapperError

BUG, INTERRUPTED = 70, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_app(app: typer.Typer) -> NoReturn:
    """Run a command line and exit: with its own code, or an error's, printed as one line."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `mapper ... | head` ends quietly
    if not os.environ.get("MAPPER_DEBUG"):
        warnings.simplefilter("ignore")
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    sys.exit(_guarded(app))


def _guarded(app: typer.Typer) -> int:
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        return _complain("interrupted", INTERRUPTED) if code == INTERRUPTED else int(code or 0)
    except MapperError as error:
        return _complain(f"{type(error).__name__}: {error}", error.exit_code)
    except typer.TyperException as error:
        return _complain(f"{error.format_message().rstrip('.')}. See {_help_for(error)}.", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", INTERRUPTED)
    except OSError as error:
        if error.errno not in FULL:
            return _bug(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer has no place to go
        return _complain(f"cannot write: {error.strerror}", 2)
    except Exception as error:
        return _bug(error)


def _bug(error: Exception) -> int:
    if os.environ.get("MAPPER_DEBUG"):
        raise error
    where = _place(error)
    return _complain(
        f"bug: {type(error).__name__}: {error} ({where}); MAPPER_DEBUG=1 shows the traceback", BUG
    )


def _help_for(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else "mapper --help"


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "no place"


def _complain(message: str, code: int) -> int:
    print(f"mapper: {' '.join(message.split())}", file=sys.stderr)
    return code
