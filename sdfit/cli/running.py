"""Commands that make a model: sweep, fit, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sdfit.cli.options import example, json_option, note, out_option, records_argument
from sdfit.errors import SdfitError
from sdfit.units import parse_duration
from sdfit.workload import CARD_ALONE

MOST_FINDINGS = 12
"""Findings of the fit's own judgement that are printed, the gravest first."""


@click.command(
    epilog=example(
        "sdfit sweep --gpu t4 --backend trace --grid quick --dry-run",
        "sdfit sweep --gpu mine --backend fake --grid quick",
    )
)
@click.option("--gpu", default="auto", show_default=True, help="The card, as in 't4'; auto takes what is there.")
@click.option("--grid", default="default", show_default=True, help="Name of a grid, as in quick, or a .toml file.")
@click.option("--backend", type=click.Choice(["cuda", "trace", "fake"]), default="cuda", show_default=True)
@out_option
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", default=None, help="Of a Ray cluster to join, as auto or 10.0.0.1:6379.")
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes; one per card or processor.")
@click.option("--devices", default=None, help="Cards of this machine, as 0,1: a process each; left out, all.")
@click.option("--budget", default=None, help="Start nothing new after this time, for example 5m.")
@click.option("--weights", default="architecture", show_default=True, help="architecture, a folder, or a Hub id.")
@click.option("--workspaces/--no-workspaces", default=True, help="Trace: add the kernel workspaces known for the card.")
@click.option("--kernels", default=None, help="Trace: another card's workspaces, or a file of sdfit calibrate (.json).")
@click.option(
    "--history",
    is_flag=True,
    help="Record the allocations of the first workloads of each variant, for sdfit calibrate.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
def sweep(
    gpu: str,
    grid: str,
    backend: str,
    out: Path | None,
    engine: str,
    address: str | None,
    workers: int | None,
    devices: str | None,
    budget: str | None,
    weights: str,
    workspaces: bool,
    kernels: str | None,
    history: bool,
    dry_run: bool,
) -> None:
    """Run a grid on a card and record the peaks."""
    from sdfit.backends.history import worth_recording
    from sdfit.cli.progress import Reporter
    from sdfit.sweep import grid as grids
    from sdfit.sweep.run import sweep as run
    from sdfit.sweep.workers import cards_named, default_workers

    plan = grids.load(grid)
    if dry_run:
        click.echo(plan.summary())
        return
    options: dict[str, Any] = {"gpu": gpu}
    if address is not None and engine != "ray":
        raise click.UsageError(f"--address is '{address}', of a Ray cluster; add --engine ray")
    if devices is not None and (engine != "local" or backend == "trace" or workers is not None):
        raise click.UsageError(
            f"--devices is '{devices}', a process for each card of this machine; leave out --engine, --workers and trace"
        )
    if backend == "cuda":
        options["weights"] = weights
    elif weights != "architecture":
        raise click.UsageError(f"--weights is '{weights}'; the backend {backend} loads none, leave it out")
    if history and backend != "cuda":
        raise click.UsageError("--history records what a card's allocator does; leave it out, or type --backend cuda")
    if kernels and backend != "trace":
        raise click.UsageError("--kernels is for --backend trace: a card brings its own kernels")
    if backend == "trace":
        options |= {"workspaces": workspaces} | ({"kernels": kernels} if kernels else {})
        whole, plan = plan, plan.for_the_trace()
        if len(plan.workloads) < len(whole.workloads):
            note(f"{len(whole.workloads) - len(plan.workloads)} of {len(whole.workloads)} runs left out: {CARD_ALONE}")
        if workspaces and gpu != "auto" and not kernels:
            from sdfit.backends.trace.workspaces import workspaces_for

            try:
                workspaces_for(gpu)
            except SdfitError as error:
                note(f"{error}; this trace has none")
    with Reporter(f"{gpu} {plan.name}", len(plan.workloads)) as reporter:
        outcome = run(
            plan,
            backend,
            options,
            out,
            engine=engine,
            workers=workers,
            devices=cards_named(devices, default_workers(backend)) if devices else (),
            address=address,
            budget_s=parse_duration(budget) if budget else None,
            histories=worth_recording(plan.workloads) if history else (),
            report=reporter,
        )
    for words in outcome.notes:
        note(words)
    click.echo(
        f"{outcome.done} of {outcome.total} done, {outcome.oom} out of memory, {outcome.crashed} crashed, "
        f"{outcome.skipped} were there already",
        err=True,
    )
    if not outcome.complete:
        click.echo("not complete: run the same command to go on", err=True)
    for path in outcome.paths:
        click.echo(path)


@click.command(epilog=example("sdfit fit"))
@records_argument
@click.option("--gpu", default=None, help="Fit only this card's records under ./data.")
@out_option
@json_option
def fit(files: tuple[Path, ...], gpu: str | None, out: Path | None, as_json: bool) -> None:
    """Fit the equation to records; without files, to all that was swept under ./data."""
    from sdfit.fit.card import coefficients, fit_summary
    from sdfit.fit.files import fit_files, swept_files
    from sdfit.judging.judge import judge
    from sdfit.study.comparison import residuals

    jobs = {gpu or "": list(files)} if files else swept_files(Path("data"), gpu)
    if out is not None and len(jobs) > 1:
        raise click.UsageError(f"--out is one file and there are records of {', '.join(jobs)}; choose one with --gpu")
    published = residuals.read()
    for name, paths in jobs.items():
        result = fit_files(paths, name or None, out, published)
        for words in result.notes:
            note(words)
        if as_json:
            found = {"evaluation": result.artifact.evaluation, "coefficients": coefficients(result.artifact)}
            click.echo(json.dumps(found, indent=2))
        else:
            click.echo(fit_summary(result.artifact))
        findings = judge(result.records, result.artifact)
        for f in findings[:MOST_FINDINGS]:
            click.echo(f"judged: {f.severity}: {f.where}: {f.message}", err=True)
        if len(findings) > MOST_FINDINGS:
            click.echo(f"judged: {len(findings) - MOST_FINDINGS} more findings of less weight", err=True)
        click.echo(f"wrote {result.path} and {result.path.with_suffix('.md').name}", err=True)


@click.command(epilog=example("sdfit demo"))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"), show_default=True, help="A folder."
)
def demo(out: Path) -> None:
    """Sweep a small grid, fit it, and compare with runs that it never saw."""
    from sdfit.cli.demo import run_demo

    click.echo(run_demo(out))
