"""Comparing systems on runs whose peaks are known, and reading the published rows."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from sdfit.errors import InvalidWorkload, RecordsError, SdfitError, UnknownModel
from sdfit.study.comparison import published
from sdfit.study.comparison.cases import Case, published_cases
from sdfit.study.comparison.compare import compare
from sdfit.study.comparison.figure import draw
from sdfit.study.comparison.peers import PEERS, Peer
from sdfit.workload import Workload

W = Workload(512, 512)
# a system that says 100 to everything: with actual peaks of 50, 80, 100, 200 every number is plain to see
HUNDRED = Peer("hundred", "Hundred", lambda w: 100, lambda w: True, "all", "everything", "this test")
CASES = [Case("a", W, 50), Case("b", W, 80), Case("c", W, 100), Case("d", W, 200)]


def test_counts_on_a_list_whose_answer_is_obvious():
    """100 B against 50, 80, 100, 200: errors +1, +1/4, 0, -1/2; one run dies, the others waste 5/12 on average."""
    (line,) = compare(CASES, [HUNDRED]).summary
    assert (line.cases, line.skipped, line.out_of_memory) == (4, 0, 1)
    assert line.median_error == pytest.approx(0.125)
    assert line.median_absolute_error == pytest.approx(0.375)
    assert (line.worst_error, line.worst_label) == (1.0, "a")
    assert line.over_reserved == pytest.approx((1 + 0.25 + 0) / 3)
    assert line.over_reserved_bytes == round((50 + 20 + 0) / 3)


def test_a_prediction_equal_to_the_peak_fits():
    """A cap at exactly the peak is no death."""
    assert not any(row.out_of_memory for row in compare([Case("c", W, 100)], [HUNDRED]).rows)


def test_a_system_that_always_kills_reserves_nothing():
    """Without a survivor there is no over-reservation to average, and the table says so."""
    result = compare([Case("d", W, 200)], [HUNDRED])
    assert result.summary[0].over_reserved is None
    assert result.summary[0].over_reserved_bytes is None
    assert result.table().splitlines()[2].endswith("-")


def test_cases_without_a_formula_are_skipped_and_counted():
    """A system that has no formula for a case is neither right nor wrong about it."""
    narrow = Peer("narrow", "Narrow", lambda w: 100, lambda w: w.batch_size == 1, "batch 1", "", "this test")
    cases = [Case("one", W, 100), Case("two", Workload(512, 512, batch_size=2), 100)]
    (line,) = compare(cases, [narrow]).summary
    assert (line.cases, line.skipped) == (1, 1)


def test_sdfits_own_numbers_stand_first_where_cases_carry_them():
    """The estimate and the upper bound come from the case, and only cases that have them count."""
    cases = [Case("a", W, 3_000_000_000, predicted_bytes=2_990_000_000, upper_bytes=3_030_000_000), Case("b", W, 10**9)]
    result = compare(cases)
    own, upper = result.summary[:2]
    assert [own.system, upper.system] == ["sdfit", "sdfit_upper"]
    assert (own.cases, own.out_of_memory, own.skipped) == (1, 1, 1)
    assert (upper.cases, upper.out_of_memory) == (1, 0)
    assert upper.over_reserved == pytest.approx(0.01)


def test_systems_can_be_chosen_by_name():
    """Only the systems asked for answer, in the order asked."""
    result = compare(published_cases(), ["invokeai", "comfyui"])
    assert [line.system for line in result.summary] == ["invokeai", "comfyui"]


def test_to_dict_is_json_of_plain_bytes():
    """What is written as JSON comes back equal, with whole bytes."""
    plain = compare(CASES, [HUNDRED]).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [case["actual_bytes"] for case in plain["cases"]] == [50, 80, 100, 200]
    assert plain["cases"][0]["workload"] == W.to_dict()
    assert plain["rows"][0] == {
        "system": "hundred",
        "label": "a",
        "predicted_bytes": 100,
        "actual_bytes": 50,
        "error": 1.0,
        "out_of_memory": False,
    }
    assert plain["summary"][0]["over_reserved_bytes"] == 23


def test_tables_have_a_line_for_each_system_and_case():
    """The summary has a line per system between its heading and its legend, the other table a line per case, of one width."""
    result = compare(published_cases())
    assert len(result.summary) + len(result.few) == len(PEERS) and result.few == {"split attention (A1111)": 3}
    heading, *lines, left_out, legend = result.table().splitlines()
    assert heading.startswith("32 of 35 cases, for which all of these have a formula") and legend.startswith(
        "out of memory: "
    )
    assert left_out == "left out: split attention (A1111), with a formula for 3 of the cases"
    for rows, count in ((lines, len(result.summary)), (result.cases_table().splitlines(), 35)):
        assert len(rows) == 1 + count and len({len(row) for row in rows}) == 1


def test_all_systems_are_summed_up_over_the_same_cases():
    """One that has no formula for a case takes it from the others too; the cases that are left are named."""
    narrow = Peer("narrow", "Narrow", lambda w: 100, lambda w: w.batch_size == 1, "batch 1", "", "this test")
    cases = [Case("one", W, 100), Case("two", Workload(512, 512, batch_size=2), 100)]
    result = compare(cases, [narrow, HUNDRED])
    assert result.common == ("one",) and [line.cases for line in result.summary] == [1, 1]
    assert len(result.rows) == 3


@pytest.mark.parametrize(("source", "words"), [("simulated", "SIMULATED"), ("published", "published measurements")])
def test_a_comparison_says_what_its_truth_is(source, words):
    """On the table, and a simulated one on the figure too."""
    result = compare(CASES, [HUNDRED], source=source)
    assert words in result.table().splitlines()[0]


def test_results_are_frozen():
    """A comparison cannot be edited after the fact."""
    result = compare(CASES, [HUNDRED])
    with pytest.raises(FrozenInstanceError):
        result.rows = ()


def test_figure_writes_a_png(tmp_path):
    """A figure of every system is a PNG of at least 1000 pixels' width."""
    path = draw(compare(published_cases()), tmp_path / "compare.png")
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(head[16:20], "big") >= 1000


