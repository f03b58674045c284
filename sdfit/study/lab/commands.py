"""The makers' command line, ``python -m sdfit.study.lab``: what no user needs. Each command parses, calls and prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import click

from sdfit.backends.environment import a_card_is_there, quiet_libraries
from sdfit.errors import GridError, listed, run_command
from sdfit.files import Kind, Output, shipped, write
from sdfit.units import parse_bytes, parse_duration

gpu_option = click.option(
    "--gpu", default="auto", show_default=True, help="The card, as in h200; auto takes what is there."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def lab() -> None:
    """What sdfit's makers run: a card's campaign, its proofs, kernels one by one, published rows traced and replayed."""


@lab.command()
@gpu_option
@click.option(
    "--backend",
    type=click.Choice(["cuda", "trace", "fake"]),
    default="cuda",
    show_default=True,
    help="What runs it: a card, a trace, or a made-up card.",
)
@click.option(
    "--folder", type=click.Path(path_type=Path), required=True, help="Where records are, and go; it names the model."
)
@click.option("--budget", default="9m", show_default=True, help="Begin nothing new after this time.")
@click.option("--parts", default=None, help="Names with commas between; without it all.")
@click.option("--take", type=click.IntRange(1), default=None, help="Only so many workloads of each grid: a rehearsal.")
@dry_run_option
def campaign(
    gpu: str, backend: str, folder: Path, budget: str, parts: str | None, take: int | None, dry_run: bool
) -> None:
    """Do all that a card is needed for, as far as the time goes; the same command goes on where it was."""
    from sdfit.study.lab import tables
    from sdfit.study.lab.campaign import PARTS, Campaign, run
    from sdfit.study.lab.campaign import dry_run as plan

    wanted = [p for p in parts.split(",") if p] if parts is not None else list(PARTS)
    for part in wanted:
        if part not in PARTS:
            raise GridError(f"there is no part '{part}'; there are: {listed(PARTS)}", given=part)
    one = Campaign(backend, gpu, folder, parse_duration(budget), take)
    if dry_run:
        click.echo(f"{plan(one, wanted)}\n\n{tables.state(one)}")
        return
    run(one, wanted)
    click.echo(tables.tables(one))
    if one.failed:
        click.get_current_context().exit(1)


@lab.command()
@click.argument("device", type=click.Choice(["cuda", "cpu"]))
def kernels(device: str) -> None:
    """Print which attention kernel runs for each head size, as JSON."""
    from sdfit.study.lab.proofs import attention_kernels

    click.echo(json.dumps(attention_kernels(device)))


@lab.command()
@click.argument("records", type=click.Path(path_type=Path))
@click.option("--kernels", default=None, help="A card whose workspaces the trace adds; otherwise the bare trace.")
@click.option(
    "--take", type=click.IntRange(1), default=60, show_default=True, help="So many workloads, spread over the file."
)
def beside(records: Path, kernels: str | None, take: int) -> None:
    """Set the trace beside recorded peaks, stage by stage: what is left over belongs to kernels."""
    from sdfit.backends.trace.tracer import Tracer
    from sdfit.predict.simulation.workspaces import workspaces_for
    from sdfit.records import read
    from sdfit.study.lab import beside as module

    file = read(records)
    step = max(len(file.records) // take, 1)
    tracer = Tracer(workspaces_for(kernels) if kernels else None)
    click.echo(f"{records}: {file.environment.get('gpu')}, backend {file.environment.get('backend')}; trace: simulated")
    click.echo(module.table(module.beside(file.records[::step], tracer)))


@lab.command()
@gpu_option
@click.option("--out", type=click.Path(path_type=Path), default=None, help="The file to write, or to go on with.")
@dry_run_option
def operators(gpu: str, out: Path | None, dry_run: bool) -> None:
    """Measure on a card what the kernels of the pipeline's operators hold, one by one."""
    if not dry_run:
        a_card_is_there(gpu)
    from sdfit.backends.counters import CudaCounters
    from sdfit.study.lab import operators as module

    wanted = module.operators_of(module.WORKLOADS)
    if dry_run:
        click.echo(f"{len(wanted)} operators of {len(module.WORKLOADS)} workloads")
        return
    counters = CudaCounters(gpu)
    path = out or Path("data", str(counters.facts()["name"]), f"{date.today().isoformat()}-operators.jsonl")
    click.echo(module.table(module.sweep_operators(wanted, counters, path)))
    click.echo(f"wrote {path}", err=True)


@lab.command()
@click.option("--out", type=click.Path(path_type=Path), default=None, help="The file to write; the shipped one.")
def published(out: Path | None) -> None:
    """Trace every published row of allocated memory and write the residuals; takes about a minute."""
    from sdfit.study.comparison.residuals import FILE
    from sdfit.study.lab import published as module

    path = out or shipped("data/published") / FILE
    module.write(module.trace_all(), path)
    click.echo(path)


