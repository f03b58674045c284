"""What the components of Stable Diffusion v1.5 weigh: parameter counts, the bytes they take, what they are called.

The one place for these numbers; the settings that give rise to them stand in `sdfit.backends.pipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdfit.workload import CHOICES, DTYPE_BYTES, Workload

PARAMETERS = {
    "unet": 859_520_964,
    "vae": 83_653_863,
    "vae_tiny": 2_445_063,
    "text_encoder": 123_060_480,
    "safety_checker": 303_981_588,
}
"""Parameters of each component.

Source: counted on diffusers' own classes built from the settings of stable-diffusion-v1-5/stable-diffusion-v1-5
(`UNet2DConditionModel`, `AutoencoderKL`, `AutoencoderTiny`, `CLIPTextModel`, `StableDiffusionSafetyChecker`). Buffers
(position ids, a few kB) are not parameters and are not counted, nor is the allocator's rounding.
"""
INT8_WEIGHTS, INT8_SCALES = 270_049_280, 234_880
"""Of the UNet's parameters those that ``execution="int8"`` keeps in 8 bits, the weights of its linear layers; and the scales
that it keeps beside them in the run's dtype, one for each output."""
COMPONENT_BYTES = {
    dtype: {name: count * size for name, count in PARAMETERS.items()} for dtype, size in DTYPE_BYTES.items()
}
"""Bytes of the weights by dtype and component."""

GRANULE_BYTES = 512
"""What PyTorch's caching allocator counts blocks in: `kMinBlockSize`, c10/cuda/CUDACachingAllocator.cpp."""


def rounded(size_bytes: int) -> int:
    """Round a request for memory up to the 512 B that the caching allocator counts in (its `round_size`).

    Examples
    --------
    >>> rounded(1), rounded(512), rounded(513)
    (512, 512, 1024)
    """
    return -(-size_bytes // GRANULE_BYTES) * GRANULE_BYTES


def component_bytes(workload: Workload) -> dict[str, int]:
    """List the weights that a workload's pipeline holds, by component [bytes].

    Parameters
    ----------
    workload : Workload
        ``dtype``, ``vae``, ``safety_checker`` and ``execution`` matter.

    Returns
    -------
    dict of str to int
        In the order unet, vae, text_encoder, safety_checker (the last only where the workload has it).

    Examples
    --------
    >>> component_bytes(Workload(512, 512, vae="tiny", safety_checker=False))
    {'unet': 1719041928, 'vae': 4890126, 'text_encoder': 246120960}
    """
    sizes = COMPONENT_BYTES[workload.dtype]
    parts = {
        "unet": sizes["unet"],
        "vae": sizes["vae" if workload.vae == "kl" else "vae_tiny"],
        "text_encoder": sizes["text_encoder"],
    }
    if workload.execution == "int8":
        parts["unet"] += INT8_WEIGHTS + (INT8_SCALES - INT8_WEIGHTS) * DTYPE_BYTES[workload.dtype]
    if workload.safety_checker:
        parts["safety_checker"] = sizes["safety_checker"]
    return parts


def weights_bytes(workload: Workload) -> int:
    """Add up the weights of every component of a workload's pipeline [bytes].

    Where they are is not its concern: with ``offload="model"`` the card holds one component at a time.

    Examples
    --------
    >>> weights_bytes(Workload(512, 512, safety_checker=False))
    2132470614
    >>> weights_bytes(Workload(512, 512))
    2740433790
    """
    return sum(component_bytes(workload).values())


def with_both_baselines(weights: Mapping[str, int]) -> dict[str, int]:
    """Add what was allocated with or without the checker where only the other was swept: the checker's weights apart.

    What the allocator holds around the weights then differs from the truth by a few MB.

    Examples
    --------
    >>> with_both_baselines({"safety_checker": 10, "all/kl/checked": 105})["all/kl/unchecked"]
    95
    """
    found = dict(weights)
    if "safety_checker" not in weights:
        return found
    checker = weights["safety_checker"]
    for vae in CHOICES["vae"]:
        checked, unchecked = baseline_label(str(vae), True), baseline_label(str(vae), False)
        if checked in weights:
            found.setdefault(unchecked, weights[checked] - checker)
        if unchecked in weights:
            found.setdefault(checked, weights[unchecked] + checker)
    return found


def weights_table(dtype: str, execution: str) -> str:
    """Which of an artifact's component tables holds a run's weights: its dtype's, and another where the UNet has 8 bits.

    Examples
    --------
    >>> weights_table("float16", "compiled"), weights_table("float16", "int8")
    ('float16', 'float16/int8')
    """
    return f"{dtype}/int8" if execution == "int8" else dtype


WEIGHTS_TABLES = tuple(weights_table(dtype, execution) for dtype in DTYPE_BYTES for execution in ("default", "int8"))


def baseline_label(vae: str, safety_checker: bool) -> str:
    """Where an artifact's component table keeps what was allocated before a run of this pipeline.

    Examples
    --------
    >>> baseline_label("kl", True)
    'all/kl/checked'
    """
    return f"all/{vae}/{'checked' if safety_checker else 'unchecked'}"
