"""The command line: each command parses, calls one function and prints.

Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 a known failure in one line, 2 usage, 3 the
answer is no, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

try:
    import click

    from sdfit import __version__
    from sdfit.backends.environment import quiet_libraries
    from sdfit.cli.asking import advise, cards, fits, largest, models, predict
    from sdfit.cli.calibrating import calibrate
    from sdfit.cli.options import quiet_option
    from sdfit.cli.pictures import check, validate
    from sdfit.cli.running import demo, fit, sweep
    from sdfit.cli.sending import records
    from sdfit.cli.study import compare, derive, evaluate, explain, identify, report
    from sdfit.cli.weighing import curve, strategies
    from sdfit.errors import INTERRUPTED, QUIET, run_command
except KeyboardInterrupt:  # Ctrl-C while this is loaded: there is nothing to tell or to keep
    raise SystemExit(130) from None

ABOUT = """\b
Examples:
  sdfit fits --gpu rtx3060 --height 1024 --width 1024 --batch-size 4
  sdfit COMMAND --help        each command ends with examples of its own

\b
Exit codes:
  0  done, yes      1  a known failure, in one sentence      2  usage
  3  no             130  interrupted; the same command goes on

\b
Environment:
  SDFIT_MODELS  a folder of models, looked into first
  SDFIT_QUIET   1: no notes, as --quiet
  NO_COLOR      any value: no colour

\b
Completion by the Tab key, for this shell or in its start-up file:
  eval "$(_SDFIT_COMPLETE=bash_source sdfit)"    # or zsh_source
  _SDFIT_COMPLETE=fish_source sdfit | source

Answers go to stdout, all else to stderr; --json gives plain values, in bytes.
"""
SHOW_CURSOR = "\x1b[?25h"
"""What a terminal is told after a bar that was not ended."""


class _Whole(click.Group):
    """A group whose help says of each command its whole first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Group.format_commands`, which cuts the sentences short."""
        rows = [(name, " ".join((c.help or "").split("\n\n")[0].split())) for name, c in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Whole, context_settings={"help_option_names": ["-h", "--help"]}, epilog=ABOUT)
@click.version_option(__version__, prog_name="sdfit")
def cli() -> None:
    """How much GPU memory will a Stable Diffusion v1.5 img2img run need, and will it fit?"""


for _command in (
    sweep, fit, predict, fits, largest, advise, strategies, curve, check, validate, cards, calibrate, explain, derive, compare, evaluate, identify, models, report, demo, records,
):  # fmt: skip
    _command.params.append(quiet_option())
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    quiet_libraries()
    before = os.environ.get(QUIET)
    try:
        with _signals():
            return run_command(cli, arguments, "sdfit")
    finally:  # --quiet is of this run
        if before is None:
            os.environ.pop(QUIET, None)
        else:
            os.environ[QUIET] = before


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that a sweep ends its workers; nohup keeps its meaning."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
            if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(_: int, frame: FrameType | None) -> None:
    """End the command: by an exception, or at once while something is imported.

    An exception that comes through PyTorch's C++ while it is loaded ends the process with a message of its own. Nothing is
    lost: what was recorded is on the disk, and the workers end with this process. Ray's do not, so that it hears of it.
    """
    while frame is not None and "ray" not in sys.modules:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, (SHOW_CURSOR * os.isatty(2) + f"\nsdfit: {INTERRUPTED}\n").encode())
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt
