"""Commands on pictures: check, validate."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import click

from sdfit.cli.options import (
    FILE,
    backend_option,
    example,
    gpu_option,
    json_option,
    level_option,
    memory_option,
    note,
    out_option,
    replay_option,
    suited_fields,
    workload_options,
    wrongly,
)
from sdfit.units import aligned, format_bytes, percent

pictures_argument = click.argument("paths", nargs=-1, required=True, type=FILE, metavar="IMAGES...")
csv_option = click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values, amounts in bytes.")


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    """The workload's fields without its size, which the pictures have."""
    for name in ("height", "width"):
        if fields.pop(name) is not None:
            raise click.UsageError(f"--{name} is what the pictures say; leave it out")
    return fields


def _shown(rows: list[dict[str, Any]], head: tuple[str, ...], lines: list[tuple[str, ...]], kind: str) -> None:
    if kind == "json":
        click.echo(json.dumps(rows, indent=2))
    elif kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        click.echo(text.getvalue(), nl=False)
    else:
        click.echo(aligned([head, *lines], left=2))


@click.command(epilog=example("sdfit check --gpu t4 photo.jpg", "sdfit check --gpu rtx3060 --prompt 'a cat' photos"))
@pictures_argument
@gpu_option
@memory_option
@workload_options
@level_option
@replay_option
@json_option
@csv_option
def check(
    paths: tuple[Path, ...],
    gpu: str,
    memory: str | None,
    level: float | None,
    replay: bool,
    as_json: bool,
    as_csv: bool,
    **fields: Any,
) -> int:
    """Say of pictures, or folders of them, which fit; exit code 3 if one does not. Only their headers are read.

    A picture is taken as diffusers' load_image gives it: its first frame, turned as its EXIF says, as RGB.
    """
    from sdfit.predict import pictures
    from sdfit.predict.library import load
    from sdfit.predict.memory import available

    options, f = _options(fields), load(gpu)
    options = suited_fields(f, options)
    if not replay:
        f = f.equation
    there = available(memory, f.card)
    found = map(pictures.look, pictures.find(paths))
    answers = pictures.check(f, found, memory=there.memory_bytes, level=level, **options)
    lines: list[tuple[str, ...]] = []
    for answer in answers:
        p, v = answer.picture, answer.verdict
        size = f"{p.height}x{p.width}" if p.height else "-"
        chance = ""
        if v and v.slower:
            chance = " with slower kernels"
        elif v and v.answer == "may fit" and v.chance is not None:
            chance = f", {100 * v.chance:.0f} %"
        said = f"{v.answer}{chance}" if v else p.problem
        most = f"{answer.largest[0]}x{answer.largest[1]}" if answer.largest else "-"
        lines.append(
            (
                str(p.path),
                said + (f" ({p.remark})" if p.remark else ""),
                size,
                format_bytes(v.prediction) if v else "-",
                most,
            )
        )
    kind = "json" if as_json else "csv" if as_csv else "text"
    head = ("image", "verdict", "resolution", "required", "largest that fits")
    _shown([answer.to_dict() for answer in answers], head, lines, kind)
    if kind == "text":
        taken = "pictures: as diffusers' load_image gives them: first frame, turned, RGB"
        quick = "required: simulated where the verdict hangs on it, else the equation's; sdfit fits simulates a size"
        whose = [quick] * (f is not f.equation)
        click.echo("\n".join([f"memory: {there.words}", taken, *whose, *wrongly(f, options["dtype"])]))
    return 3 if any(a.verdict is None or a.verdict.answer == "does not fit" for a in answers) else 0


@click.command(epilog=example("sdfit validate --gpu t4 --backend trace --memory 8GiB --out pairs.jsonl photo.jpg"))
@pictures_argument
@gpu_option
@memory_option
@backend_option
@out_option
@workload_options
@level_option
@json_option
@csv_option
def validate(
    paths: tuple[Path, ...],
    gpu: str,
    memory: str | None,
    backend: str,
    out: Path | None,
    level: float | None,
    as_json: bool,
    as_csv: bool,
    **fields: Any,
) -> int:
    """Run pictures and compare what they took with what was predicted; the pairs are records that `sdfit fit` takes."""
    from sdfit.backends import open_backend
    from sdfit.judging.validate import validate as run
    from sdfit.predict import pictures
    from sdfit.predict.library import load
    from sdfit.predict.memory import available
    from sdfit.predict.predictor import DEFAULT_LEVEL

    options, f = _options(fields), load(gpu)
    options = suited_fields(f, options)
    there = available(memory, f.card)
    found = [pictures.look(path) for path in pictures.find(paths)]
    name = f.card.slug if f.card else f.name
    made = open_backend(backend, {"gpu": name} | ({"workspaces": True} if backend == "trace" else {}))
    path = out or Path("data", name, f"pictures-{backend}.jsonl")
    pairs = list(run(f, made, found, path, memory=there.memory_bytes, level=level or DEFAULT_LEVEL, **options))
    lines = [
        (
            str(pair.picture.path),
            pair.reason or pair.outcome,
            f"{pair.picture.height}x{pair.picture.width}" if pair.picture.height else "-",
            *(format_bytes(v) if v is not None else "-" for v in (pair.estimated_bytes, pair.actual_bytes)),
            percent(pair.error, 3) if pair.error is not None else "-",
            {None: "-", True: "yes", False: "no"}[pair.inside],
            format_bytes(pair.device_bytes) if pair.device_bytes is not None else "-",
        )
        for pair in pairs
    ]
    kind = "json" if as_json else "csv" if as_csv else "text"
    actual = "actual" if backend == "cuda" else "actual (SIMULATED)"
    head = ("image", "outcome", "resolution", "estimated", actual, "error", "inside the interval", "driver shows")
    _shown([pair.to_dict() for pair in pairs], head, lines, kind)
    if kind == "text":
        click.echo(f"memory: {there.words}")
    if backend != "cuda":
        note("these runs are simulated: nothing was measured")
    click.echo(f"wrote {path}", err=True)
    return 3 if any(pair.outcome != "ok" for pair in pairs) else 0
