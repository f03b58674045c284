"""Curves over size, batch, tokens and steps, and the diagram of the pipeline."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import sdfit
from sdfit.backends.trace.tracer import Tracer
from sdfit.cli import main
from sdfit.errors import InvalidWorkload, SdfitError
from sdfit.predict.predictor import Predictor
from sdfit.study.comparison import curve_figure
from sdfit.study.comparison.curve import OVER, Curves, changed, curve, places
from sdfit.study.derivation.diagram import _decoder, _encoder, _unet, diagram, peak_bar, svg
from sdfit.study.derivation.explain import explain
from sdfit.workload import Workload

pytestmark = pytest.mark.filterwarnings("default::sdfit.errors.SimulatedModelWarning")
PLAIN = Workload(512, 512)


def over(f: Predictor, what: str, start: int, end: int, workload: Workload = PLAIN) -> Curves:
    at = places(what, start, end)
    one = curve(f, workload, over=what, at=at, metric="required", level=0.9, name="fake", memory_bytes=4 << 30)
    return Curves(what, workload, "required", 0.9, (one,))


@pytest.mark.parametrize(
    ("what", "start", "end", "fields"),
    [
        ("height", 256, 1024, ("height",)), ("width", 256, 1024, ("width",)), ("size", 256, 1024, ("height", "width")),
        ("batch", 1, 6, ("batch_size",)), ("tokens", 77, 231, ("prompt_length",)),
    ],
)  # fmt: skip
def test_each_point_is_what_f_says(f: Predictor, what: str, start: int, end: int, fields: tuple[str, ...]) -> None:
    """At every place the peak and the ends of its band are those of a single call."""
    (one,) = over(f, what, start, end).curves
    assert one.at[0] == start and one.at[-1] == end and OVER[what] == fields
    for at, peak, low, high in list(zip(one.at, one.peak_bytes, one.low_bytes, one.high_bytes, strict=True))[::7]:
        asked = {"height": 512, "width": 512} | dict.fromkeys(fields, at)
        told = f.predict_workload(Workload(**asked), metric="required", level=0.9)
        assert (peak, low, high) == pytest.approx((float(told), *told.interval), rel=1e-12)


def test_over_steps_it_is_flat_and_says_why(f: Predictor) -> None:
    """From 5 to 50 steps nothing changes; the note says what does below five."""
    found = over(f, "steps", 5, 50)
    assert len(set(found.curves[0].peak_bytes)) == 1 and "by nothing from five steps on" in found.table()


def test_the_table_the_csv_and_the_json_hold_the_same(f: Predictor) -> None:
    """Every point is in the CSV and in the JSON, in bytes; the table has the first and the last, and where memory ends."""
    found = over(f, "size", 256, 2048)
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    points = found.to_dict()["curves"][0]["points"]
    assert [(int(r["size"]), int(r["peak_bytes"])) for r in rows] == [(p["at"], p["peak_bytes"]) for p in points]
    end = found.curves[0].crosses_at
    assert end and f"up to size {end} stays within 4.000 GiB" in found.table()
    asked = f.verdict(end, end, memory="4 GiB", level=0.95)
    assert asked.answer == "fits" and found.table().splitlines()[1].startswith("256 ")


@pytest.mark.parametrize(
    ("what", "start", "end", "step", "words"),
    [
        ("depth", 1, 2, None, "it can over height, width, size, batch, tokens, steps"),
        ("height", 512, 512, None, "from must be below to"),
        ("height", 8, 512, None, "both from 64 to 16384"),
        ("batch", 1, 8, 0, "a step of 0 is no step"),
        ("height", 64, 16384, 1, "give one from 3 to 16320"),
    ],
)  # fmt: skip
def test_a_range_that_cannot_be_is_one_sentence(what: str, start: int, end: int, step: int | None, words: str) -> None:
    with pytest.raises(InvalidWorkload, match=words):
        places(what, start, end, step)


def test_variants_are_written_as_options() -> None:
    """Booleans and words; what is no option, or no value of one, is refused with what there is."""
    assert changed(PLAIN, "vae_tiling=True, offload=model") == Workload(512, 512, vae_tiling=True, offload="model")
    for text, words in (
        ("tiling=True", "there are dtype, attention"),
        ("vae_tiling=yes", "must be one of False, True"),
    ):
        with pytest.raises(SdfitError, match=words):
            changed(PLAIN, text)


def test_the_command_draws_several_variants(
    f: Predictor, fake_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Figure, CSV and JSON of one call; a band and a line for each curve."""
    out, table = tmp_path / "c.svg", tmp_path / "c.csv"
    call = ["curve", "--gpu", str(fake_model), "--over", "height", "--from", "256", "--to", "1024", "--width", "512"]
    call += ["--variant", "attention=eager", "--memory", "6GiB", "--csv", str(table), "--out", str(out), "--json"]
    assert main(call) == 0
    told = json.loads(capfd.readouterr().out)
    assert [c["name"] for c in told["curves"]] == ["fake", "fake attention=eager"] and len(
        told["curves"][0]["points"]
    ) == 97
    assert table.read_text().startswith("curve,height,peak_bytes") and "<svg" in out.read_text()
    assert curve_figure.draw(over(f, "batch", 1, 4), tmp_path / "b.png").stat().st_size > 10_000
    assert main(["curve", "--gpu", str(fake_model), "--over", "batch", "--from", "1", "--to", "4"]) == 2


