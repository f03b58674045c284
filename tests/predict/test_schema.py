"""The strict schema: what an artifact may hold, and that nothing else gets as far as a prediction."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdfit
from sdfit.errors import ArtifactError, LocalModelWarning, NeverSwept, SdfitError
from sdfit.files import shipped
from sdfit.predict.artifact import LARGEST_BYTES
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor

PROTO = b"\x80\x04"
Change = Callable[[dict[str, Any]], Any]


def written(path: Path, value: Any) -> Path:
    """A file of plain values."""
    path.write_bytes(pickle.dumps(value, protocol=4))
    return path


def refused(path: Path, words: str) -> str:
    """See a file refused in one short, printable line, with little memory and in little time."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ArtifactError, match=words) as caught:
        load_artifact(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert time.process_time() - started < 2
    return str(caught.value)


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    """Those of a shipped model."""
    return {k: v for k, v in asdict(load_artifact(shipped("models") / "sm75.joblib")).items() if k != "prior"}


def put(*path: Any) -> Change:
    """A change that sets the value at a path."""

    def change(fields: dict[str, Any]) -> None:
        *names, last, value = path
        for name in names:
            fields = fields[name]
        fields[last] = value

    return change


UNET, MIDDLE = "unet|float16|sdpa", "vae_decoder_mid|float16|sdpa|kl"
CHANGES: list[tuple[Change, str]] = [
    # weights: -928 GiB, and it fits
    (put("components", "float16", "safety_checker", 10**12), r"components.*all/kl/checked.* at least "),
    (put("components", "float16", {"safety_checker": 10**12, "all/kl/checked": 1}), "at least 1000000000000"),
    (put("components", "float16", "unet", 2**41), "'unet' is 2199023255552; it must be a whole number from 0 to"),
    (put("components", "float16", "unet", -1), "'unet' is -1"),
    (put("components", "float16", "unet", True), "'unet' is True"),
    (put("components", "float16", "unet", 1e9), "'unet' is 1000000000.0"),
    (put("components", "float16", "vae/none", 1), "unknown name 'vae/none'"),
    (put("components", "float8", {}), "unknown name 'float8'"),
    # coefficients that give infinity, and rows that are no lists
    (put("stages", UNET, "coef", 0, 1, 1e308), r"holds 1e\+308; it must be a list of 6 numbers"),
    (put("stages", UNET, "coef", 0, 1, -1e-9), "holds -1e-09"),
    (put("stages", UNET, "coef", 0, 1, True), "holds True"),
    (put("stages", UNET, "coef", 0, 1, "1"), "holds '1'"),
    (put("stages", UNET, "coef", {0: [0.0] * 6}), "is no sdfit artifact|it must be a list"),
    (put("stages", UNET, "coef", {"0": [0.0] * 6}), "'coef' is a dict; it must be a list"),
    (put("stages", UNET, "coef", 0, dict.fromkeys("abcdef", 0.0)), "'coef' is a dict; it must be a list of 6 numbers"),
    (put("stages", UNET, "coef", [[0.0] * 6 for _ in range(7)]), "a list of 1 to 6 values"),
    (put("stages", UNET, "coef", [[0.0] * 6, [0.0] * 6]), "rows of 'low'"),
    (put("stages", UNET, "coef", [[0.0] * 5]), "a list of 6 numbers"),
    (put("stages", UNET, "coef", []), "a list of 1 to 6 values"),
    (put("stages", UNET, "regimes", [0] * 5 + [1]), "regimes choose among 1 rows"),
    (put("stages", UNET, "regimes", [0] * 5), "'regimes' is a list"),
    (put("stages", UNET, "regimes", [0] * 5 + [0.0]), "'regimes' is 0.0; it must be a whole number from 0 to 5"),
    (put("stages", UNET, "terms", ["1"] * 6), "'terms' is a list; it must be 1, n·A"),
    (put("stages", UNET, "low", None), "'low' is None"),
    (put("stages", UNET, "low", 0, 0, None), "holds None"),
    (put("stages", UNET, "high", [["much"] * 6]), "'high' is 'much'"),
    (put("stages", UNET, "unidentified", []), "'unidentified' is a list; it must be a table"),
    (put("stages", UNET, "unidentified", {"D": "x"}), "unknown name 'D'"),
    (put("stages", UNET, "unidentified", {"n·A": 5}), "'n·A' is 5; it must be printable text"),
    (put("stages", UNET, "domain", "A", [0, 1]), "'A' is a list; it must be the least and the most of a range"),
    (put("stages", UNET, "domain", "A", [2, 1]), "the least and the most"),
    (put("stages", UNET, "domain", "A", [1, 2, 3]), "a list of 2 values"),
    (put("stages", UNET, "domain", {}), "lacks the field 'A'"),
    (put("stages", UNET, "surplus", 1), "unknown field 'surplus'"),
    (put("stages", UNET, {}), "lacks the field 'terms'"),
    (put("stages", UNET, 7), f"{UNET}' is 7"),
    (put("stages", "unet|float8|sdpa", {}), "unknown stage 'unet|float8|sdpa'"),
    (put("stages", []), "'stages' is a list"),
    # metrics and scores
    (put("metrics", "required", {}), "'required' lacks the name '', which holds for all"),
    (put("metrics", "allocated", {}), "unknown name 'allocated'"),
    (put("metrics", "required", "", {"edges": [], "coef": [[0.0] * 7]}), "numbers from 0"),
    (put("metrics", "required", "", {"edges": [1.0], "coef": [[0.0] * 8]}), "a list of 2 values"),
    (put("metrics", "required", "", {"edges": [2.0, 1.0], "coef": [[0.0] * 8 for _ in range(3)]}), "ascending"),
    (put("metrics", "required", "", {"edges": [], "coef": [[0.0] * 7 + [1e300]]}), r"holds 1e\+300"),
    (put("metrics", "required", "", {}), "lacks the field 'edges'"),
    (put("metrics", "required", "", "edges", {}), "'edges' is a dict"),
    (put("scores", "allocated", "", {"count": 2, "values": [1.0, 0.0]}), "ascending"),
    (put("scores", "allocated", "", {"count": 3, "values": [0.0, 1.0]}), "a table with 3 values of 3"),
    (put("scores", "allocated", "", {"count": 10**12, "values": [0.0]}), "'count' is 1000000000000"),
    (put("scores", "allocated", "", {"count": 1, "values": ["x"]}), "holds 'x'"),
    (put("scores", "allocated", "", {"count": 1, "values": [1e300]}), "holds 1e"),
    (put("scores", "allocated", "", [1.0]), "is a list; it must be a table"),
    (put("scores", "allocated", {}), "lacks the name ''"),
    (put("scores", {}), "lacks the name 'allocated'"),
    (put("scores", "allocated", "unseen", {"count": 1, "values": [0.0]}), r"lacks the name 'unseen\|least'"),
    # what the card and the tables print
    (put("name", "x\n# forged"), "printable text"),
    (put("name", "../../x"), "the name of a file"),
    (put("name", "x\u202egnp"), "printable text"),
    (put("name", 5), "'name' is 5"),
    (put("provenance", "divine"), "one of measured, corrected, published, traced, fake"),
    (put("environment", "gpu", "T4\r\nnote: all is well"), "printable text"),
    (put("environment", "gpu", ["T4"]), "'gpu' is a list"),
    (put("environment", "T4\n", "x"), "printable text"),
    (put("environment", "gpu", "x" * 301), "at most 300 characters"),
    (put("sources", [{}]), "lacks the field 'name'"),
    (put("sources", 0, "rows", "many"), "'rows' is 'many'"),
    (put("sources", 0, "sha256", "a\x1b[31m"), "printable text"),
    (put("swept", [1]), "'swept' is 1"),
    (put("swept", {}), "'swept' is a dict"),
    (put("swept", ["x"]), "'x'; it must be the name of a variant"),
    (put("swept", ["float16 sdpa x"]), "'float16 sdpa x'; it must be the name of a variant"),
    (put("swept", ["float16 sdpa offload=a=b"]), "'float16 sdpa offload=a=b'; it must be the name of a variant"),
    (put("swept", ["float16 sdpa vae=tiny vae=tiny"]), "it must be the name of a variant"),
    (put("baseline", {}), "lacks the field 'terms'"),
    (put("baseline", "variants", {"x": {}}), "lacks the field 'coef'"),
    (put("baseline", "variants", {}), "a table with 1 name at least"),
    (put("evaluation", {}), "lacks the field 'rows'"),
    (put("evaluation", "rows", float("nan")), "'rows' is nan"),
    (put("evaluation", "fitted", "worst", float("inf")), "'worst' is inf"),
    (put("evaluation", "published", "cards", "t4", "many"), "'t4' is 'many'"),
    (put("evaluation", "worst_row", "dtype", "float8"), "'dtype' is 'float8'"),
    (put("format", 1), "its format is 1; this sdfit reads format 2"),
    (put("format", 2.0), "its format is 2.0"),
    (put("surplus", 1), "unknown field 'surplus'"),
    (lambda fields: fields.pop("baseline"), "lacks the field 'baseline'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words for _, words in CHANGES])
def test_what_does_not_fit_is_refused_where_it_is(
    fields: dict[str, Any], tmp_path: Path, change: Change, words: str
) -> None:
    """Each field of the wrong type, size or form is named with its path, in one line, when the file is loaded."""
    changed = deepcopy(fields)
    change(changed)
    refused(written(tmp_path / "x.joblib", changed), words)


def test_what_could_not_be_loaded_is_not_written(fields: dict[str, Any], tmp_path: Path) -> None:
    """The same table holds when a model is saved."""
    artifact = load_artifact(shipped("models") / "sm75.joblib")
    with pytest.raises(ArtifactError, match="printable text"):
        replace(artifact, environment=fields["environment"] | {"gpu": "a\nb"}).save(tmp_path / "x.joblib")
    many = {f"variant {i}": artifact.baseline["variants"]["float16 sdpa"] for i in range(20_000)}
    with pytest.raises(ArtifactError, match="has at most 1048576"):
        replace(artifact, baseline=artifact.baseline | {"variants": many}).save(tmp_path / "x.joblib")
    assert not list(tmp_path.iterdir())


# -- files that ask for much --


def text(value: bytes) -> bytes:
    """BINUNICODE."""
    return b"X" + len(value).to_bytes(4, "little") + value


def test_a_long_string_shared_many_times_is_refused(tmp_path: Path) -> None:
    """One string of 2 MB for 3,000 names: it took 5.8 GiB to print a message about it."""
    path = tmp_path / "x.joblib"
    shared = b"".join(b"h\x00" + b"N" for _ in range(3000))
    path.write_bytes(PROTO + b"}" + text(b"x" * (2 << 20)) + b"\x94N(" + shared + b"u.")
    refused(path, "and may have 1048576 at most")
    path.write_bytes(PROTO + b"}(" + text(b"name") + text(b"x" * (1 << 19)) + b"\x94" + b"h\x00N" * 3000 + b"u.")
    refused(path, "no sdfit artifact")


def test_a_variant_is_named_once_and_not_without_end(fields: dict[str, Any], tmp_path: Path) -> None:
    """A text stands in many places at two bytes each: a list of 300,000 made a message of 90 MB."""
    one = fields["swept"][0]
    refused(written(tmp_path / "x.joblib", fields | {"swept": [one] * 2}), "a list that names each once")
    refused(written(tmp_path / "x.joblib", fields | {"swept": [one] * 10_001}), "a list of 0 to 10000 values")


def test_a_variant_that_was_never_swept_names_the_nearest() -> None:
    """It was a list of all of them, of 5 KB."""
    model = Predictor(load_artifact(shipped("models") / "sm75.joblib"))
    with pytest.raises(NeverSwept, match=r"nearest of the \d+ that were: ") as caught:
        model(512, 512, execution="compiled")
    assert len(str(caught.value)) < 500 and caught.value.facts["near"][0] == "float16 sdpa"


@pytest.mark.parametrize("keys", [[k * (2**61 - 1) for k in range(2_000)], list(range(10)), [0.5, 1.5], [None], [True]])
def test_names_are_text(tmp_path: Path, keys: list[Any]) -> None:
    """Integers that hash alike load in quadratic time as the keys of a table; no number is a name at all."""
    whole = {"format": 2, "name": dict.fromkeys(keys, 0)}
    refused(written(tmp_path / "x.joblib", whole), "an integer of 9 bytes|no sdfit artifact|has 1.* bytes")


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**5000], ids=["2^63", "-2^63 - 1", "10^5000"])
def test_long_integers_are_refused(tmp_path: Path, number: int) -> None:
    """Of more than 8 bytes."""
    refused(written(tmp_path / "x.joblib", {"format": 2, "rows": number}), "an integer of|the pickle instruction LONG4")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to hangs nothing, and a link to a device without an end fills nothing."""
    os.mkfifo(tmp_path / "pipe.joblib")
    refused(tmp_path / "pipe.joblib", "no regular file")
    (tmp_path / "zero.joblib").symlink_to("/dev/zero")
    refused(tmp_path / "zero.joblib", "no regular file")
    refused(tmp_path, "directory")
    refused(tmp_path / "none.joblib", "No such file")
    refused(Path("a\x00b.joblib"), "null")
    refused(tmp_path / "two\nlines.joblib", "No such file")


def test_the_largest_file_is_a_mebibyte(tmp_path: Path) -> None:
    """Ten times what ships; a larger one is not read."""
    assert LARGEST_BYTES == 1 << 20
    assert max(path.stat().st_size for path in shipped("models").glob("*.joblib")) < LARGEST_BYTES / 10
    path = tmp_path / "x.joblib"
    path.write_bytes(bytes(LARGEST_BYTES + 1))
    refused(path, "it has 1048577 bytes, and may have 1048576 at most")


# -- what passes --


def test_models_at_their_bounds_predict_finite_numbers(fields: dict[str, Any]) -> None:
    """All coefficients as large as they may be, or all zero: every kind of answer is finite and not negative."""
    from sdfit.predict import schema

    for number in (schema.MOST_BYTES, 0):
        changed = deepcopy(fields)
        for stage in changed["stages"].values():
            stage["coef"] = [[number] * len(row) for row in stage["coef"]]
        for groups in changed["metrics"].values():
            for group in groups.values():
                group["coef"] = [[number] * len(row) for row in group["coef"]]
        for families in changed["scores"].values():
            for found in families.values():
                found["values"] = [schema.MOST_ERROR if number else 0.0] * len(found["values"])
        if not number:
            changed["components"] = {dtype: dict.fromkeys(table, 0) for dtype, table in changed["components"].items()}
        schema.check(changed)
        f = Predictor(sdfit.predict.artifact.Artifact(**changed))
        for size in (64, 512, 16384):
            for metric in f.metrics:
                peak = f(size, size, 7700, 1024, metric=metric)
                assert 0 <= peak <= peak.upper < math.inf and math.isfinite(peak.interval.low)
                table = {"height": [size, 64], "width": size, "prompt_length": 7700, "batch_size": 1024}
                with np.errstate(all="raise"):
                    assert f.predict(table, metric=metric)[0] == pytest.approx(peak, rel=1e-9)
                    assert np.isfinite(f.predict_interval(table, metric=metric)).all()
                json.dumps(peak.to_dict(), allow_nan=False)
            assert f.verdict(size, size, memory="8 GiB").answer in ("fits", "may fit", "does not fit")


@pytest.mark.parametrize("name", sorted(path.name for path in shipped("models").glob("*.joblib")))
def test_every_shipped_model_passes_and_is_written_back_the_same(name: str) -> None:
    """To the byte."""
    path = shipped("models") / name
    assert load_artifact(path).to_bytes() == path.read_bytes()


# -- beside good ones --


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "sdfit.cli", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


@pytest.mark.parametrize(
    "asked", [("models",), ("models", "--json"), ("cards", "t4"), ("compare",), ("compare", "--json")]
)
def test_a_damaged_file_beside_good_ones_is_a_note(tmp_path: Path, asked: tuple[str, ...]) -> None:
    """A model of this folder that cannot be read hides no other, and is named."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "t4.joblib").write_bytes(b"damaged")
    ran = command(tmp_path, *asked)
    assert ran.returncode == 0 and ran.stdout and "Traceback" not in ran.stderr, ran.stderr
    assert [line for line in ran.stderr.splitlines() if "t4.joblib" in line and line.startswith("note: ")]


def test_a_local_model_that_wins_over_a_shipped_one_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own name or by its card's; not where nothing else would have answered, nor for a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDFIT_MODELS", raising=False)
    (tmp_path / "models").mkdir()
    for name in ("t4", "sm75", "nobodys"):
        (tmp_path / "models" / f"{name}.joblib").write_bytes((shipped("models") / "sm75.joblib").read_bytes())
    for asked, says in (
        ("t4", True),
        ("sm75", True),
        ("nobodys", False),
        ("models/t4.joblib", False),
        ("a100", True),
        ("v100", False),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sdfit.load(asked)
        told = [str(w.message) for w in caught if w.category is LocalModelWarning]
        assert len(told) == says and all("models/" in words and "not the one that ships" in words for words in told), (
            asked,
            told,
        )


def test_a_message_of_a_model_is_one_line(tmp_path: Path) -> None:
    """Also where the name of the file has two."""
    path = tmp_path / "x\nnote: forged.joblib"
    path.write_bytes(b"x")
    assert "\\n" in refused(path, "no pickle")
    assert issubclass(ArtifactError, SdfitError)
