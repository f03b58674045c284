"""Commands on records files: what others are asked to run before they send theirs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sdfit.cli.options import FILE, example, json_option, quiet_option

EXAMPLE = example("sdfit records check data/sm75/2026-11-28-default-trace.jsonl.gz")


@click.group(epilog=EXAMPLE)
def records() -> None:
    """Look at records files."""


@records.command(epilog=EXAMPLE)
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
@json_option
def check(files: tuple[Path, ...], as_json: bool) -> None:
    """Say whether records can be sent as a pull request: environment, order, duplicates, physics. Exit code 3: no.

    data/CONTRIBUTING.md says how.
    """
    from sdfit.judging.submission import check_submission

    found = [check_submission(path) for path in files]
    if as_json:
        click.echo(json.dumps([one.to_dict() for one in found], indent=2))
    else:
        click.echo("\n\n".join(one.text() for one in found))
    if not all(one.accepted for one in found):
        click.get_current_context().exit(3)


check.params.append(quiet_option())
