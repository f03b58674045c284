"""How files are read and written: nothing of anybody's is lost, nothing is half, and each failure is one sentence."""

from __future__ import annotations

import os
import pickle
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdfit.errors import SdfitError
from sdfit.files import CARD, FIGURE, MODEL, Kind, Output, file_name, read_bytes, write
from sdfit.fit.files import fit_files
from sdfit.predict.loading import load_artifact

PAGE = Kind("page", (".html",), b"sdfit page")
NEW, OLD = b"new sdfit page", b"old sdfit page"


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def refused(out: Path, words: str, content: bytes = NEW, kind: Kind = PAGE, inputs: tuple[Path, ...] = ()) -> None:
    """See an output refused in one sentence that names it, and nothing left beside it."""
    before = {p: p.lstat() for p in out.parent.iterdir()} if out.parent.is_dir() else None
    with pytest.raises(SdfitError, match=words) as caught:
        write(Output(out, content, kind), inputs=inputs)
    assert (
        str(out) in str(caught.value) and "\n" not in str(caught.value) and "choose another file" in str(caught.value)
    )
    if before is not None:
        assert {p: p.lstat().st_ino for p in out.parent.iterdir()} == {p: s.st_ino for p, s in before.items()}


def test_a_file_is_made_with_its_folder_and_replaced(tmp_path: Path) -> None:
    """What was there is replaced and keeps its permissions; nothing else is left in the folder."""
    out = tmp_path / "a" / "b" / "x.html"
    write(Output(out, OLD, PAGE))
    out.chmod(0o640)
    write(Output(out, NEW, PAGE))
    assert out.read_bytes() == NEW and stat.S_IMODE(out.stat().st_mode) == 0o640
    assert names(out.parent) == ["x.html"]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Another kind's suffix, none, somebody's file of the right suffix, an input, a folder: refused, and all stay."""
    for name in ("x.md", "x", "x.html.part", "README.md"):
        refused(tmp_path / name, r"the name of a page ends in \.html")
    (tmp_path / "mine.html").write_bytes(b"my own page")
    refused(tmp_path / "mine.html", "there is a file of that name which is no page of sdfit's")
    (tmp_path / "in.html").write_bytes(OLD)
    (tmp_path / "alias.html").symlink_to("in.html")
    for name in ("in.html", "alias.html", "../" + tmp_path.name + "/in.html"):
        refused(tmp_path / name, "it is what this is made of", inputs=(tmp_path / "in.html",))
    (tmp_path / "folder.html").mkdir()
    refused(tmp_path / "folder.html", "it is a directory")
    refused(tmp_path / "mine.html" / "x.html", "(?i)not a directory|file exists")
    assert (tmp_path / "mine.html").read_bytes() == b"my own page" and (tmp_path / "in.html").read_bytes() == OLD


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    """A pipe that nobody reads and a link to a device stay what they are, and nothing waits."""
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "null.html").symlink_to(os.devnull)
    refused(tmp_path / "pipe.html", "it is no regular file")
    refused(tmp_path / "null.html", r"the name of a page ends in \.html")
    for a, b in (("one", "two"), ("two", "one")):
        (tmp_path / f"{a}.html").symlink_to(f"{b}.html")
    refused(tmp_path / "one.html", "(?i)loop|too many levels")
    with pytest.raises(OSError, match="no regular file"):
        read_bytes(tmp_path / "pipe.html", 10)
    with pytest.raises(OSError, match="no regular file"):
        read_bytes("/dev/zero", 10)


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    """Also where the target is not there yet."""
    for name in ("there", "missing"):
        target, link = tmp_path / f"{name}.html", tmp_path / f"link-{name}.html"
        link.symlink_to(target.name)
        if name == "there":
            target.write_bytes(OLD)
        write(Output(link, NEW, PAGE))
        assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == NEW


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file can grow beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most_bytes", [0, 1, 13, 100, 199])
def test_several_files_are_written_together_or_not_at_all(tmp_path: Path, most_bytes: int) -> None:
    """The disk fills in the first or the second of two: both old ones stay, and no part of a new one does."""
    one, two = tmp_path / "one.html", tmp_path / "two.html"
    for path in (one, two):
        path.write_bytes(OLD)
    with full_disk(most_bytes), pytest.raises(SdfitError, match="File too large"):
        write(Output(one, NEW, PAGE), Output(two, NEW + bytes(200 - len(NEW)), PAGE))
    assert one.read_bytes() == two.read_bytes() == OLD and names(tmp_path) == ["one.html", "two.html"]
    with pytest.raises(SdfitError, match="two outputs cannot be one file"):
        write(Output(one, NEW, PAGE), Output(one, NEW, PAGE))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../../x", "a\\b", "a\nb", "a\x00", " a", "x" * 101, ".hidden", "c:x"]
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    """In one line, whatever is in it."""
    with pytest.raises(SdfitError, match="cannot be the name of a file") as caught:
        file_name(name)
    assert "\n" not in str(caught.value)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    """Its size is in the sentence, and what fits exactly is read."""
    path = tmp_path / "x"
    path.write_bytes(bytes(11))
    assert read_bytes(path, 11) == bytes(11)
    with pytest.raises(OSError, match="it has 11 bytes, and may have 10 at most"):
        read_bytes(path, 10)


def test_a_file_that_grows_is_read_as_far_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep writes on while its records are read."""
    path = tmp_path / "x"
    path.write_bytes(b"first\n")
    sizes = os.fstat

    def fstat(handle: int) -> os.stat_result:
        found = sizes(handle)
        with path.open("ab") as file:
            file.write(b"second\n")
        return found

    monkeypatch.setattr(os, "fstat", fstat)
    content = read_bytes(path, 1000)
    assert path.read_bytes().startswith(content) and len(content) < path.stat().st_size


