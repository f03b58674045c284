"""Damaged files of every kind that is read: sound, or refused with one known failure of one line; nothing else happens.

A mutation changes bytes (flips, cuts, insertions, copies) or, where a file is a tree of values, its structure (a value
replaced, taken out, doubled, moved).
"""

from __future__ import annotations

import gzip
import json
import math
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from sdfit.backends.fake import FakeBackend
from sdfit.equation.metrics import METRICS
from sdfit.errors import SdfitError, UnknownVariant
from sdfit.files import shipped
from sdfit.predict.loading import load_artifact, read_plain
from sdfit.predict.predictor import Predictor
from sdfit.records import RECORDS, Record, read
from sdfit.study.comparison import published, residuals, times
from sdfit.sweep import grid
from sdfit.sweep.journal import Journal
from sdfit.workload import Workload

SEED, FEW, MANY = 20261125, 100, 10_000
ODD = (
    None, True, False, 0, -1, 1, 2**40, 2**63 - 1, -(2**63), 10**12, 1e308, -1e308, 1e-300, float("inf"), float("nan"), "", "x",
    "a\nb", "../../x", "\u202e", "x" * 5000, [], {}, [[]], {"": {}}, [0] * 100,
)  # fmt: skip
MODELS = sorted(shipped("models").glob("*.joblib"))


def bytewise(content: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(found) + 1), rng.choice((1, 1, 1, 2, 8, 100))
        how = rng.randrange(5)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            found[at : at + length] = rng.randbytes(length)
        elif how == 2:
            del found[at : at + length]
        elif how == 3:
            found[at:at] = found[:length] if rng.random() < 0.5 else rng.randbytes(length)
        else:
            del found[at:]
        found = found or bytearray(b"\0")
    return bytes(found)


