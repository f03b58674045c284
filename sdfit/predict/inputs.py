"""What diffusers makes of the image that a call gives it: pixels, or latents, of what size, and how many.

The rules are those of diffusers' `VaeImageProcessor.preprocess` and of the pipeline's `prepare_latents`, tried on real
pipelines by `tests/predict/test_calls.py`. One of them surprises: **four channels are latents**, whatever they were meant
as, so an RGBA picture runs at eight times its height and width. Neither Pillow nor torch is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdfit.errors import InvalidWorkload
from sdfit.workload import VAE_SCALE

LATENT_CHANNELS, PIXEL_CHANNELS = 4, 3
CHANNELS = {
    "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3,
    "RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4,
    "LA": 2, "La": 2, "PA": 2,
}  # fmt: skip
"""Channels of a Pillow picture by its mode; every other mode (L, P, 1, I, F, I;16) has one."""


@dataclass(frozen=True, slots=True)
class Input:
    """The image of a call as it runs.

    Parameters
    ----------
    height, width : int
        Of what comes out [pixels].
    count : int
        Images in it.
    latents : bool
        Whether diffusers takes it for latents: they are not encoded.
    unknown : str
        What of it sdfit does not know; empty if nothing.
    remark : str
        What the caller may not have meant; empty if nothing.
    """

    height: int
    width: int
    count: int
    latents: bool = False
    unknown: str = ""
    remark: str = ""


def look(image: Any, *, to_rgb: bool = False) -> Input:
    """What diffusers makes of an image.

    Parameters
    ----------
    image : PIL image, array, tensor, or list of them
        As the pipeline takes it.
    to_rgb : bool
        Whether the pipeline's image processor converts pictures to RGB (``do_convert_rgb``); diffusers' does not.

    Raises
    ------
    InvalidWorkload
        If diffusers fails on it; with its reason.
    """
    if image is None:
        raise InvalidWorkload("the call has no image; give image=, a PIL image, an array, a tensor or a list of them")
    many = list(image) if isinstance(image, list) else [image]
    kinds = {_kind(one) for one in many}
    if not many or len(kinds) > 1 or "" in kinds:
        given = listed_types(many) if many and not isinstance(image, tuple) else f"{type(image).__name__} {image!r:.40}"
        raise InvalidWorkload(
            f"diffusers takes no {given} as image; give a PIL image, an array, a tensor or a list of one of these"
        )
    kind = kinds.pop()
    found = _pictures(many, to_rgb) if kind == "picture" else _stacked(many, kind)
    if min(found.height, found.width) < VAE_SCALE:
        raise InvalidWorkload(
            f"diffusers fails on an image of {found.height}x{found.width}: it floors both to multiples of 8"
        )
    return found


def listed_types(many: Sequence[Any]) -> str:
    """The types of some images, each once, for a message."""
    return "list of " + " and ".join(sorted({type(one).__name__ for one in many}))


def _kind(image: Any) -> str:
    """``picture``, ``array`` or ``tensor``, by where its class comes from; '' for anything else."""
    for cls in type(image).__mro__:
        home = cls.__module__.partition(".")[0]
        if home == "PIL" and hasattr(image, "mode"):
            return "picture"
        if home in ("numpy", "torch") and hasattr(image, "shape"):
            return "array" if home == "numpy" else "tensor"
    return ""


def _pictures(many: list[Any], to_rgb: bool) -> Input:
    """Pillow's: all are resized to the first one's size, floored to a multiple of 8, in the mode that they have."""
    first = many[0]
    height, width = _floor(first.height), _floor(first.width)
    channels = {PIXEL_CHANNELS if to_rgb else CHANNELS.get(one.mode, 1) for one in many}
    modes = " and ".join(dict.fromkeys(f"'{one.mode}'" for one in many))
    if len(channels) > 1:
        raise InvalidWorkload(f"diffusers cannot stack pictures of modes {modes}; give each as .convert('RGB')")
    return _read(height, width, len(many), channels.pop(), f"a picture of mode {modes}", "give it as .convert('RGB')")


def _stacked(many: list[Any], kind: str) -> Input:
    """Arrays (height, width, channels) and tensors (channels, height, width), alone, stacked, or in a list."""
    shapes = [tuple(int(side) for side in one.shape) for one in many]
    first = shapes[0]
    whole = len(first) == 4  # lists of these are joined, of others stacked
    if len(first) not in (2, 3, 4) or (kind == "tensor" and len(first) == 2):
        layout = "(height, width, 3)" if kind == "array" else "(3, height, width)"
        raise InvalidWorkload(
            f"diffusers fails on an image {kind} of shape {first}; it takes {layout} or a stack of these"
        )
    if any(shape[whole:] != first[whole:] or len(shape) != len(first) for shape in shapes):
        raise InvalidWorkload(
            f"diffusers cannot stack image {kind}s of shapes {' and '.join(map(str, dict.fromkeys(shapes)))}"
        )
    count = sum(shape[0] for shape in shapes) if whole else len(shapes)
    sides = first[whole:]
    if kind == "array":
        height, width, channels = (*sides, 1)[:3]
    else:
        channels, height, width = sides
    latents = channels == LATENT_CHANNELS
    if not (latents and kind == "tensor"):  # which alone are taken as they are
        height, width = _floor(height), _floor(width)
    order = "(height, width, 3)" if kind == "array" else "(3, height, width)"
    found = _read(height, width, count, channels, f"an image {kind} of shape {first}", f"give {order}")
    on_card = (
        getattr(getattr(many[0], "device", None), "type", "cpu") not in ("cpu", "meta") if kind == "tensor" else False
    )
    if on_card and not latents:
        return Input(
            found.height,
            found.width,
            count,
            unknown="pixels that are on the card already (their copies count); give them on the CPU",
        )
    return found


def _floor(side: int) -> int:
    return int(side) // VAE_SCALE * VAE_SCALE


def _read(height: int, width: int, count: int, channels: int, what: str, change: str) -> Input:
    if channels == PIXEL_CHANNELS:
        return Input(height, width, count)
    if channels != LATENT_CHANNELS:
        raise InvalidWorkload(
            f"diffusers fails on {what}: it has {channels} channel{'s' * (channels != 1)}, and the VAE takes {PIXEL_CHANNELS}; {change}"
        )
    tall, wide = height * VAE_SCALE, width * VAE_SCALE
    remark = (
        ""
        if what.startswith("an image tensor")
        else (
            f"diffusers takes {what} for latents, for it has four channels, and makes {tall}x{wide} pixels of it; {change}"
        )
    )
    return Input(tall, wide, count, latents=True, remark=remark)
