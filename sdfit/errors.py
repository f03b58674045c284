"""What can go wrong, each with the exit code the command line gives it.

Every message says what was given, what is allowed and what to type next; the value itself travels on the
exception, so that a caller need not parse the text.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class SdfitError(Exception):
    """A failure that sdfit understands. ``exit_code`` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, message: str, **facts: Any) -> None:
        # one printable line, whatever a file or a caller had in it
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
        self.facts = facts


class InvalidWorkload(SdfitError, ValueError):
    """A value that no img2img run can have."""

    exit_code = 2


class UnknownKeyword(SdfitError, TypeError):
    """A keyword that sdfit does not know."""

    exit_code = 2


class UnknownModel(SdfitError, LookupError):
    """No artifact of that name."""


class UnknownVariant(SdfitError, LookupError):
    """The artifact never saw this combination of dtype, attention and options."""


class NeverSwept(UnknownVariant):
    """No row of this combination was recorded, so that it has no coefficients."""


class ArtifactError(SdfitError, ValueError):
    """A file that is not an sdfit artifact, or no longer one."""


class RecordsError(SdfitError, ValueError):
    """Records that cannot be read or cannot be pooled."""


class SnapshotError(SdfitError, ValueError):
    """A memory snapshot that cannot be read, or is of another run."""


class GridError(SdfitError, ValueError):
    """A grid file that does not say what to run."""


class FitError(SdfitError, ValueError):
    """Records that do not determine the equation."""


class DeviceError(SdfitError, RuntimeError):
    """The card asked for is not there."""


class DependencyError(SdfitError, ImportError):
    """An optional part of sdfit is not installed."""


class SimulatedModelWarning(UserWarning):
    """The artifact in use rests on a simulation or on published numbers, not on a sweep of that card."""


class SweepWarning(UserWarning):
    """A sweep goes on with fewer workers than were asked for."""


class LocalModelWarning(UserWarning):
    """A model of the current folder answers where one that ships with sdfit would have."""


def listed(values: Iterable[object]) -> str:
    """Join values for a message.

    Examples
    --------
    >>> listed(["a100", "t4"])
    'a100, t4'
    >>> listed([])
    'none'
    """
    return ", ".join(str(v) for v in values) or "none"


def shown(value: object) -> str:
    """A value as its author wrote it, for a message: one short line, whatever it is.

    Examples
    --------
    >>> shown("a"), shown(10**5000), len(shown("x" * 1000))
    ("'a'", 'an int that cannot be shown', 80)
    """
    try:
        text = repr(value)
    except Exception:  # an integer of 5,000 digits; anybody's __repr__
        name = type(value).__name__
        return f"{'an' if name[:1] in 'aeiou' else 'a'} {name} that cannot be shown"
    return (text if text.isprintable() else ascii(text))[:80]


def nearest(given: str, known: Sequence[str]) -> str:
    """Name the known word that is closest to the given one, as the end of a sentence.

    Examples
    --------
    >>> nearest("guidence_scale", ["guidance_scale", "dtype"])
    "; did you mean 'guidance_scale'?"
    >>> nearest("zzz", ["guidance_scale", "dtype"])
    '; known: guidance_scale, dtype'
    """
    close = get_close_matches(given, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {listed(known)}"


def needs(extra: str, package: str) -> DependencyError:
    """Build the error for a missing optional package, naming the extra that brings it."""
    return DependencyError(
        f"this needs {package}, which is not installed; type: pip install 'sdfit[{extra}]'",
        extra=extra,
        package=package,
    )


INTERRUPTED = "interrupted; what was recorded is kept, run the same command to go on"
"""What Ctrl-C is answered."""
QUIET = "SDFIT_QUIET"
"""The environment variable that silences notes: any value but 0 and the empty one."""


def quiet() -> bool:
    """Whether notes are unwanted."""
    return os.environ.get(QUIET, "") not in ("", "0")


EXTRAS = {
    "torch": "sweep",
    "diffusers": "sweep",
    "transformers": "sweep",
    "accelerate": "sweep",
    "PIL": "sweep",
    "pynvml": "sweep",
    "scipy": "fit",
    "pandas": "fit",
    "sklearn": "fit",
    "matplotlib": "plot",
    "ray": "ray",
}
"""Which extra brings a module that an install without extras lacks."""


def missing(error: ModuleNotFoundError) -> DependencyError | None:
    """Name the extra that brings a module that was not found; None if no extra does.

    Examples
    --------
    >>> str(missing(ModuleNotFoundError(name="scipy.optimize")))
    "this needs scipy, which is not installed; type: pip install 'sdfit[fit]'"
    """
    module = (error.name or "").split(".")[0]
    return needs(EXTRAS[module], module) if module in EXTRAS else None


def run_command(command: Any, arguments: Sequence[str] | None, program: str) -> int:
    """Run a click command; returns the exit code. A known failure is one line on stderr.

    Parameters
    ----------
    command : click.Command
    arguments : sequence of str, optional
        None: those of the process.
    program : str
        Its name, for help and usage errors.
    """
    import click  # not here before: predicting needs no command line

    before = sys.stdout
    try:
        _streams()
        _folder()
        return int(command.main(arguments, prog_name=program, standalone_mode=False) or 0)
    except SystemExit:
        if sys.stdout is before:
            raise
        return 0  # click put another in its place: the reader of our output went away, as head does
    except (Exception, KeyboardInterrupt) as error:
        code, words = _ending(error)
        with suppress(OSError):
            if isinstance(error, click.ClickException):
                error.show()
            else:
                click.echo(f"sdfit: {words}", err=True)
        return code


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the words of a known failure; any other is raised again."""
    import click

    if isinstance(error, SdfitError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, INTERRUPTED
    if isinstance(error, MemoryError):
        return 1, "there is not enough memory in this machine, or for this process, to do it"
    if isinstance(error, OSError):
        what = f"'{error.filename}'" if error.filename else "the system refuses"
        if _while_answering(error):
            _discard(sys.stdout)  # what it still holds would fail again when the process ends
            what = "the answer cannot be written"
        return 1, f"{what}: {error.strerror or error}"
    lacking = missing(error) if isinstance(error, ModuleNotFoundError) else None
    if lacking is None:
        raise error
    return lacking.exit_code, str(lacking)


def _while_answering(error: BaseException) -> bool:
    """Whether it was raised while something was printed."""
    import click

    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is click.echo.__code__:
            return True
        trace = trace.tb_next
    return False


def _folder() -> None:
    """See that the current folder is there: else nothing is where it is said to be, and PyTorch cannot be loaded.

    Raises
    ------
    SdfitError
        If it was deleted.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise SdfitError("the current folder was deleted; change to one that is there") from None


def _streams() -> None:
    """See that the three streams are there: where one is closed, the next file that is opened would take its place.

    Raises
    ------
    SdfitError
        If there is nowhere to write an answer to.
    """
    closed = sys.stdout is None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stderr is sys.__stderr__:  # None where it was closed
        like = sys.stderr or sys.stdout or io.TextIOWrapper(io.BytesIO())
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Beside()), encoding=like.encoding, errors="backslashreplace", line_buffering=True
        )
    if closed:
        raise SdfitError("standard output is closed; open it, for example with > answer.txt")


class _Beside(io.RawIOBase):
    """Standard error: what cannot be written there is lost, and the work goes on."""

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(2, data)
        except OSError:
            return len(data)


def _discard(stream: Any) -> None:
    """Let a stream take what is left without writing it anywhere."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
