"""The command line: each command parses, calls one function and prints.

Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 a known failure in one line, 2 usage, 3 the
answer is no, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from sdfit import __version__
from sdfit.cli.asking import advise, fits, largest, models, predict, report
from sdfit.cli.running import demo, fit, sweep
from sdfit.cli.study import compare, derive, evaluate, explain, identify
from sdfit.errors import SdfitError, missing


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdfit")
def cli() -> None:
    """How much GPU memory will a Stable Diffusion v1.5 img2img run need, and will it fit?"""


for _command in (
    sweep, fit, predict, fits, largest, advise, explain, derive, compare, evaluate, identify, models, report, demo,
):  # fmt: skip
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    warnings.showwarning = _note
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their advice on optional packages is not an answer
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        result = cli.main(arguments, standalone_mode=False)
        return int(result or 0)
    except SdfitError as error:
        click.echo(f"sdfit: {error}", err=True)
        return error.exit_code
    except ModuleNotFoundError as error:
        lacking = missing(error)
        if lacking is None:
            raise
        click.echo(f"sdfit: {lacking}", err=True)
        return lacking.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("sdfit: interrupted; what was recorded is kept, run the same command to go on", err=True)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as head does
        sys.stderr.close()
        return 0


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category.__module__.startswith("sdfit"):
        click.echo(f"note: {message}", err=True)
