"""Commands that weigh ways and sizes against each other: strategies, curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sdfit.cli.options import (
    FILE,
    example,
    gpu_option,
    json_option,
    memory_option,
    suited,
    workload_from,
    workload_options,
    wrongly,
)


@click.command(
    epilog=example(
        "sdfit strategies --gpu t4 --height 512 --width 512",
        "sdfit strategies --gpu rtx3060 --height 1024 --width 1024 --memory 6GiB",
    )
)
@gpu_option
@memory_option
@workload_options
@click.option(
    "--records",
    type=FILE,
    multiple=True,
    help="A sweep that was measured on this card: its seconds.",
)
@click.option("--figure", type=FILE, default=None, help="Memory across, time up (.png, .svg).")
@json_option
def strategies(
    gpu: str, memory: str | None, records: tuple[Path, ...], figure: Path | None, as_json: bool, **fields: Any
) -> None:
    """Say what each option costs and saves: peak, saved, fits, seconds where they are known, sorted by peak."""
    from sdfit.predict.library import load
    from sdfit.predict.memory import available
    from sdfit.study.comparison.strategies import strategies as compared
    from sdfit.study.comparison.times import measured_times, published_times

    workload, f = workload_from(fields), load(gpu)
    workload, there = suited(f, workload), available(memory, f.card)
    times = published_times()
    if records:
        from sdfit.fit.files import read_pooled

        data = read_pooled(records)
        times = (*measured_times(data.environment, data.records), *times)
    found = compared(f, workload, memory_bytes=there.memory_bytes, times=times)
    if as_json:
        click.echo(json.dumps(found.to_dict() | {"memory": there.words}, indent=2))
    else:
        click.echo("\n".join([found.table(), f"memory: {there.words}", *wrongly(f, workload.dtype)]))
    if figure is not None:
        from sdfit.study.comparison.frontier import draw

        click.echo(f"wrote {draw(found, figure)}", err=True)


@click.command(
    epilog=example(
        "sdfit curve --gpu t4 --over height --from 256 --to 2048 --width 1024",
        "sdfit curve --gpu t4 --over batch --from 1 --to 16 --height 512 --width 512 --variant attention=eager",
    )
)
@click.option("--gpu", multiple=True, help="A card, model or path; give it again for several. Left out: the card here.")
@memory_option
@click.option(
    "--over",
    type=click.Choice(["height", "width", "size", "batch", "tokens", "steps"]),
    required=True,
    help="What runs along the axis; size is a square's side.",
)
@click.option("--from", "start", type=int, required=True, help="The first value.")
@click.option("--to", "end", type=int, required=True, help="The last value.")
@click.option("--step", type=int, default=None, help="Left out: as fine as it matters, at most 256 points.")
@click.option("--variant", multiple=True, help="A further curve with options changed: attention=eager,vae_tiling=True.")
@click.option("--metric", default=None, help="One of required, allocated, reserved, device; left out: what decides.")
@workload_options
@click.option("--level", type=float, default=None, help="Of the bands, between 0 and 1.")
@click.option("--csv", "csv_file", type=FILE, default=None, help="Write every point to a file.")
@click.option("--out", type=FILE, default=None, help="Draw the curves (.png, .svg).")
@json_option
def curve(
    gpu: tuple[str, ...],
    memory: str | None,
    over: str,
    start: int,
    end: int,
    step: int | None,
    variant: tuple[str, ...],
    metric: str | None,
    level: float | None,
    csv_file: Path | None,
    out: Path | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Memory over size, batch, tokens or steps: several variants or cards in one figure, with bands."""
    from sdfit.files import Output, write
    from sdfit.predict.library import load
    from sdfit.predict.memory import available
    from sdfit.predict.predictor import DEFAULT_LEVEL
    from sdfit.predict.verdict import best_metric
    from sdfit.study.comparison import curve as curves

    varied = curves.OVER[over]
    for name in ("height", "width", "batch_size", "prompt_length"):
        if name in varied:
            fields[name] = start
    for name in ("height", "width"):
        if fields[name] is None:
            raise click.UsageError(f"give --{name}")
    at = curves.places(over, start, end, step)
    workload = workload_from(fields)
    models = [load(name) for name in gpu or ("auto",)]
    metric = metric or best_metric(models[0])
    level = DEFAULT_LEVEL if level is None else level
    found = []
    for f in models:
        own = suited(f, workload)
        there = available(memory, f.card).memory_bytes if memory is not None or f.card is not None else None
        for text in ("", *variant):
            name = " ".join([f.name, *([f"dtype={own.dtype}"] if own != workload else []), *([text] if text else [])])
            asked = curves.changed(own, text)
            found.append(
                curves.curve(f, asked, over=over, at=at, metric=metric, level=level, name=name, memory_bytes=there)
            )
    result = curves.Curves(over, workload, metric, level, tuple(found))
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.table())
    if csv_file is not None:
        write(Output(csv_file, result.to_csv().encode(), curves.TABLE))
        click.echo(f"wrote {csv_file}", err=True)
    if out is not None:
        from sdfit.study.comparison.curve_figure import draw

        click.echo(f"wrote {draw(result, out)}", err=True)
