"""One img2img job, and the sizes that follow from it.

A `Workload` is validated once, where it is born, and frozen. Everything that the memory depends on is a field;
everything that it does not depend on (the number of steps, the strength, the seed, the values of the weights) is
not, nor is the scheduler, which changes the peak by a few latents at most (``tests/backends/test_strategies.py`` holds it). The discrete fields together are the *variant*: each variant has coefficients of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sdfit.errors import InvalidWorkload, UnknownKeyword, listed, nearest, shown

VAE_SCALE = 8
"""Pixels per latent, each way: diffusers floors both sides of the image to a multiple of it."""
CHUNK_TOKENS = 77
"""What CLIP's tokenizer pads and cuts a prompt to."""
MIN_SIDE, MAX_SIDE = 64, 16384
MAX_BATCH_SIZE = 1024
MAX_PROMPT_LENGTH = 7700
LIMITS = {
    "height": (MIN_SIDE, MAX_SIDE),
    "width": (MIN_SIDE, MAX_SIDE),
    "prompt_length": (1, MAX_PROMPT_LENGTH),
    "batch_size": (1, MAX_BATCH_SIZE),
}
"""The whole-number fields, and the least and most of each [pixels, pixels, tokens, images]."""

CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": ("float16", "bfloat16", "float32"),
    "attention": ("sdpa", "math", "eager", "sliced", "sliced_max", "sliced_2", "sliced_8"),
    "vae": ("kl", "tiny"),
    "vae_slicing": (False, True),
    "vae_tiling": (False, True),
    "offload": ("none", "model", "sequential", "group_block", "group_leaf"),
    "safety_checker": (True, False),
    "execution": ("default", "channels_last", "tf32", "compiled", "int8"),
}
"""The discrete fields and what each may be; the first is the default."""
SLICES = {"sliced": 4, "sliced_max": 1, "sliced_2": 2, "sliced_8": 8}
"""Heads that each kind of sliced attention computes at once, of eight: ``"auto"`` takes half of them, ``"max"`` one."""
STREAMED = {"sequential": "leaf", "group_block": "block", "group_leaf": "leaf"}
"""Kinds of offload that bring weights to the card module by module, of which only what runs is there: in leaves, or whole
blocks at a time."""
ON_A_CARD = ("channels_last", "tf32", "compiled")
"""Executions of which no trace has a number."""
CARD_ALONE = "which kernels then run, and what memory they hold, a card alone can tell; a trace has no number for it"
"""Why, of each of them."""
TINY_BLOCKS = "fails in diffusers itself: of AutoencoderTiny no block is a group, and its weights stay in host memory"
TINY_TILES = "fails in diffusers itself: AutoencoderTiny blends its tiles in float32 and decodes none in 16 bits"
QUANTISED = ("int8", "uint8", "int4", "nf4", "fp4", "fp8", "float8_e4m3fn", "float8_e5m2")
"""Weights that people ask for as a dtype, and that none of `CHOICES` is."""
NOT_QUANTISED = (
    "of quantised weights those of execution='int8' alone are known, the UNet's linear layers by optimum-quanto; "
    "bitsandbytes refuses to quantise without a card, what torchao, SDNQ and others widen is not worked out"
)
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
VARIANT_FIELDS = tuple(CHOICES)
VariantKey = tuple[str, str, str, bool, bool, str, bool, str]


