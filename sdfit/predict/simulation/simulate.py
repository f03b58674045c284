"""A run simulated without torch: its modules by their programs, the rest of it written out.

**Covered**: every dtype and resolution, batches of any size, prompts of any length, guidance on and off, both VAEs, VAE
slicing and tiling, the safety checker, every kind of attention and of offload. **Not covered** (`Simulator.run` raises
`NotSimulated`): what diffusers fails on, executions that a card alone can tell, int8 weights that come module by module, an image or a tile so small that a feature map has
one pixel (64x64, and a corner of 8x8; but where ``one_pixel`` is asked for), workspaces of measured kernels, and runs of slices and tiles
by the hundred (by the thousand where it is to be ``patient``). Those are left to `sdfit.backends.trace.tracer`, which this is held against event by event.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sdfit.predict.simulation.card import Card, Traced
from sdfit.predict.simulation.library import Library, NotSimulated, shipped_library
from sdfit.predict.simulation.meter import Meter, Writer
from sdfit.predict.simulation.modules import Modules
from sdfit.predict.simulation.order import Order
from sdfit.predict.simulation.pipeline import Img2Img
from sdfit.predict.simulation.programs import ALL_SLICES, UNET, Convolution, Lengths, Taken
from sdfit.predict.simulation.scheduler import unet_calls
from sdfit.predict.simulation.vae import vae_calls
from sdfit.predict.simulation.workspaces import Workspaces
from sdfit.workload import CARD_ALONE, ON_A_CARD, STREAMED, VAE_SCALE, Workload, why_it_fails

Told = TypeVar("Told")

MOST_EVENTS = 400_000
"""Of a run; one has ten to forty thousand, but for slices and tiles by the hundred. Replaying as many takes seconds."""
MOST_PATIENT = 2_000_000
"""Where there is nothing else to ask; it takes a quarter of a minute."""
WITHOUT_EVENTS = 50
"""As many events as a call counts for where none are kept."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for circles of dead values: an event is a tuple, and beside PyTorch each look takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Simulator:
    """Simulates workloads; gives what `sdfit.backends.trace.tracer.Tracer` gives, to the byte and in order.

    Parameters
    ----------
    workspace : Workspaces, optional
        Kernel workspaces to add. None: the bare run.
    num_inference_steps : int
        See `sdfit.backends.trace.tracer.Tracer`.
    library : Library, optional
        None: the shipped one.
    most_slices : int
        Of an attention that is computed in slices, no more are played. Each takes and gives back what the one before did, so that
        from the third on the allocator serves them alike: what it needs is the same, and the events are fewer.
    one_pixel : bool
        Simulate also runs in which a feature map has one pixel (`Library.program`). They have up to some sixty copies of a few KB
        more than a trace: of 90 drawn ones what is live and what is required came out to the byte, and what is reserved but for
        one, 2 MiB too high.
    patient : bool
        Simulate also runs that take long.
    """

    def __init__(
        self,
        workspace: Workspaces | None = None,
        *,
        num_inference_steps: int = 2,
        library: Library | None = None,
        most_slices: int = ALL_SLICES,
        one_pixel: bool = False,
        patient: bool = False,
    ) -> None:
        self._one_pixel, self._patient = one_pixel, patient
        self.workspace, self.num_inference_steps, self.most_slices = workspace, num_inference_steps, most_slices
        self._library = library
        self._unsplit: dict[Any, dict[tuple[str, ...], int]] = {}
        self._taken: dict[Any, Taken] = {}

    def run(self, workload: Workload, *, keep_events: bool = False) -> Traced:
        """Simulate one workload.

        Parameters
        ----------
        keep_events : bool
            Also return every allocation and free of a block, the weights first.

        Raises
        ------
        NotSimulated
            If it is not covered (see the module).
        """
        meter = Meter(keep_events=keep_events)

        def taken(card: Card, buffers: int, beginning: int) -> Traced:
            return card.taken(None if meter.events is None else list(meter.events), {}, buffers=buffers)

        return self._run(workload, meter, taken)

    def order(self, workload: Workload) -> Order:
        """Simulate one workload for its events alone, in arrays: in a third of the time; otherwise as `run`."""
        writer = Writer()
        return self._run(workload, writer, lambda card, buffers, beginning: writer.order(beginning))

    def _run(self, workload: Workload, meter: Meter, told: Callable[[Card, int, int], Told]) -> Told:
        """What ``told`` tells of a run when it is over, by its card, its buffers [bytes], and its events before the image."""
        self._check(workload, keep_events=meter.events is not None)
        library = self._library or shipped_library()
        weights = library.weights_of(workload)
        standing = self.workspace.standing_bytes if self.workspace is not None else 0
        unsplit = self._unsplit.setdefault((workload.dtype == "float32", workload.vae, workload.execution), {})
        card = Card(meter, weights, offload=workload.offload, standing_bytes=standing, unsplit=unsplit)
        convolution = self._convolution(workload)
        modules = Modules(
            workload, card, library, convolution, self.most_slices, self._taken, one_pixel=self._one_pixel
        )
        pipeline = Img2Img(modules, self.num_inference_steps)
        buffers = library.left_behind(workload)
        held = [meter.allocate(size) for size in buffers]
        card.enter("text_encoder")
        pipeline.run()
        meter.leave()
        for block, size in zip(held, buffers, strict=True):
            meter.free(block, size)
        return told(card, sum(buffers), pipeline.beginning)  # before what outlives the run goes, which is no part of it

    def _check(self, workload: Workload, *, keep_events: bool) -> None:
        """Raise `NotSimulated` for what is not covered, and for what goes on for too long."""
        fails = why_it_fails(workload.variant)
        if fails:
            raise NotSimulated(fails)
        if workload.execution in ON_A_CARD:
            raise NotSimulated(f"execution={workload.execution}: {CARD_ALONE}")
        if workload.execution == "int8" and workload.offload in STREAMED:
            raise NotSimulated("weights of 8 bits that come module by module are not written out")
        if self.workspace is not None and not self.workspace.convolutions_only:
            raise NotSimulated("workspaces of measured kernels go by operations, which programs do not have")
        library, most = self._library or shipped_library(), MOST_PATIENT if self._patient else MOST_EVENTS
        height, width = workload.effective_height // VAE_SCALE, workload.effective_width // VAE_SCALE
        unet = Lengths(workload.unet_batch, height, width, workload.tokens)
        events = 0
        for kind, lengths, count in (
            (UNET, unet, unet_calls(self.num_inference_steps)),
            *vae_calls(workload, every=keep_events),
        ):
            program = library.program(kind, workload, lengths, one_pixel=self._one_pixel)
            moves = 2 * len(program.calls) if workload.offload in STREAMED else 0
            each = moves + program.count(lengths.batch, self.most_slices) if keep_events else WITHOUT_EVENTS
            events += count * each
        if events > most:
            raise NotSimulated(f"a run of more than {most:,} allocations and frees takes too long to simulate")

    def _convolution(self, workload: Workload) -> Convolution | None:
        workspace = self.workspace
        if workspace is None or not workspace.architecture.rules:
            return None
        return lambda image, weight, out: workspace.convolution(workload.dtype, image, weight, out)
