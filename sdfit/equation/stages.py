"""The stages of a run: which there are, which weights are on the card in each, which fields reach it, what it counts.

A stage begins when its first module is called and lasts until the next one begins, so the work between two modules
(the scheduler's step, sampling the latents) counts to the stage before it. With VAE tiling or slicing the VAE's
stages come round many times; a stage's peak is the highest of its visits. Where weights come module by module the UNet
is two stages: its deep blocks (a quarter of the size and below), which have most of the weights, and the others, which have
the large feature maps. Which of them sets its peak depends on the size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sdfit.workload import CHOICES, SLICES, STREAMED, VARIANT_FIELDS, VariantKey

StageKey = tuple[str, ...]
"""A stage and the values of the fields that reach it: what one set of coefficients belongs to."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of the pipeline in which the peak is one polynomial.

    Parameters
    ----------
    name : str
    batch : str
        The letter of `sdfit.equation.sizes.Sizes` that it counts its images or samples by.
    fields : tuple of str
        The discrete fields that its coefficients depend on: variants that agree in these share them. VAE slicing and
        tiling are not among them: they change m, P and D, and a pass over a slice or a tile is a pass over an image
        of that size.
    terms : tuple of str
        Of `sdfit.equation.terms.TERMS`, in the order in which the data may claim them when it cannot tell two apart.
    widest_channels : int
        Channels of its widest tensor at full resolution, where that can pass 2^31 elements; else 0.
    """

    name: str
    batch: str
    fields: tuple[str, ...]
    terms: tuple[str, ...]
    widest_channels: int = 0


_BLOCKS, _MID, _VAE = (
    ("dtype", "vae"),
    ("dtype", "attention", "vae"),
    ("1", "m·P", "m·P²", "m", "n·L", "n·A", "B·A", "D"),
)
_UNET = ("1", "n·A", "n·A²", "n", "n·L·A", "n·L")
_STAGES = (
    #     name                  batch fields                  terms                       channels
    Stage("text_encoder",       "B", ("dtype",),              ("1", "n", "n·L")),
    Stage("vae_encoder_blocks", "m", _BLOCKS,                 _VAE,                       128),
    Stage("vae_encoder_mid",    "m", _MID,                    _VAE),
    Stage("unet",               "n", ("dtype", "attention"),  _UNET),
    Stage("unet_deep",          "n", ("dtype", "attention"),  _UNET),
    Stage("vae_decoder_mid",    "m", _MID,                    _VAE),
    Stage("vae_decoder_blocks", "m", _BLOCKS,                 _VAE,                       256),
    Stage("safety_checker",     "B", ("dtype",),              ("1", "B", "B·A", "n·L")),
)  # fmt: skip
STAGE = {stage.name: stage for stage in _STAGES}
STAGES = tuple(STAGE)
"""Their names, in the order in which they run. The text encoder is called once for the prompts and once for the
negative ones, so its own batch is B. ``unet_deep`` is there only where weights come module by module (`stages_of`)."""

UNET_STAGES = tuple(stage for stage in STAGES if stage.startswith("unet"))
"""Those of the UNet."""

COMPONENTS = ("vae", "text_encoder", "unet", "safety_checker")
"""What has weights, in the order in which the pipeline holds it and so, usually, loads it."""

RESIDENT_WHEN_OFFLOADED = {
    "text_encoder": ("text_encoder", "safety_checker"),
    "vae_encoder_blocks": ("text_encoder", "vae", "safety_checker"),
    "vae_encoder_mid": ("text_encoder", "vae", "safety_checker"),
    "unet": ("unet", "vae", "safety_checker"),
    "unet_deep": ("unet", "vae", "safety_checker"),
    "vae_decoder_mid": ("vae", "safety_checker"),
    "vae_decoder_blocks": ("vae", "safety_checker"),
    "safety_checker": ("vae", "safety_checker"),
}
"""Which components `enable_model_cpu_offload` keeps on the card in each stage.

Loading one frees the one before it in text_encoder -> unet -> vae, so the VAE that encoded stays while the UNet runs;
the checker is never offloaded. Source: `model_cpu_offload_seq` and `_exclude_from_cpu_offload` of the pipeline,
accelerate's `CpuOffload`.
"""


RESIDENT_WHEN_STREAMED = {"sequential": ("safety_checker",), "group_block": (), "group_leaf": ()}
"""Which components are on the card as a whole when weights come module by module: sequential offload leaves the checker
there (`_exclude_from_cpu_offload`), group offload nothing. What comes and goes counts to the stage's coefficients."""


