"""The artifact file: plain, the same bytes each time, and harmless whatever it holds."""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sdfit.errors import ArtifactError, SdfitError, UnknownVariant
from sdfit.files import shipped
from sdfit.predict.artifact import FORMAT, Artifact, canonical
from sdfit.predict.loading import load_artifact, read_plain
from sdfit.predict.predictor import Predictor

PROTO = b"\x80\x04"


def refused(path: Path, content: bytes, words: str = "cannot load") -> str:
    """Write a file, see it refused in one line that names it, and return the line."""
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=words) as caught:
        load_artifact(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "sdfit fit" in str(caught.value)
    return str(caught.value)


def text(value: str) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def test_saving_twice_gives_the_same_bytes(fake_model: Path, tmp_path: Path) -> None:
    """Load and save is the identity on bytes, also when the fields arrive in another order."""
    artifact = load_artifact(fake_model)
    again = artifact.save(tmp_path / "again.joblib")
    assert again.read_bytes() == fake_model.read_bytes()
    fields = asdict(artifact)
    shuffled = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in reversed(fields.items())}
    assert Artifact(**shuffled).save(tmp_path / "shuffled.joblib").read_bytes() == fake_model.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"again.joblib", "shuffled.joblib"}


def test_fitting_twice_gives_the_same_bytes(fake_records: Path, fake_model: Path, tmp_path: Path) -> None:
    """The same records give the same file, to the byte."""
    from sdfit.fit.files import fit_files

    assert fit_files([fake_records], None, tmp_path / "fake.joblib").path.read_bytes() == fake_model.read_bytes()


def test_joblib_reads_it_and_finds_plain_values(fake_model: Path) -> None:
    """`joblib.load` gives the same fields, but for the prior that it has not, and they survive JSON unchanged."""
    import joblib

    fields = joblib.load(fake_model)
    assert type(fields) is dict and fields | {"prior": {}} == asdict(load_artifact(fake_model))
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields


def test_it_holds_no_global_and_is_small(fake_model: Path) -> None:
    """The pickle inside holds instructions for plain values only; a model of the default grid has at most 100 KB."""
    names = {opcode.name for opcode, _, _ in pickletools.genops(fake_model.read_bytes())}
    assert read_plain(fake_model.read_bytes()) == pickle.loads(fake_model.read_bytes())
    assert not names & {"GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "BUILD", "NEWOBJ", "PERSID", "BINPERSID"}
    assert fake_model.stat().st_size <= 100_000


class _Touch:
    def __init__(self, marker: Path, how: Callable[..., Any]) -> None:
        self.marker, self.how = marker, how

    def __reduce__(self) -> Any:
        return self.how, (str(self.marker), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_reduce_executes_nothing(tmp_path: Path, protocol: int) -> None:
    """A pickle that would create a file when loaded is refused and creates none; pickle itself does create it."""
    marker, hostile = tmp_path / "marker", tmp_path / "hostile.joblib"
    content = pickle.dumps({"format": FORMAT, "name": _Touch(marker, open)}, protocol=protocol)
    refused(hostile, content)
    assert not marker.exists()
    pickle.loads(content)["name"].close()
    assert marker.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(Vtouch MARKER\ntR.",  # GLOBAL, REDUCE
        PROTO + text("os") + text("system") + b"\x93" + text("touch MARKER") + b"\x85R.",  # STACK_GLOBAL, TUPLE1
        b"(ios\nsystem\n(Vtouch MARKER\n.",  # INST
        b"(cos\nsystem\nVtouch MARKER\no.",  # OBJ
        PROTO + b"cbuiltins\nobject\n)\x81.",  # NEWOBJ
        PROTO + b"cbuiltins\nobject\n)}\x92.",  # NEWOBJ_EX
        b"Pmarker\n.",  # PERSID
        PROTO + text("marker") + b"Q.",  # BINPERSID
        PROTO + b"\x82\x01.",  # EXT1
        PROTO + b"}" + text("a") + b"b.",  # BUILD
        PROTO + text("os") + b"\x8c\x00" + b"\x93.",  # STACK_GLOBAL with an empty name
    ],
)
def test_hand_written_instructions_execute_nothing(tmp_path: Path, payload: bytes) -> None:
    """Each instruction that could import, call or fetch is refused by name before anything runs."""
    marker = tmp_path / "marker"
    message = refused(tmp_path / "hostile.joblib", payload.replace(b"MARKER", str(marker).encode()))
    assert "plain values only" in message
    assert not marker.exists()


def test_a_call_inside_a_real_artifact_executes_nothing(fake_model: Path, tmp_path: Path) -> None:
    """A call put in front of an intact artifact, its result thrown away, does not run."""
    marker = tmp_path / "marker"
    call = b"cos\nsystem\n" + text(f"touch {marker}") + b"\x85R0"
    content = fake_model.read_bytes()
    refused(tmp_path / "hostile.joblib", content[:2] + call + content[2:], "GLOBAL")
    assert not marker.exists()


def test_numpy_arrays_inside_are_refused(tmp_path: Path) -> None:
    """What joblib writes for an array, an object array included, is refused: it needs globals."""
    import joblib
    import numpy as np

    for array in (np.arange(3), np.array([_Touch(tmp_path / "marker", open)], dtype=object)):
        path = tmp_path / "array.joblib"
        joblib.dump({"format": FORMAT, "coef": array}, path)
        refused(path, path.read_bytes(), "plain values only")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "payload",
    [
        PROTO + b"]r\xff\xff\xff\x7f.",  # LONG_BINPUT: a memo of 2^31 places
        PROTO + b"\x96" + (1 << 40).to_bytes(8, "little") + b".",  # BYTEARRAY8 of 1 TiB
        PROTO + b"\x8e" + (1 << 40).to_bytes(8, "little") + b".",  # BINBYTES8 of 1 TiB
        PROTO + b"X\xff\xff\xff\x7f.",  # BINUNICODE of 2 GiB
        b"I" + b"9" * 100_000 + b"\n.",  # a number of 100,000 digits
    ],
)
def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path, payload: bytes) -> None:
    """Instructions that ask for memory by a number in the file are refused before they run."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "greedy.joblib", payload)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_shared_and_nested_tables_are_refused(tmp_path: Path) -> None:
    """A tree of 2^60 leaves in a few bytes, a list that holds itself and a nest 100,000 deep end in one line."""
    doubled: list[Any] = []
    for _ in range(60):
        doubled = [doubled, doubled]
    path = tmp_path / "b.joblib"
    refused(path, pickle.dumps({"sources": doubled}, protocol=4), "twice")
    loop: list[Any] = []
    loop.append(loop)
    refused(path, pickle.dumps({"sources": loop}, protocol=4), "twice")
    nested = b"]" * 100_000 + b"a" * 99_999
    refused(path, PROTO + b"}" + text("sources") + nested + b"s.", "no sdfit artifact")
    refused(path, PROTO + b"}(" + text("format") + b"K\x02" + text("sources") + nested + b"u.", "lacks the field")


def test_foreign_files_are_refused(tmp_path: Path, fake_records: Path) -> None:
    """Nothing, text, a picture's head, compressed joblib, records, and plain pickles of other things."""
    import gzip

    path = tmp_path / "foreign.joblib"
    for content in (b"", b"hello\n", b"\x89PNG\r\n\x1a\n" + bytes(100), gzip.compress(b"x"), fake_records.read_bytes()):
        refused(path, content)
    for value in ([], {}, {"a": 1}, 5, "t4", {1: 2}, {"format": 1}, {"format": 2}, {"format": True}, None):
        refused(path, pickle.dumps(value, protocol=4))


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    """The system's reason is in the sentence."""
    with pytest.raises(ArtifactError, match="No such file"):
        load_artifact(tmp_path / "none.joblib")
    with pytest.raises(ArtifactError, match="directory"):
        load_artifact(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    """A file of 1 GB (sparse) is refused for its size."""
    path = tmp_path / "huge.joblib"
    with path.open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(ArtifactError, match="it has 1000000000 bytes"):
        load_artifact(path)


def test_truncated_at_any_place_is_refused(fake_model: Path, tmp_path: Path) -> None:
    """44 prefixes of an artifact, the shortest and the longest among them, are all refused."""
    content = fake_model.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 2, len(content) - 1, *(rng.randrange(len(content)) for _ in range(40))]:
        refused(tmp_path / "torn.joblib", content[:length])


