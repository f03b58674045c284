"""Where the stages begin and end in a pipeline: hooks on its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sdfit.equation.stages import COMPONENTS, STAGES


def boundaries(pipe: Any, *, streamed: bool = False) -> list[tuple[Any, str, str]]:
    """List where stages begin: (module, ``before`` or ``after`` its forward, the stage that begins there).

    Where weights come module by module (``streamed``) the UNet's blocks at a quarter of the size and below are a stage of
    their own.
    """
    encoder, decoder, unet = pipe.vae.encoder, pipe.vae.decoder, pipe.unet
    marks = [
        (encoder, "before", "vae_encoder_blocks"),
        (unet, "before", "unet"),
    ]
    if streamed:
        marks += [(unet.down_blocks[-2], "before", "unet_deep"), (unet.up_blocks[-2], "before", "unet")]
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
def watched(pipe: Any, enter: Callable[[str], None], *, streamed: bool = False) -> Iterator[None]:
    """Call ``enter(stage)`` at each stage boundary of every run inside the ``with`` block, the first one at once."""
    handles = []
    for module, when, stage in boundaries(pipe, streamed=streamed):
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


@contextmanager
def modules_followed(pipe: Any, begins: Callable[[str], None], ends: Callable[[], object]) -> Iterator[None]:
    """Call ``begins(path)`` before and ``ends()`` after every call of a module inside the ``with`` block."""

    def ended(*_: Any) -> None:  # what a hook gives back would stand for the module's output
        ends()

    handles = []
    for component in COMPONENTS:
        module = getattr(pipe, component)
        if module is None:
            continue
        for path, part in module.named_modules(prefix=component):
            handles.append(part.register_forward_pre_hook(_hook(begins, path), prepend=True))
            handles.append(part.register_forward_hook(ended))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
