"""The pipeline's modules as a simulated run calls them: their programs, played on its meter."""

from __future__ import annotations

from math import prod
from typing import Any

from sdfit.equation.weights import rounded
from sdfit.predict.simulation.card import Card
from sdfit.predict.simulation.library import Key, Library
from sdfit.predict.simulation.meter import Span
from sdfit.predict.simulation.programs import (
    ALL_SLICES,
    CHECKER,
    DECODER,
    ENCODER,
    PICTURE,
    TEXT,
    UNET,
    Convolution,
    Lengths,
    Taken,
)
from sdfit.predict.simulation.tape import Tensor, empty, given
from sdfit.workload import DTYPE_BYTES, STREAMED, VAE_SCALE, Workload

COMPONENT = {TEXT: "text_encoder", UNET: "unet", ENCODER: "vae", DECODER: "vae", CHECKER: "safety_checker"}
"""That a module belongs to."""
LATENT_CHANNELS, IMAGE_CHANNELS, TEXT_CHANNELS = 4, 3, 768


class Modules:
    """Text encoder, UNet, the VAE's encoder and decoder, and the safety checker of one run.

    Parameters
    ----------
    workload : Workload
    card : Card
    library : Library
    convolution : callable, optional
        See `sdfit.predict.simulation.programs.Convolution`; None: no kernel holds anything.
    most_slices : int
        See `sdfit.predict.simulation.programs.Program.call`.
    taken : dict, optional
        Calls of other runs of the same kernels, of modules that do not see the image.
    one_pixel : bool
        See `sdfit.predict.simulation.simulate.Simulator`.
    """

    def __init__(
        self,
        workload: Workload,
        card: Card,
        library: Library,
        convolution: Convolution | None,
        most_slices: int = ALL_SLICES,
        taken: dict[Any, Taken] | None = None,
        *,
        one_pixel: bool = False,
    ) -> None:
        self.workload, self.card, self.meter = workload, card, card.meter
        self.each_bytes = DTYPE_BYTES[workload.dtype]
        self._library, self._convolution, self._moves = library, convolution, library.moves_of(workload)
        self._most_slices = most_slices
        self._taken: dict[tuple[str, Lengths], Taken] = {}
        self._of_all = {} if taken is None else taken
        self._spans: dict[tuple[str, Lengths], Span] = {}
        self._one_pixel = one_pixel

    def text_encoder(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden state, and what is pooled of it."""
        batch, tokens = ids.shape
        hidden, pooled = self._plays(TEXT, Lengths(batch))[1] or (0, 0)
        return (
            given(self.meter, (batch, tokens, TEXT_CHANNELS), self.each_bytes, hidden),
            given(self.meter, (batch, TEXT_CHANNELS), self.each_bytes, pooled),
        )

    def unet(self, sample: Tensor, text: Tensor) -> Tensor:
        """The noise that it predicts."""
        batch, _, height, width = sample.shape
        return self._once_per_shape(UNET, Lengths(batch, height, width, text.shape[1]), sample.shape)

    def encoder(self, images: Tensor) -> Tensor:
        """Means and variances of the latents; of the tiny VAE the latents."""
        batch, _, height, width = images.shape
        channels = LATENT_CHANNELS * (2 if self.workload.vae == "kl" else 1)
        shape = (batch, channels, height // VAE_SCALE, width // VAE_SCALE)
        return self._once_per_shape(ENCODER, Lengths(batch, height, width), shape)

    def decoder(self, latents: Tensor) -> Tensor:
        """The images."""
        batch, _, height, width = latents.shape
        shape = (batch, IMAGE_CHANNELS, height * VAE_SCALE, width * VAE_SCALE)
        return self._once_per_shape(DECODER, Lengths(batch, height, width), shape)

    def safety_checker(self, pictures: Tensor) -> None:
        """What it finds leaves the card."""
        self._plays(CHECKER, Lengths(pictures.shape[0], PICTURE, PICTURE))

    def convolved(self, images: Tensor, channels: int) -> Tensor:
        """A convolution of 1x1 to as many channels as it gets."""
        weight = (channels, channels, 1, 1)
        moving = (weight, (channels,)) if self.workload.offload in STREAMED else ()
        sizes = [rounded(prod(shape) * self.each_bytes) for shape in moving]
        there = [self._comes(size) for size in sizes]
        out = images.like()
        if self._convolution is not None:
            held = self._convolution(images.shape, weight, out.shape)
            if held:
                self.meter.passing(held)
        for block, size in zip(there, sizes, strict=True):
            self.meter.free(block, size)
        return out

    def _comes(self, size_bytes: int) -> int:
        block = self.meter.allocate(size_bytes)
        if self.workload.offload == "sequential":
            self.meter.give_cache_back()
        return block

    def _once_per_shape(self, kind: str, lengths: Lengths, shape: tuple[int, ...]) -> Tensor:
        """A call, or one more like an earlier one, of which a trace keeps nothing (`Meter.repeat`) but the result."""
        key = (kind, lengths)
        if key not in self._spans:
            span, blocks = self._plays(kind, lengths)
            self._spans[key] = span
            return given(self.meter, shape, self.each_bytes, next(iter(blocks), 0))
        span = self._spans[key]
        self.card.enter(next(iter(span.peaks_bytes)))
        self.meter.repeat(span)
        return empty(self.meter, shape, self.each_bytes)

    def _plays(self, kind: str, lengths: Lengths) -> tuple[Span, list[int]]:
        key = (kind, lengths)
        if key not in self._taken:
            program = self._library.program(kind, self.workload, lengths, one_pixel=self._one_pixel)
            keep_events = self.meter.events is not None
            moves = self._moves.get(COMPONENT[kind])
            shared = (Key.of(kind, self.workload, lengths), self.workload.dtype, lengths, keep_events)
            known = self._of_all if kind in (TEXT, CHECKER) and moves is None else {}
            if shared not in known:
                known[shared] = program.call(
                    lengths, self._convolution, keep_events=keep_events, moves=moves, most_slices=self._most_slices
                )
            self._taken[key] = known[shared]
        taken = self._taken[key]
        self.card.enter(next(iter(taken.peaks_bytes)))
        return self.meter.play(taken)