@lab.command()
def reserved() -> None:
    """Replay every published row of reserved memory and print it beside the replay."""
    from sdfit.study.lab import reserved as module

    click.echo(module.table(module.replay_all()))


@lab.command()
def snapshots() -> None:
    """Replay what real cards' allocators did, as others recorded it, and print the model's blocks beside theirs."""
    from sdfit.study.lab import snapshots as module

    click.echo(module.table())


@lab.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("build/matrix"), show_default=True, help="For installs."
)
@click.option(
    "--part", type=click.Choice(["wheel", "oldest", "diffusers", "installs"]), multiple=True, help="Left out: all."
)
@click.option("--release", multiple=True, help="Of diffusers; left out: each since 0.32.")
@click.option("--install", multiple=True, help="A whole install by its name; left out: all.")
def matrix(folder: Path, part: tuple[str, ...], release: tuple[str, ...], install: tuple[str, ...]) -> None:
    """Predict and trace under other Pythons and releases, and print where memory differs; fetches gigabytes."""
    from sdfit.study.lab import matrix as module

    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    if not part or "wheel" in part:
        rows += module.wheels(folder)
    if not part or "oldest" in part:
        rows += module.oldest(folder)
    for name in install:
        if name not in module.FULL:
            raise click.BadParameter(f"'{name}'; there are: {listed(module.FULL)}", param_hint="--install")
    parts = {
        "diffusers": module.diffusers(folder, release or module.DIFFUSERS),
        "installs": module.installs(folder, install or tuple(module.FULL)),
    }
    for name, traced in parts.items():
        if part and name not in part:
            continue
        for row in traced:
            click.echo("  ".join(row), err=True)
            rows.append(row)
    click.echo(module.table(rows))


@lab.command()
@click.option(
    "--take",
    type=click.IntRange(2),
    default=40,
    show_default=True,
    help="Runs of each sweep; of the trace three times as many.",
)
@click.option("--part", type=click.Choice(["scaling", "trace", "driver", "lost"]), multiple=True, help="Left out: all.")
def engines(take: int, part: tuple[str, ...]) -> None:
    """Measure what a sweep's engines cost: scaling, that of the trace, the driver's work for a row, a machine that is lost."""
    from sdfit.study.lab import engines as module

    if not part or "scaling" in part:
        for engine in ("local", "ray"):
            click.echo(module.scaling(take, (engine,)))
    if not part or "trace" in part:
        for engine in ("local", "ray"):
            click.echo(module.tracing(3 * take, (engine,)))
    if not part or "driver" in part:
        click.echo(module.driver())
    if not part or "lost" in part:
        click.echo(module.lost_machine(take))


@lab.command()
@click.option(
    "--memory", default="14GiB", show_default=True, help="Of every card: larger workloads are not asked about."
)
@click.option("--cache", type=click.Path(path_type=Path), default=None, help="A file to keep the traces in.")
@click.option(
    "--card",
    "cards",
    multiple=True,
    help="One of them, as 'larger plan', sm61 or 'drawn 205'; again for more. Left out: all.",
)
@click.option("--brief", is_flag=True, help="Sixteen planned runs alone, and the whole grid.")
@click.option("--figure", type=click.Path(path_type=Path), default=None, help="Draw the errors (.png).")
@click.option("--json", "as_json", is_flag=True, help="Plain values, errors as fractions.")
def few(
    memory: str, cache: Path | None, cards: tuple[str, ...], brief: bool, figure: Path | None, as_json: bool
) -> None:
    """Hold few runs against made-up and traced cards, beside random runs and the whole grid; takes minutes."""
    from sdfit.study.lab import few as module

    if brief and figure is not None:
        raise click.UsageError("--figure is of runs of all numbers: leave --brief out")
    counts, draws = ((module.WANTED,), 0) if brief else (module.COUNTS, module.DRAWS)
    lines = module.study(parse_bytes(memory), cache, lambda name: click.echo(name, err=True), counts, draws, cards)
    click.echo(json.dumps(module.to_dict(lines), indent=2) if as_json else module.table(lines))
    if figure is not None:
        click.echo(f"wrote {module.draw(lines, figure)}", err=True)


@lab.command()
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Left out: where the package reads them.")
def programs(out: Path | None) -> None:
    """Find the programs of the pipeline's modules from diffusers' own, and write them down; half a minute."""
    from sdfit.predict.simulation.library import FILE
    from sdfit.study.lab import programs as module

    path, content = out or FILE, module.library().to_bytes()
    write(Output(path, content, Kind("library", (".npz",), b"steps_ends.npy")))
    click.echo(f"wrote {path}: {len(content)} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the makers' command line; returns the exit code."""
    quiet_libraries()
    return run_command(lab, arguments, "python -m sdfit.study.lab")