def test_a_file_of_any_size_is_looked_through_for_its_mark(tmp_path: Path) -> None:
    """In pieces, the mark across two of them: an old page of 3 MiB is replaced, and 200 MiB of zeros are not ours."""
    out = tmp_path / "x.html"
    out.write_bytes(bytes((2 << 20) - 4) + OLD + bytes(1 << 20))
    write(Output(out, NEW, PAGE))
    assert out.read_bytes() == NEW
    with out.open("wb") as file:
        file.truncate(200 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(out, "no page of sdfit's")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


# -- fit --


@pytest.mark.parametrize("out", ["records.jsonl", "README.md", "model.md", "none", "README.joblib", "theirs.joblib"])
def test_fit_replaces_nothing_but_its_own(fake_records: Path, tmp_path: Path, out: str) -> None:
    """Not the records, not a page by a card, not a model by its own card, not somebody else's joblib file."""
    records = tmp_path / "records.jsonl"
    records.write_bytes(fake_records.read_bytes())
    (tmp_path / "README.md").write_text("# mine, made by hand")
    (tmp_path / "theirs.joblib").write_bytes(pickle.dumps({"provenance": "mine", "baseline": {"terms": 1}}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SdfitError, match=r"cannot write the (model|card) to "):
        fit_files([records], None, tmp_path / out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_and_its_card_are_replaced_together(fake_model: Path, tmp_path: Path) -> None:
    """Where the card cannot be written, the old model stays with its old card."""
    artifact, model = load_artifact(fake_model), tmp_path / "m.joblib"
    artifact.save(model)
    (tmp_path / "m.md").mkdir()
    with pytest.raises(SdfitError, match=r"cannot write the card to .* it is a directory"):
        write(Output(model, artifact.to_bytes(), MODEL), Output(tmp_path / "m.md", b"Made by `sdfit fit`", CARD))
    assert model.read_bytes() == fake_model.read_bytes() and names(tmp_path) == ["m.joblib", "m.md"]


def test_records_do_not_say_where_the_model_goes(
    fake_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with a path in it is refused, and nothing is written anywhere."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    records = inside / "r.jsonl"
    records.write_text(fake_records.read_text().replace('"name":"fake"', '"name":"../../x"', 1))
    with pytest.raises(SdfitError, match=r"'\.\./\.\./x' cannot be the name of a file"):
        fit_files([records])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a", "a/b", "a/b/r.jsonl"]


def test_figures_replace_figures_only(tmp_path: Path) -> None:
    """A figure is drawn over an earlier one, and over no photograph."""
    pytest.importorskip("matplotlib")
    from sdfit.judging.figures import blank, save

    for suffix in FIGURE.suffixes:
        path = tmp_path / f"x{suffix}"
        for _ in range(2):
            figure, axes = blank(2, 1)
            axes.plot([0, 1])
            save(figure, path)
        path.write_bytes(b"a photograph")
        with pytest.raises(SdfitError, match="no figure of sdfit's"):
            save(figure, path)
    with pytest.raises(SdfitError, match=r"ends in \.png or \.svg or \.pdf"):
        save(figure, tmp_path / "x.txt")


# -- the process --


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of shell, `sdfit` in it our command line."""
    line = command.replace("sdfit", f"{sys.executable} -m sdfit.cli", 1)
    return subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, timeout=40, check=False)


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("sdfit models > /dev/full", 1, "the answer cannot be written: No space left on device"),
        ("sdfit models --json > /dev/full", 1, "the answer cannot be written: No space left on device"),
        ("sdfit models >&-", 1, "standard output is closed"),
        ("sdfit models --json <&- 2>&- | head -c 1", 0, ""),
        ("sdfit predict --gpu none 2> /dev/full", 2, ""),
        ("mkdir gone && cd gone && rmdir ../gone && sdfit models --json > /dev/null", 1, "the current folder was deleted"),
        ("mkdir gone && cd gone && rmdir ../gone && sdfit derive", 1, "the current folder was deleted"),
        ("sdfit sweep --backend fake --grid quick --gpu ../../x", 1, "cannot be the name of a file"),
        ("mkfifo pipe.jsonl && sdfit sweep --backend fake --grid quick --out pipe.jsonl", 1, "no regular file"),
        ("mkfifo pipe.jsonl && sdfit fit pipe.jsonl", 1, "no regular file"),
        ("sdfit sweep --backend fake --grid quick --out /dev/full", 1, "cannot hold records: their files end in .jsonl"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_sentence(tmp_path: Path, command: str, code: int, words: str) -> None:
    """A full disk, a closed stream, a folder that is gone, a pipe: one line on stderr at most, and no wait."""
    ran = shell(command, tmp_path)
    assert words in ran.stderr and "Traceback" not in ran.stderr and "Exception" not in ran.stderr
    assert ran.returncode == code and len(ran.stderr.strip().splitlines()) <= 2, ran.stderr