def test_flipped_bytes_never_escape(fake_model: Path, tmp_path: Path) -> None:
    """Each of 150 files with one changed byte is refused in one line or is a sound artifact: it predicts a finite number.

    A changed name of a component or a stage leaves an artifact that is sound and never saw the variant; it says so.
    """
    content = fake_model.read_bytes()
    rng = random.Random(1)
    path = tmp_path / "flipped.joblib"
    ends: Counter[str] = Counter()
    for _ in range(150):
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        ends[end_of(path)] += 1
    assert set(ends) <= {"refused in a line", "predicts", "never saw it"} and min(ends.values()) >= 1, ends
    assert ends["refused in a line"] > 10 and ends["predicts"] > 10


def end_of(path: Path) -> str:
    """How it ends to load a file and predict; any other exception is let through."""
    try:
        peak = Predictor(load_artifact(path))(512, 512)
    except ArtifactError as error:
        return "refused in a line" if "\n" not in str(error) else "refused in many"
    except UnknownVariant:
        return "never saw it"
    return "predicts" if math.isfinite(peak) and peak >= 0 else "predicts nonsense"


def test_saving_what_is_not_finite_fails_and_leaves_the_old_file(fake_model: Path, tmp_path: Path) -> None:
    """A model with a NaN cannot be saved, and the file that was there stays."""
    artifact = load_artifact(fake_model)
    path = artifact.save(tmp_path / "kept.joblib")
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(artifact, evaluation=artifact.evaluation | {"rows": float("nan")}).save(path)
    assert path.read_bytes() == fake_model.read_bytes()


def test_canonical_shares_nothing() -> None:
    """Equal tables stay apart, tuples become lists, keys are sorted."""
    part = {"b": (1, 2), "a": None}
    made = canonical({"y": part, "x": part})
    assert list(made) == ["x", "y"] and made["x"] == {"a": None, "b": [1, 2]}
    assert made["x"] is not made["y"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Saving below a file is a known failure, not a traceback."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SdfitError, match="cannot write the model to"):
        load_artifact(shipped("models") / "sm75.joblib").save(blocked / "sm75.joblib")