def test_a_figure_that_cannot_be_written_says_so(tmp_path):
    """An ending that names no format gives one sentence that names the file."""
    with pytest.raises(SdfitError, match=r"compare\.nothing"):
        draw(compare(CASES, [HUNDRED]), tmp_path / "compare.nothing")


def test_nothing_to_compare_is_an_error():
    """No case, two cases of one name, or a system that has no formula for any case: each in one sentence."""
    with pytest.raises(RecordsError, match="no case"):
        compare([])
    with pytest.raises(RecordsError, match="'a'"):
        compare([CASES[0], CASES[0]], [HUNDRED])
    with pytest.raises(RecordsError, match="none of the systems"):
        compare([Case("a", Workload(512, 512, offload="model"), 100)], ["comfyui"])


def test_an_unknown_system_names_those_that_exist():
    """The message lists the systems, sdfit's own numbers among them."""
    with pytest.raises(UnknownModel, match=r"'zzz'.*comfyui.*sdfit_upper"):
        compare(CASES, ["zzz"])


@pytest.mark.parametrize("amount", [0, -1, 1.5, math.nan, None, True, "3"])
def test_a_case_wants_a_positive_whole_number_of_bytes(amount):
    """Zero, negative, fractional, missing and non-numeric peaks are refused where the case is born."""
    with pytest.raises(InvalidWorkload, match="actual_bytes"):
        Case("a", W, amount)


def test_published_file_is_the_one_described():
    """70 rows, 17 columns, and peaks that add up to 200,568,967,908 B."""
    rows = published.rows()
    assert len(rows) == 70
    assert len({row.id for row in rows}) == 70
    assert sum(row.peak_bytes for row in rows) == 200_568_967_908
    with published.path().open(newline="") as stream:
        assert next(csv.reader(stream)) == [field.name for field in fields(published.PublishedRow)]