def place(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A table or list somewhere in a tree, and one of its names or places: found from the root, so that no branch is rare."""
    found = None
    while isinstance(value, dict | list) and value and (found is None or rng.random() < 0.8):
        name = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        found, value = (value, name), value[name]
    return found


def structural(value: Any, rng: random.Random) -> Any:
    """One to three changes of structure, in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        there, elsewhere = place(value, rng), place(value, rng)
        if there is None or elsewhere is None:
            return rng.choice(ODD)
        (inside, name), (other, its) = there, elsewhere
        how = rng.randrange(5)
        if how == 0:
            inside[name] = deepcopy(rng.choice(ODD))
        elif how == 1:
            del inside[name]
        elif how == 2:
            inside[name] = deepcopy(other[its])
        elif how == 3 and isinstance(inside[name], int | float):
            inside[name] *= rng.choice((-1, 0, 0.5, 2, 1000, 10**15))
        elif isinstance(inside, dict):
            inside[rng.choice(("x", "", "a\n", str(its)))] = deepcopy(inside[name])
        else:
            inside.append(deepcopy(inside[name]))
    return value


Read = Callable[[Path], None]
Told = Callable[[str, object], None]


def ended(path: Path, content: bytes, read_it: Read) -> str:
    """How it ends to read a file: sound, or the name of a known failure."""
    path.write_bytes(content)
    try:
        read_it(path)
    except SdfitError as error:
        assert "\n" not in str(error) and len(str(error)) < 20_000, str(error)[:300]
        return type(error).__name__
    return "sound"


def artifact_mutations(model: Path, count: int) -> Iterator[bytes]:
    """Half of them byte-wise, half structural."""
    rng, content = random.Random(f"{SEED} {model.name}"), model.read_bytes()
    plain = pickle.dumps(read_plain(content), protocol=4)
    for i in range(count):
        yield bytewise(content, rng) if i % 2 else pickle.dumps(structural(pickle.loads(plain), rng), protocol=4)


def predicts(path: Path) -> None:
    """Load it and predict each metric, as a number and in a table; only a variant that it lacks is no answer."""
    f = Predictor(load_artifact(path))
    for w in (Workload(512, 512), Workload(1024, 768, batch_size=3, attention="eager", vae_tiling=True)):
        for metric in f.metrics:
            try:
                peak = f.predict_workload(w, metric=metric)
            except UnknownVariant:
                continue
            low, high = peak.interval
            assert 0 <= low <= peak <= high and math.isfinite(peak), (float(peak), low, high)
            table = {name: [value] for name, value in w.to_dict().items()}
            assert f.predict(table, metric=metric)[0] == pytest.approx(float(peak), rel=1e-9, abs=1e-3)
    assert set(f.metrics) <= set(METRICS) and f.rests_on.isprintable()


def card(path: Path) -> None:
    """Its card and its line of `sdfit models` are made without a defence of their own."""
    from sdfit.fit.card import model_card, models_table

    f = Predictor(load_artifact(path), path)
    assert model_card(f.artifact).startswith(f"# {f.artifact.name}\n") and len(models_table({"x": f}).splitlines()) == 2


def damaged_artifacts(model: Path, path: Path, count: int) -> Counter[str]:
    """How so many mutations of a model end; each that loads also predicts."""
    ends: Counter[str] = Counter()
    for content in artifact_mutations(model, count):
        end = ended(path, content, predicts)
        if end == "sound":
            card(path)
        ends[end] += 1
    assert set(ends) <= {"sound", "ArtifactError"}, ends
    return ends


@pytest.mark.parametrize("model", MODELS[-2:], ids=lambda path: path.stem)
def test_some_damaged_artifacts(model: Path, tmp_path: Path) -> None:
    """A share of those of `test_many_damaged_artifacts`."""
    assert damaged_artifacts(model, tmp_path / "x.joblib", FEW)["ArtifactError"] > FEW / 3


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_many_damaged_artifacts(model: Path, tmp_path: Path, record_property: Told) -> None:
    """Of every shipped model."""
    told(record_property, f"{model.name}", MANY, damaged_artifacts(model, tmp_path / "x.joblib", MANY))


def told(record_property: Told, what: str, count: int, ends: Counter[str]) -> None:
    """Let the summary of the run say what a slow test did."""
    record_property("fuzz", f"{count} mutations of {what}, seed {SEED}: {dict(ends.most_common())}, nothing else")


# -- records, grids, published tables --


def lines(content: bytes, rng: random.Random) -> bytes:
    """A structural change of one line of JSON."""
    rows = content.splitlines()
    at = rng.randrange(len(rows))
    rows[at] = json.dumps(structural(json.loads(rows[at]), rng)).encode()
    return b"\n".join(rows) + b"\n"


def cells(content: bytes, rng: random.Random) -> bytes:
    """A change of one cell of CSV."""
    rows = [row.split(b",") for row in content.splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = str(rng.choice(ODD))[:100].encode()
    return b"\n".join(b",".join(row) for row in rows) + b"\n"


def words(content: bytes, rng: random.Random) -> bytes:
    """A change of one number or word of TOML."""
    parts = content.split(b" ")
    parts[rng.randrange(len(parts))] = json.dumps(rng.choice(ODD), default=str)[:200].encode()
    return b" ".join(parts)


def _records(path: Path) -> list[bytes]:
    """Three rows that are made here, and the first of a file that ships."""
    made = path.with_name("made.jsonl")
    card = FakeBackend(capacity_bytes=4 << 30)
    with Journal(made, card.environment(), RECORDS) as journal:
        for i, w in enumerate(
            (Workload(512, 512), Workload(768, 512, batch_size=2), Workload(2048, 2048, attention="eager"))
        ):
            journal.append(Record(i, w, **card.measure(w)))
    there = next((shipped("data") / "sm75").glob("*default*.jsonl.gz"))
    return [made.read_bytes(), b"".join(gzip.decompress(there.read_bytes()).splitlines(keepends=True)[:20])]


def _zipped(content: bytes, rng: random.Random) -> bytes:
    packed = gzip.compress(content, mtime=0)
    return bytewise(packed, rng) if rng.random() < 0.8 else gzip.compress(bytewise(content, rng))


def _grids(path: Path) -> list[bytes]:
    return [found.read_bytes() for found in sorted(shipped("sweeps").glob("*.toml"))]


def _published(*names: str) -> Callable[[Path], list[bytes]]:
    return lambda path: [(shipped("data/published") / name).read_bytes() for name in names]


KINDS: dict[str, tuple[str, Callable[[Path], list[bytes]], Callable[[bytes, random.Random], bytes], Read]] = {
    "records": (".jsonl", _records, lines, lambda path: [repr(r) for r in read(path).records] and None),
    "compressed records": (".jsonl.gz", _records, _zipped, lambda path: [repr(r) for r in read(path).records] and None),
    "grids": (".toml", _grids, words, lambda path: grid.load(str(path)).summary() and None),
    "published measurements": (".csv", _published("measurements.csv", "other.csv"), cells, lambda path: list(published.read(path)) and None),
    "published times": (".csv", _published("times.csv"), cells, lambda path: list(times.read(path)) and None),
    "residuals": (".csv", _published("residuals.csv"), cells, lambda path: [r.error for r in residuals.read(path)] and None),
}  # fmt: skip


def damaged(kind: str, folder: Path, count: int) -> Counter[str]:
    """How so many mutations of a kind of file end."""
    suffix, make, structure, read_it = KINDS[kind]
    path, rng = folder / f"x{suffix}", random.Random(f"{SEED} {kind}")
    contents, ends = make(path), Counter[str]()
    for i in range(count):
        content = contents[i // 2 % len(contents)]
        how = structure if i % 2 or kind.startswith("compressed") else bytewise
        ends[ended(path, how(content, rng), read_it)] += 1
    return ends


@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_files(kind: str, tmp_path: Path) -> None:
    """A share of those of `test_many_damaged_files`."""
    assert len(damaged(kind, tmp_path, FEW)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(kind: str, tmp_path: Path, record_property: Told) -> None:
    """Records, grids, the table of published measurements."""
    told(record_property, kind, MANY, damaged(kind, tmp_path, MANY))
