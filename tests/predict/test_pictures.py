"""Pictures are measured by their headers; what is wrong with one is told, and the others go on."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

image = pytest.importorskip("PIL.Image")

import sdfit  # noqa: E402
from sdfit.errors import SdfitError  # noqa: E402
from sdfit.predict.pictures import Picture, check, find, look  # noqa: E402
from sdfit.predict.predictor import Predictor  # noqa: E402
from sdfit.units import GIB  # noqa: E402


def saved(path: Path, size: tuple[int, int] = (80, 72), mode: str = "RGB", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size).save(path, **options)
    return path


def huge(path: Path, width: int, height: int) -> Path:
    """A PNG of which there is only the header and the end."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif"])
def test_sizes_come_from_headers(tmp_path: Path, name: str) -> None:
    """Height and width of every common format."""
    remark = "P: taken as RGB" if name == "a.gif" else ""
    assert look(saved(tmp_path / name)) == Picture(tmp_path / name, 72, 80, remark=remark)


@pytest.mark.parametrize(("orientation", "size"), [(1, (72, 80)), (3, (72, 80)), (6, (80, 72)), (8, (80, 72))])
def test_a_rotation_that_the_camera_noted_is_applied(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    """As `diffusers.utils.load_image` does: a picture that was turned has its sides exchanged."""
    exif = image.Exif()
    exif[0x0112] = orientation
    found = look(saved(tmp_path / "turned.jpg", exif=exif))
    assert (found.height, found.width) == size
    transposed = pytest.importorskip("PIL.ImageOps").exif_transpose(image.open(tmp_path / "turned.jpg"))
    assert (transposed.height, transposed.width) == size


def test_200_megapixels_are_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pixel is decoded; that Pillow will not open it is told, with its size; without Pillow's limit it has an answer."""
    before = image.MAX_IMAGE_PIXELS
    found = look(huge(tmp_path / "huge.png", 16384, 12208))
    assert (found.height, found.width) == (12208, 16384)
    assert found.problem == "200 megapixels, and Pillow opens 179 at most (PIL.Image.MAX_IMAGE_PIXELS)"
    assert before == image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", None)
    assert look(tmp_path / "huge.png").problem == ""


FORMATS = ("a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif", "a.ppm")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "I;16"])
def test_a_picture_is_what_load_image_gives(tmp_path: Path, name: str, orientation: int, mode: str) -> None:
    """Of every format, orientation and mode that Pillow writes: height and width of what diffusers gets."""
    load_image = pytest.importorskip("diffusers.utils").load_image
    exif = image.Exif()
    exif[0x0112] = orientation
    try:
        path = saved(tmp_path / name, mode=mode, exif=exif)
    except (OSError, ValueError):
        pytest.skip(f"no {name} of mode {mode}")
    if name == "a.tiff" and mode != "RGB" and orientation in (5, 6, 8):
        pytest.skip("Pillow turns a TIFF that it maps into memory twice")
    loaded, found = load_image(str(path)), look(path)
    assert (found.height, found.width, found.problem) == (loaded.height, loaded.width, "")


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_torn_where_load_image_fails(tmp_path: Path, name: str) -> None:
    """Cut anywhere it is told; whole, or with bytes behind its end, it is not: as Pillow does when it decodes it."""
    load_image = pytest.importorskip("diffusers.utils").load_image
    noise = image.effect_noise((160, 96), 90).convert("RGB")
    thumbnail = image.Exif()
    thumbnail[0x010E] = "a note with an end marker \xff\xd9 in it"
    noise.save(tmp_path / name, **({"exif": thumbnail} if name == "a.jpg" else {}))
    whole = (tmp_path / name).read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9, 1.0, 1.5):
        path = tmp_path / f"cut-{name}"
        length = round(len(whole) * share)
        path.write_bytes(whole[:length] + b"\0" * (length - len(whole)))
        try:
            load_image(str(path))
            loads = True
        except Exception:
            loads = False
        assert (look(path).problem == "") == loads, f"{share} of it"


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    """Empty, no picture, truncated, a folder: a problem each; animated, other modes than RGB: a remark."""
    empty, text, torn = (tmp_path / name for name in ("empty.png", "text.png", "torn.jpg"))
    empty.touch()
    text.write_text("no picture")
    whole = saved(tmp_path / "whole.jpg", (256, 256)).read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    words = [look(path).problem for path in (empty, text, torn, tmp_path)]
    assert words == [
        "an empty file", "not a picture that can be read (unknown format)",
        "truncated: the end of the file is missing", "not a file",
    ]  # fmt: skip
    frames = [image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 200)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert look(tmp_path / "moves.gif").remark == "animated, 2 frames: the first is taken; P: taken as RGB"
    assert look(saved(tmp_path / "deep.png", mode="I;16")).remark == "I;16: taken as RGB"
    assert look(saved(tmp_path / "print.jpg", mode="CMYK")).remark == "CMYK: taken as RGB"


