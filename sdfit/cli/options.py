"""Options that several commands share, and how they become a Workload."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from sdfit.errors import QUIET, SdfitError, listed, quiet
from sdfit.units import format_bytes
from sdfit.workload import CHOICES, CHUNK_TOKENS, NOT_QUANTISED, QUANTISED, Workload

if TYPE_CHECKING:
    from sdfit.predict.predictor import Predictor

F = TypeVar("F", bound=Callable[..., Any])


class _Kinds(click.Choice):  # type: ignore[type-arg]
    """The values of an option; what people ask for and none of them is, is refused with the reason."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        if param is not None and param.name == "dtype" and value in QUANTISED:
            self.fail(f"{value!r} is not one of {listed(self.choices)}; {NOT_QUANTISED}", param, ctx)
        return super().convert(value, param, ctx)


def workload_options(command: F) -> F:
    """Add the options that make up a Workload."""
    for name in reversed(CHOICES):
        flag = "--" + name.replace("_", "-")
        options = CHOICES[name]
        if isinstance(options[0], bool):
            negative = "--no-" + name.replace("_", "-")
            command = click.option(
                f"{flag}/{negative}", name, default=options[0], show_default=True, help=_CHOICES[name]
            )(command)
        else:
            kind = _Kinds([str(o) for o in options])
            command = click.option(flag, name, type=kind, default=options[0], show_default=True, help=_CHOICES[name])(
                command
            )
    command = click.option(
        "--prompt", expose_value=False, help="Any text costs the same: it is padded and cut to 77 tokens."
    )(command)
    for flag, kind, default, text in reversed(_NUMBERS):
        command = click.option(flag, type=kind, default=default, show_default=default is not None, help=text)(command)
    return command


_NUMBERS: tuple[tuple[str, Any, Any, str], ...] = (
    ("--height", int, None, "Of the input image, in pixels."),
    ("--width", int, None, "Of the input image, in pixels."),
    ("--prompt-length", int, CHUNK_TOKENS, "Tokens; up to 77 cost the same, more means prompt_embeds."),
    ("--batch-size", int, 1, "Images per call."),
    ("--guidance-scale", float, 7.5, "Above 1 doubles the UNet's batch."),
)
_CHOICES = {
    "dtype": "Of weights and activations; where none is named and the card computes float16 wrongly (GTX 16), float32.",
    "attention": "sdpa is fused, PyTorch's default; the others hold the scores: all, or those of some heads.",
    "vae": "kl is the checkpoint's own, tiny is TAESD.",
    "vae_slicing": "Decode one image at a time.",
    "vae_tiling": "Decode in tiles where the image is larger than one.",
    "offload": "Weights wait on the host: by component (model), or by module or block.",
    "safety_checker": "Whether it is loaded.",
    "execution": "How the UNet is run. int8: linear layers by optimum-quanto. What the others but the default take is known only where a card was swept so.",
}
"""What each discrete field of a Workload means."""


def names_of_cards(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """Complete what was begun of a card or a model, for the shell."""
    from sdfit.predict.cards import table
    from sdfit.predict.library import available

    names = {"auto", *available(), *(card.slug for card in table())}
    return sorted(name for name in names if name.startswith(begun.lower()))


def names_of_grids(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """Complete what was begun of a grid's name, for the shell."""
    from sdfit.sweep.grid import names

    return [name for name in names() if name.startswith(begun)]


gpu_option = click.option(
    "--gpu",
    default="auto",
    show_default=True,
    shell_complete=names_of_cards,
    help="A card (sdfit cards), a model (sdfit models) or a path; auto: the card here.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["cuda", "trace", "fake"]),
    default="cuda",
    show_default=True,
    help="cuda measures; trace simulates a card; fake is a made-up one.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Plain values, amounts in bytes.")
level_option = click.option("--level", type=float, default=None, help="Of intervals and bounds, between 0 and 1.")
memory_option = click.option(
    "--memory", default=None, help="What PyTorch may take, as 15GiB, or free; left out: what the card leaves."
)
replay_option = click.option(
    "--replay/--no-replay",
    default=True,
    show_default=True,
    help="Required memory by simulating the run, where that can be; else by the equation alone.",
)
FILE = click.Path(path_type=Path, readable=False)
"""A path that is an option or an argument: who reads or writes it says what is wrong with it."""
out_option = click.option("--out", type=FILE, default=None, help="The file to write.")
records_argument = click.argument("files", nargs=-1, type=FILE, metavar="[RECORDS]...")


def quiet_option() -> click.Option:
    """``--quiet`` of every command: no notes, errors only; the same as SDFIT_QUIET=1."""

    def silence(_: click.Context, __: click.Parameter, value: bool) -> None:
        if value:
            os.environ[QUIET] = "1"

    return click.Option(
        ["-q", "--quiet"], is_flag=True, expose_value=False, callback=silence, help=f"No notes; also {QUIET}=1."
    )


def note(text: str) -> None:
    """Say something beside the answer, on stderr, unless quiet was asked for."""
    if not quiet():
        click.echo(f"note: {text}", err=True)


def example(*commands: str) -> str:
    """The end of a command's help: commands that work as they stand; a test runs them."""
    return "\b\n" + "\n".join(["Examples:", *(f"  {command}" for command in commands)])


def amount(value: float) -> str:
    """A bound as text; one that the scores cannot support is unknown."""
    return format_bytes(value) if value != float("inf") else "unknown (too few scores for this level)"


def workload_from(fields: dict[str, Any], image: Path | None = None) -> Workload:
    """Make a Workload of a command's options, its size from a picture where one is given."""
    if image is not None:
        from sdfit.predict.pictures import look

        picture = look(image)
        if picture.problem:
            raise SdfitError(f"cannot read a picture from '{image}': {picture.problem}")
        fields |= {"width": picture.width, "height": picture.height}
    for name in ("height", "width"):
        if fields.get(name) is None:
            raise click.UsageError(f"give --{name}" + (", or --image" if image is None else ""))
    return Workload.from_dict(fields)


def suited(f: Predictor, workload: Workload) -> Workload:
    """A run as its card takes it: in float32 where it computes float16 wrongly and no dtype was asked for."""
    return replace(workload, dtype="float32") if _in_float32(f) else workload


def suited_fields(f: Predictor, fields: dict[str, Any]) -> dict[str, Any]:
    """The same of a run's fields."""
    return fields | {"dtype": "float32"} if _in_float32(f) else fields


def _in_float32(f: Predictor) -> bool:
    return f.wrong_half and click.get_current_context().get_parameter_source("dtype") is ParameterSource.DEFAULT


def wrongly(f: Predictor, dtype: str) -> list[str]:
    """That the card computes float16 wrongly, if it does: a line of the answer, since notes may be silenced."""
    from sdfit.predict.predictor import WRONG_HALF

    if _in_float32(f):
        return ["in float32, since this card computes float16 wrongly (black images)"]
    return [WRONG_HALF] if f.wrong_half and dtype == "float16" else []