@pytest.mark.filterwarnings("ignore::sdfit.errors.SimulatedModelWarning")
def test_a_curve_of_what_was_never_swept_says_that_it_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the equation's curves; in the notes and, for each curve, in JSON."""
    line = ["curve", "--gpu", "t4", "--over", "batch", "--from", "1", "--to", "2", "--height", "256", "--width", "256"]
    line += ["--variant", "dtype=float32,attention=sliced_2"]
    assert main(line) == 0
    assert "by the equation, but t4 dtype=float32,attention=sliced_2 simulated run by run" in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["curves"]
    assert [one["simulated"] for one in found] == [False, True]


# -- the diagram --


@pytest.mark.parametrize("options", [{}, {"attention": "eager"}, {"vae": "tiny"}, {"offload": "sequential"}], ids=str)
def test_the_diagram_shows_where_the_peak_is(options: dict[str, str], tmp_path: Path) -> None:
    """One level or block, and one stage, in the colour of the peak; channels and compression of every level; valid XML."""
    told = explain(Workload(768, 512, **options), tracer=Tracer())
    text = svg(told)
    root = ElementTree.fromstring(text)
    words = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("peak") == 1 and f"{told.operation} in {told.path}" in " ".join(words)
    assert {"320", "640", "1280", "1/64", "1/8"} <= set(words) and f"{859_520_964:,} parameters" in words
    assert diagram(told, tmp_path / "d.svg").read_text() == text
    with pytest.raises(SdfitError, match=r"ends in \.svg"):
        diagram(told, tmp_path / "d.png")


def test_levels_are_those_of_the_settings() -> None:
    """A module's path leads to its level; the UNet goes down to 1/64 and up again, the VAE to 1/8."""
    assert [b.divided for b in _unet()] == [8, 16, 32, 64, 64, 64, 32, 16, 8]
    assert [b.channels for b in _encoder()] == [128, 256, 512, 512, 512] and [b.divided for b in _decoder()] == [
        8,
        8,
        4,
        2,
        1,
    ]
    assert peak_bar("unet.up_blocks.3.attentions.0", "unet", _unet()) == 8
    assert peak_bar("vae.decoder.conv_norm_out", "vae.decoder", _decoder()) == 4


@pytest.mark.filterwarnings("ignore::sdfit.errors.SimulatedModelWarning")
def test_a_curve_has_the_numbers_that_its_runs_get_where_the_equation_knows_none_of_their_kind() -> None:
    """Slices of the VAE under model offload require a quarter more than the equation says; what is usual stays its own."""
    f = sdfit.load("t4")
    for options, simulated in (({"vae_slicing": True, "offload": "model"}, True), ({}, False)):
        w = Workload(1024, 1024, **options)  # type: ignore[arg-type]
        found = curve(f, w, over="batch", at=(2, 3), metric="required", level=0.99, name="t4", memory_bytes=None)
        alone = f.predict_workload(replace(w, batch_size=2), metric="required", level=0.99)
        assert found.simulated is simulated and (found.peak_bytes[0] == alone) is simulated
        assert not simulated or found.high_bytes[0] == alone.interval.high