def test_folders_are_searched_in_order_without_hidden_files_and_loops(tmp_path: Path) -> None:
    """What is named counts whatever its name; in folders what ends as pictures do; a link to a folder above ends nothing."""
    names = ["b/2.jpg", "b/1.PNG", "a.png", "b/.hidden.png", "b/.git/x.png", "b/notes.txt", "odd.data"]
    for name in names:
        saved(tmp_path / name, format="PNG")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = [str(p.relative_to(tmp_path)) for p in find([tmp_path / "b", tmp_path, tmp_path / "odd.data"])]
    assert found == ["b/1.PNG", "b/2.jpg", "a.png", "odd.data"]
    with pytest.raises(SdfitError, match=r"there is no ..*none\.png'"):
        find([tmp_path / "none.png"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(SdfitError, match="no picture was found"):
        find([tmp_path / "bare"])


def test_each_picture_gets_an_answer(noisy: Predictor) -> None:
    """What fits, what does not with the largest of its shape, what is too small: a row each, and the others go on."""
    pictures = [
        Picture(Path(n), h, w) for n, h, w in (("a", 512, 512), ("b", 4000, 3000), ("c", 40, 40), ("d", 3000, 4000))
    ]
    answers = check(noisy, [*pictures, Picture(Path("e"), problem="torn")], memory=8 * GIB, level=0.9)
    small, big, tiny, other, torn = answers
    assert small.verdict is not None and small.verdict.answer == "fits" and small.largest == (512, 512)
    assert big.verdict is not None and big.verdict.answer == "does not fit" and big.largest is not None
    height, width = big.largest
    assert abs(height / width - 4 / 3) < 0.02 and noisy.fits(height, width, memory=8 * GIB, level=0.9)
    assert other.largest is not None and other.largest[1] > other.largest[0]
    assert tiny.picture.problem.startswith("height is 40") and tiny.verdict is None
    assert torn.to_dict()["problem"] == "torn" and torn.to_dict()["answer"] is None


@pytest.mark.filterwarnings("ignore::sdfit.errors.SimulatedModelWarning")
def test_a_picture_and_its_run_get_one_answer() -> None:
    """Also where the equation's bounds are so wide that they would let a run of twice the memory fit perhaps."""
    f, memory = sdfit.load("t4"), 24 * GIB
    options: dict[str, Any] = {"dtype": "float32", "attention": "sliced", "batch_size": 8, "guidance_scale": 1.0}
    alone = f.equation(1728, 896, metric="required", level=0.99, **options)
    assert alone.lower < memory < alone / 2
    (answer,) = check(f, [Picture(Path("a"), 1728, 896)], memory=memory, **options)
    there = f.verdict(1728, 896, memory=memory, **options)
    assert answer.verdict and answer.verdict.answer == there.answer == "does not fit"