def resident(stage: str, offload: str) -> tuple[str, ...]:
    """The components whose weights are on the card while a stage runs.

    Examples
    --------
    >>> resident("unet", "model")
    ('unet', 'vae', 'safety_checker')
    """
    if offload in STREAMED:
        return RESIDENT_WHEN_STREAMED[offload]
    return COMPONENTS if offload == "none" else RESIDENT_WHEN_OFFLOADED[stage]


@cache
def stage_key(stage: str, variant: VariantKey) -> StageKey:
    """Name the coefficients that a stage of a variant uses: the stage and the fields that reach it.

    ``enable_attention_slicing`` does not reach the VAE, so its mid block runs ``sdpa`` there. Where weights come module by
    module the peak may lie elsewhere, so every stage then has coefficients of its own, whichever hooks bring the same
    modules; so it has where other kernels run.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> stage_key("unet", Workload(512, 512).variant)
    ('unet', 'float16', 'sdpa')
    """
    values = dict(zip(VARIANT_FIELDS, variant, strict=True))
    if stage.startswith("vae") and values["attention"] in SLICES:
        values["attention"] = "sdpa"
    key = (stage, *(str(values[name]) for name in STAGE[stage].fields))
    if values["offload"] in STREAMED:
        key += (STREAMED[str(values["offload"])],)
    if values["execution"] != "default" and (stage in UNET_STAGES or values["execution"] == "tf32"):
        key += (str(values["execution"]),)
    return key


def is_stage_key(key: StageKey) -> bool:
    """Whether a key is one that `stage_key` can give.

    Examples
    --------
    >>> is_stage_key(("unet", "float16", "sdpa", "leaf")), is_stage_key(("unet", "float16", "sdpa", "none"))
    (True, False)
    """
    if not key or key[0] not in STAGE or len(key) < 1 + len(STAGE[key[0]].fields):
        return False
    rest = key[1 + len(STAGE[key[0]].fields) :]
    offloads = rest[:1] if rest and rest[0] in STREAMED.values() else ()
    executions = rest[len(offloads) :]
    return len(executions) <= 1 and all(e in CHOICES["execution"][1:] for e in executions)


def beside(key: StageKey) -> StageKey | None:
    """The coefficients that may stand beside a stage's, whichever gives more; None where a stage of its own has that name.

    The UNet is one stage unless its weights come module by module. What sets its peak is one operation in its blocks of few
    pixels and many channels, another in those of many pixels: two lines in the sizes, of which the higher counts. On Pascal,
    whose convolutions hold their filters widened, the first matters up to some megapixels. No attention is at work there, so
    all kinds of it share that line.

    Examples
    --------
    >>> beside(("unet", "float16", "eager")), beside(("unet", "float16", "sdpa", "leaf"))
    (('unet_deep', 'float16', 'sdpa'), None)
    """
    other = ("unet_deep", *told_by(key)[1:])
    return other if key[0] == "unet" and is_beside(other) else None


def told_by(key: StageKey) -> StageKey:
    """Of a UNet's key the one whose runs tell what stands beside it: those with fused attention, which hides least of it.

    Examples
    --------
    >>> told_by(("unet", "float16", "eager", "int8"))
    ('unet', 'float16', 'sdpa', 'int8')
    """
    return (*key[:2], "sdpa", *key[3:])


def is_beside(key: StageKey) -> bool:
    """Whether a key is one that `beside` gives."""
    return key[0] == "unet_deep" and set(STREAMED.values()).isdisjoint(key)


@cache
def stages_of(variant: VariantKey) -> tuple[str, ...]:
    """The stages that a variant runs through: the tiny VAE has no mid block, the checker may be absent.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> stages_of(Workload(512, 512, vae="tiny", safety_checker=False, offload="sequential").variant)
    ('text_encoder', 'vae_encoder_blocks', 'unet', 'unet_deep', 'vae_decoder_blocks')
    """
    values = dict(zip(VARIANT_FIELDS, variant, strict=True))
    skipped = {"safety_checker"} if not values["safety_checker"] else set()
    if values["vae"] == "tiny":
        skipped |= {"vae_encoder_mid", "vae_decoder_mid"}
    if values["offload"] not in STREAMED:
        skipped |= {"unet_deep"}
    return tuple(stage for stage in STAGES if stage not in skipped)
