"""Which stage the pipeline is in: boundaries set by hooks on its modules.

A stage begins when its first module is called and lasts until the next one begins, so the work between two modules
(the scheduler's step, sampling the latents) counts to the stage before it. With VAE tiling or slicing the VAE's
stages come round many times; a stage's peak is the highest of its visits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STAGES = (
    "text_encoder",
    "vae_encoder_blocks",
    "vae_encoder_mid",
    "unet",
    "vae_decoder_mid",
    "vae_decoder_blocks",
    "safety_checker",
)
"""In the order in which they run."""


COMPONENTS = ("vae", "text_encoder", "unet", "safety_checker")
"""What has weights, in the order in which the pipeline holds it and so, usually, loads it."""

RESIDENT_WHEN_OFFLOADED = {
    "text_encoder": ("text_encoder", "safety_checker"),
    "vae_encoder_blocks": ("text_encoder", "vae", "safety_checker"),
    "vae_encoder_mid": ("text_encoder", "vae", "safety_checker"),
    "unet": ("unet", "vae", "safety_checker"),
    "vae_decoder_mid": ("vae", "safety_checker"),
    "vae_decoder_blocks": ("vae", "safety_checker"),
    "safety_checker": ("vae", "safety_checker"),
}
"""Which components `enable_model_cpu_offload` keeps on the card in each stage.

Loading one frees the one before it in text_encoder -> unet -> vae, so the VAE that encoded stays while the UNet runs;
the checker is never offloaded. Source: `model_cpu_offload_seq` and `_exclude_from_cpu_offload` of the pipeline,
accelerate's `CpuOffload`.
"""


def resident(stage: str, offload: str) -> tuple[str, ...]:
    """The components whose weights are on the card while a stage runs.

    Examples
    --------
    >>> resident("unet", "model")
    ('unet', 'vae', 'safety_checker')
    """
    return COMPONENTS if offload == "none" else RESIDENT_WHEN_OFFLOADED[stage]


def boundaries(pipe: Any) -> list[tuple[Any, str, str]]:
    """List where stages begin: (module, ``before`` or ``after`` its forward, the stage that begins there)."""
    encoder, decoder = pipe.vae.encoder, pipe.vae.decoder
    marks = [
        (encoder, "before", "vae_encoder_blocks"),
        (pipe.unet, "before", "unet"),
    ]
    if hasattr(encoder, "mid_block"):
        marks += [
            (encoder.mid_block, "before", "vae_encoder_mid"),
            (encoder.mid_block, "after", "vae_encoder_blocks"),
            (decoder, "before", "vae_decoder_mid"),
            (decoder.mid_block, "after", "vae_decoder_blocks"),
        ]
    else:
        marks.append((decoder, "before", "vae_decoder_blocks"))
    if pipe.safety_checker is not None:
        marks.append((pipe.safety_checker, "before", "safety_checker"))
    return marks


@contextmanager
def watched(pipe: Any, enter: Callable[[str], None]) -> Iterator[None]:
    """Call ``enter(stage)`` at each stage boundary of every run inside the ``with`` block, the first one at once."""
    handles = []
    for module, when, stage in boundaries(pipe):
        hook = _hook(enter, stage)
        register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
        handles.append(register(hook))
    enter(STAGES[0])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(enter: Callable[[str], None], stage: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        enter(stage)

    return hook
