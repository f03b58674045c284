"""The command that reads a card's kernels off a recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sdfit.cli.options import FILE, example, json_option, note, out_option, workload_from, workload_options
from sdfit.errors import SdfitError


@click.command(epilog=example("sdfit calibrate run.pickle --gpu t4 --height 512 --width 512 --num-inference-steps 2"))
@click.argument("snapshots", nargs=-1, required=True, type=FILE, metavar="SNAPSHOT...")
@workload_options
@click.option(
    "--num-inference-steps",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Denoising steps that ran: steps times strength.",
)
@click.option("--gpu", default=None, help="The card it was recorded on, as in t4: names the table, gives it a prior.")
@click.option("--kernels", default=None, help="The prior, if not the card's own: another card, or a table (.json).")
@click.option("--device", type=click.IntRange(0), default=None, help="Which card of the file; the busiest.")
@out_option
@click.option("--figure", type=FILE, default=None, help="Draw card and trace over the run (.png).")
@json_option
def calibrate(
    snapshots: tuple[Path, ...],
    num_inference_steps: int,
    gpu: str | None,
    kernels: str | None,
    device: int | None,
    out: Path | None,
    figure: Path | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Read every kernel's workspace, to the byte, off PyTorch's memory snapshots of runs on a card.

    Files of sdfit sweep --history say themselves what ran; for others give the workload. --out writes the workspace table
    that sdfit sweep --backend trace --kernels FILE.json takes. Nothing in a snapshot is executed.
    """
    from sdfit.backends.trace.tables import workspaces_of, write_table
    from sdfit.study.calibration.read import calibrated, named, told

    runs = []
    for path in snapshots:
        snapshot = told(path, device)
        if snapshot.workload is None:
            snapshot.workload, snapshot.num_inference_steps = workload_from(dict(fields)), num_inference_steps
        runs.append(snapshot)
    card = named(runs, gpu)
    base = None
    try:
        base = workspaces_of(kernels or card).architecture
    except SdfitError as error:
        if kernels:
            raise
        note(f"{error}; there is no prior then")
    pairs = [calibrated(run, card) for run in runs]
    from sdfit.study.calibration.report import report

    found = report(
        pairs,
        name=card,
        base=base,
        evidence=f"recorded on {card}: {', '.join(path.name for path in snapshots)}",
        word=" and ".join(dict.fromkeys(run.source for run in runs)),
    )
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    if out is not None:
        click.echo(f"wrote {write_table(found.architecture, out, inputs=snapshots)}", err=True)
    if figure is not None:
        from sdfit.study.calibration.figure import draw

        click.echo(f"wrote {draw(*pairs[0], found.architecture, figure, word=found.word, base=base)}", err=True)