def effective(
    height: Any, width: Any, prompt_length: Any, batch_size: Any, guidance_scale: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """What a call really runs: sides floored to a multiple of 8 [pixels], tokens, images, samples per UNet call.

    A prompt of up to 77 tokens is padded to 77; classifier-free guidance doubles the UNet's samples. Numbers or arrays.

    Examples
    --------
    >>> effective(380, 396, 12, 2, 7.5)
    (376, 392, 77, 2, 4)
    """
    return (
        height // VAE_SCALE * VAE_SCALE,
        width // VAE_SCALE * VAE_SCALE,
        prompt_length + (CHUNK_TOKENS - prompt_length) * (prompt_length < CHUNK_TOKENS),
        batch_size,
        batch_size * (1 + (guidance_scale > 1)),
    )


def plain_run(
    height: Any, width: Any, prompt_length: Any, batch_size: Any, guidance_scale: Any
) -> tuple[int, int, int, int, int] | None:
    """`effective` of plain numbers within the limits, as nearly all are: checked and worked out in one go.

    None of others, which may still be valid, as NumPy's are: `Workload` looks closer, and says what is wrong.
    """
    if (
        type(height) is type(width) is type(prompt_length) is type(batch_size) is int
        and MIN_SIDE <= height <= MAX_SIDE
        and MIN_SIDE <= width <= MAX_SIDE
        and 0 < prompt_length <= MAX_PROMPT_LENGTH
        and 0 < batch_size <= MAX_BATCH_SIZE
        and type(guidance_scale) is float
        and 0 <= guidance_scale < math.inf
    ):
        return (
            height - height % VAE_SCALE,
            width - width % VAE_SCALE,
            prompt_length if prompt_length > CHUNK_TOKENS else CHUNK_TOKENS,
            batch_size,
            batch_size * 2 if guidance_scale > 1 else batch_size,
        )
    return None


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """Check one integer field; numpy integers pass, floats and booleans do not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception:  # whatever anybody's __index__ raises
        raise InvalidWorkload(
            f"{name} must be a whole number from {low} to {high}, not {shown(value)}", field=name, given=value
        ) from None
    if not low <= number <= high:
        # Python refuses to print a number of thousands of digits
        words = str(number) if number.bit_length() < 256 else f"a number of {number.bit_length()} bits"
        raise InvalidWorkload(f"{name} is {words}; it must be from {low} to {high}", field=name, given=number)
    return number


def real_number(name: str, value: object) -> float:
    """Check one real field: finite and not negative."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except Exception:  # whatever anybody's __float__ raises
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise InvalidWorkload(f"{name} must be a finite number >= 0, not {shown(value)}", field=name, given=value)
    return number


def one_of(name: str, value: object) -> Any:
    """Check one discrete field against `CHOICES`; NumPy's booleans and strings pass, 0 and 1 do not."""
    allowed = CHOICES[name]
    plain = value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value  # type: ignore[attr-defined]
    for choice in allowed:
        if type(choice) is type(plain) and choice == plain:
            return choice
    why = f"; {NOT_QUANTISED}" if name == "dtype" and isinstance(plain, str) and plain in QUANTISED else ""
    raise InvalidWorkload(f"{name} must be one of {listed(allowed)}, not {shown(plain)}{why}", field=name, given=value)


@dataclass(frozen=True, slots=True)
class Workload:
    """One Stable Diffusion v1.5 img2img call, as far as its memory is concerned.

    Parameters
    ----------
    height, width : int
        Sides of the input image [pixels], 64 to 16384. diffusers floors each to a multiple of 8.
    prompt_length : int
        Tokens of the prompt, the two special ones included. 1 to 77 cost the same (the tokenizer pads to 77); more
        than 77 means that many rows of ``prompt_embeds``.
    batch_size : int
        Images per call.
    guidance_scale : float
        Above 1 classifier-free guidance is on, which doubles the UNet's batch; its value is otherwise irrelevant.
    dtype : {'float16', 'bfloat16', 'float32'}
    attention : {'sdpa', 'math', 'eager', 'sliced', 'sliced_max', 'sliced_2', 'sliced_8'}
        ``sdpa``: `AttnProcessor2_0` with a fused kernel (the default since torch 2); ``math``: the same processor with
        the fused kernels switched off; ``eager``: `AttnProcessor`; ``sliced``: `enable_attention_slicing`, with
        ``"auto"``; ``sliced_max``: with ``"max"``; ``sliced_2`` and ``sliced_8``: with that number (see `SLICES`).
    vae : {'kl', 'tiny'}
        `AutoencoderKL`, or `AutoencoderTiny` (TAESD).
    vae_slicing, vae_tiling : bool
    offload : {'none', 'model', 'sequential', 'group_block', 'group_leaf'}
        ``model``: `enable_model_cpu_offload`; ``sequential``: `enable_sequential_cpu_offload`; ``group_block`` and
        ``group_leaf``: `enable_group_offload` of one block a group, or of leaves, without streams.
    safety_checker : bool
    execution : {'default', 'channels_last', 'tf32', 'compiled', 'int8'}
        How the UNet is run: its weights in channels-last format, TF32 for float32 matrix products, or ``unet.compile()``; which
        kernels run then, and what they hold, a card alone can tell. ``int8``: the weights of its linear layers, a third of all,
        are whole numbers of 8 bits, as diffusers' ``QuantoConfig(weights_dtype="int8")`` makes them; each is widened while it runs.

    Raises
    ------
    InvalidWorkload
        If a value is of the wrong kind or outside its range; the message has the value and the range.

    Examples
    --------
    >>> w = Workload(380, 396)
    >>> w.effective_height, w.effective_width, w.unet_batch
    (376, 392, 2)
    >>> Workload(512, 0)
    Traceback (most recent call last):
    ...
    sdfit.errors.InvalidWorkload: width is 0; it must be from 64 to 16384
    """

    height: int
    width: int
    prompt_length: int = CHUNK_TOKENS
    batch_size: int = 1
    guidance_scale: float = 7.5
    dtype: str = "float16"
    attention: str = "sdpa"
    vae: str = "kl"
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload: str = "none"
    safety_checker: bool = True
    execution: str = "default"

    def __post_init__(self) -> None:
        put = object.__setattr__
        if plain_run(self.height, self.width, self.prompt_length, self.batch_size, self.guidance_scale) is None:
            for name, limits in LIMITS.items():
                put(self, name, whole_number(name, getattr(self, name), *limits))
            put(self, "guidance_scale", real_number("guidance_scale", self.guidance_scale))
        for name in VARIANT_FIELDS:
            put(self, name, one_of(name, getattr(self, name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Workload:
        """Build a Workload from keywords; an unknown one is a `TypeError` that names the nearest known one."""
        if not isinstance(values, Mapping):
            raise InvalidWorkload(f"a workload is a table of its fields, not {shown(values)}", given=values)
        check_keywords(values)
        for name in ("height", "width"):
            if name not in values:
                raise InvalidWorkload(f"a workload needs height and width; it has no {name}", field=name)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as plain values."""
        return {name: getattr(self, name) for name in WORKLOAD_FIELDS}

    @property
    def runs_as(self) -> tuple[int, int, int, int, int]:
        """What it really runs as: rows and columns of pixels, tokens, images, samples per UNet call; see `effective`."""
        return effective(self.height, self.width, self.prompt_length, self.batch_size, self.guidance_scale)

    @property
    def effective_height(self) -> int:
        """Rows of pixels that really run: floored to a multiple of 8."""
        return self.runs_as[0]

    @property
    def effective_width(self) -> int:
        """Columns of pixels that really run: floored to a multiple of 8."""
        return self.runs_as[1]

    @property
    def pixels(self) -> int:
        """A: effective pixels of one image."""
        return self.effective_height * self.effective_width

    @property
    def tokens(self) -> int:
        """L: tokens as the UNet sees them; a prompt of up to 77 is padded to 77."""
        return self.runs_as[2]

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance_scale > 1

    @property
    def unet_batch(self) -> int:
        """n: samples per UNet call."""
        return self.runs_as[4]

    @property
    def variant(self) -> VariantKey:
        """The discrete fields, in the order of `VARIANT_FIELDS`."""
        return (
            self.dtype,
            self.attention,
            self.vae,
            self.vae_slicing,
            self.vae_tiling,
            self.offload,
            self.safety_checker,
            self.execution,
        )


WORKLOAD_FIELDS = tuple(f.name for f in fields(Workload))


def check_keywords(given: Mapping[str, Any] | set[str], also: tuple[str, ...] = ()) -> None:
    """Refuse a keyword that is no Workload field (nor one of ``also``), naming the nearest known one."""
    for name in given:
        if name not in WORKLOAD_FIELDS and name not in also:
            raise UnknownKeyword(f"unknown keyword '{name}'{nearest(name, WORKLOAD_FIELDS + also)}", given=name)


def variant_name(key: VariantKey) -> str:
    """A variant in words: the dtype, the attention, and what is not at its default.

    Examples
    --------
    >>> variant_name(Workload(512, 512, vae_tiling=True, safety_checker=False).variant)
    'float16 sdpa vae_tiling=True safety_checker=False'
    """
    rest = [
        f"{name}={value}" for name, value in zip(VARIANT_FIELDS[2:], key[2:], strict=True) if value != CHOICES[name][0]
    ]
    return " ".join([key[0], key[1], *rest])


def why_it_fails(key: VariantKey) -> str:
    """Why diffusers fails on a variant, whatever the size; empty if it runs.

    Examples
    --------
    >>> why_it_fails(Workload(512, 512, vae="tiny", vae_tiling=True).variant)[:52]
    "vae_tiling with vae='tiny' in float16 fails in diffu"
    """
    values = dict(zip(VARIANT_FIELDS, key, strict=True))
    if values["vae"] == "tiny" and values["offload"] == "group_block":
        return f"offload='group_block' with vae='tiny' {TINY_BLOCKS}"
    if values["vae"] == "tiny" and values["vae_tiling"] and values["dtype"] != "float32":
        return f"vae_tiling with vae='tiny' in {values['dtype']} {TINY_TILES}"
    return ""