def test_an_installed_wheel_carries_the_rows_inside_the_package(tmp_path, monkeypatch):
    """Where the package holds ``_shipped/data/published``, the rows are read from there."""
    inside = tmp_path / "_shipped" / "data" / "published"
    inside.mkdir(parents=True)
    (inside / "measurements.csv").write_bytes(published.path().read_bytes())
    monkeypatch.setattr("sdfit.files.PACKAGE", tmp_path)
    assert published.path() == inside / "measurements.csv"
    assert published.read(published.path()) == published.rows()


def test_published_rows_are_typed():
    """Whole numbers are int, switches bool, and the guidance of the VAE alone is None."""
    for row in published.rows():
        assert {type(v) for v in (row.height, row.width, row.batch_size, row.peak_bytes)} == {int}
        assert {type(v) for v in (row.vae_tiling, row.safety_checker)} == {bool}
        assert (row.guidance_scale is None) == (not row.whole_pipeline)
        assert row.metric in ("allocated", "reserved")


def test_published_cards():
    """Each name that a publisher gave a card maps to its short name; an A100 is no A10."""
    counts: dict[str, int] = {}
    for row in published.rows():
        counts[row.card] = counts.get(row.card, 0) + 1
    assert counts == {"a100": 11, "rtx4090": 30, "t4": 9, "v100": 7, "a10": 9, "gtx1070": 2, "p100": 2}


def test_published_workloads():
    """A row's workload has its settings; the VAE alone is refused by name."""
    w = published.row("COL-001").workload()
    assert (w.effective_height, w.effective_width, w.guided, w.safety_checker) == (376, 392, True, True)
    w = published.row("SAY-005").workload()
    assert (w.dtype, w.attention, w.safety_checker) == ("bfloat16", "eager", False)
    assert published.row("GP-002").workload().offload == "model"
    with pytest.raises(RecordsError, match="INV-001 is a vae_encode alone"):
        published.row("INV-001").workload()


def test_published_cases_are_the_whole_runs():
    """37 whole runs were published as allocated, 2 of them of text to image under offload; none as reserved, and the message says so."""
    cases = published_cases()
    assert len(cases) == 35 and {case.workload.offload for case in cases} == {"none"}
    assert all(case.predicted_bytes is None for case in cases)
    with pytest.raises(RecordsError, match="'reserved'; there are: allocated"):
        published_cases("reserved")


def test_what_the_systems_say_of_the_published_runs():
    """The findings that the documentation may quote: who kills how many of the 32 runs that all can size."""
    dead = {line.system: (line.out_of_memory, line.cases) for line in compare(published_cases()).summary}
    assert dead == {
        "comfyui": (3, 32),
        "forge": (3, 32),
        "invokeai": (0, 32),
        "gguf_parser": (0, 32),
        "accelerate": (29, 32),
        "hand_a": (20, 32),
        "hand_b": (32, 32),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,gpu\nA,T4\n", "has the columns id,gpu"),
        (",".join(published.COLUMNS) + "\n" + ",".join(["x"] * len(published.COLUMNS)) + "\n", "line 2"),
        (",".join(published.COLUMNS) + "\nOM-1,T4\n", "line 2"),
        ("", "has the columns ;"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, text, said):
    """Other columns, a value of the wrong kind, a row cut short and an empty file each give one sentence."""
    file = tmp_path / "measurements.csv"
    file.write_text(text)
    with pytest.raises(RecordsError, match=said):
        published.read(file)


def test_a_missing_file_and_an_unknown_row_are_named(tmp_path):
    """The message has the path, or the id, that was not found."""
    with pytest.raises(RecordsError, match=r"gone\.csv"):
        published.read(tmp_path / "gone.csv")
    with pytest.raises(RecordsError, match="'XX-1'"):
        published.row("XX-1")
