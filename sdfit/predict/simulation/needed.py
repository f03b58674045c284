"""What a run requires, by simulation and replay, for `sdfit.predict.replayed`: numpy and the standard library are all it takes."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, NamedTuple

from sdfit.equation.metrics import MATERIALISED
from sdfit.predict.simulation.capped import Beginning
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.order import Order
from sdfit.predict.simulation.programs import HEADS
from sdfit.predict.simulation.replay import replay, smallest_cap, suffices
from sdfit.predict.simulation.simulate import Simulator, uncollected
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import DTYPE_BYTES, SLICES, VAE_SCALE, Workload

MOST_SLICES = 16
"""Of an attention that are played; eight give the same bytes already, in all that was tried."""

MANY = 8
"""Images one by one of which it is sooner known what is live at once than what the events are."""


class Stages(NamedTuple):
    """By stage, in bytes: its peak, and the weights of it that are on the card."""

    peaks: dict[str, float]
    weights: dict[str, int]


class Needed:
    """``needed(workload, metric) -> bytes``: simulates a run and replays it through the allocator.

    Parameters
    ----------
    kernels : str
        Whose workspaces the kernels take: an architecture such as ``sm75``, or a card.
    patient : bool
        See `Simulator`.

    Raises
    ------
    NotSimulated
        When called, for a run that is not covered (see `sdfit.predict.simulation.simulate`).

    Examples
    --------
    >>> Needed("sm75")(Workload(512, 512), "required")
    3523215360
    """

    def __init__(self, kernels: str, *, patient: bool = False) -> None:
        self.kernels, self._patient = kernels, patient
        workspaces = workspaces_for(kernels)
        ways: dict[str, Any] = {"most_slices": MOST_SLICES, "one_pixel": True, "patient": patient}
        self._simulator = Simulator(workspaces, **ways)
        self._bare = Simulator(workspaces.bare(), **ways)
        self._last: dict[Simulator, tuple[Workload, Order]] = {}
        self._took: tuple[Workload, Traced] | None = None
        self._beginning: Beginning | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (partial(Needed, patient=self._patient), (self.kernels,))

    @cached_property
    def patient(self) -> Needed:
        """The same for runs that nothing else answers: also those that take long."""
        return self if self._patient else Needed(self.kernels, patient=True)

    def __call__(self, workload: Workload, metric: str) -> int:
        """``required``: the smallest cap under which the run succeeds [bytes]; ``minimum``: if no kernel takes a workspace;
        ``reserved``: what the allocator takes of the card where there is room; ``allocated``: what is live of it.
        """
        with uncollected():
            if metric == "allocated":
                return self._run(workload).peak_bytes
            order, beginning = self._order(workload, metric)
            return (
                replay(order.listed()).reserved_bytes
                if metric == "reserved"
                else smallest_cap(order, beginning=beginning)
            )

    def suffices(self, workload: Workload, metric: str, cap_bytes: float) -> bool:
        """Whether a metric of a run is no more than a cap [bytes]: none is replayed where what must be there is more."""
        if least_bytes(workload) > cap_bytes:
            return False
        with uncollected():
            if metric == "allocated":
                return self._run(workload).peak_bytes <= cap_bytes
            if workload.vae_slicing and workload.batch_size >= MANY and self._live(workload, metric) > cap_bytes:
                return False
            try:
                order, beginning = self._order(workload, metric)
            except NotSimulated:  # too long a run, most likely
                if self._live(workload, metric) > cap_bytes:
                    return False
                raise
            if order.requested_bytes > cap_bytes:
                return False
            if metric == "reserved":
                return replay(order.listed()).reserved_bytes <= cap_bytes
            if not beginning.meets(cap_bytes) and beginning.least_bytes(order) > cap_bytes:
                return False
            return suffices(order, int(cap_bytes), beginning=beginning)

    def stages(self, workload: Workload) -> Stages:
        """The peak of each stage, and the weights that are on the card in it."""
        with uncollected():
            run = self._run(workload)
        return Stages(dict(run.stage_peaks), run.resident_bytes)

    def _run(self, workload: Workload) -> Traced:
        """The last one is kept: a run is mostly asked for several metrics in a row."""
        if self._took is None or self._took[0] != workload:
            self._took = workload, self._simulator.run(workload)
        return self._took[1]

    def _live(self, workload: Workload, metric: str) -> int:
        """What is asked for at once, without the events of it."""
        return (self._run(workload) if metric != "minimum" else self._bare.run(workload)).requested_bytes

    def _of(self, metric: str) -> Simulator:
        return self._bare if metric == "minimum" else self._simulator

    def _order(self, workload: Workload, metric: str) -> tuple[Order, Beginning]:
        """What a run does with memory, and how it begins: runs of one kind begin alike, and that is served once."""
        simulator = self._of(metric)
        last, beginning = self._last.get(simulator), self._beginning
        if last is None or last[0] != workload:
            last = self._last[simulator] = workload, simulator.order(workload)
        order = last[1]
        if beginning is None or not beginning.begins(order):
            beginning = self._beginning = Beginning(order)
        return order, beginning


def least_bytes(workload: Workload) -> int:
    """What a run has live at once, whatever its kernels, by a few tensors alone [bytes]: never more than it needs.

    In the UNet's last block what came up and what came across, put together and normalised; where attention is materialised, the
    scores and their softmax. In the decoder of an image that is not tiled, what the last upsampling's convolution takes and gives.

    Examples
    --------
    >>> least_bytes(Workload(512, 512)) / 2**20
    256.0
    """
    w, each = workload, DTYPE_BYTES[workload.dtype]
    positions = w.pixels // VAE_SCALE**2
    heads = SLICES.get(w.attention, w.unet_batch * HEADS)
    scores = 2 * heads * positions**2 if w.attention in MATERIALISED else 0
    images = 1 if w.vae_slicing else w.batch_size
    decoded = 0 if w.vae_tiling else images * DECODER_CHANNELS[w.vae] * w.pixels
    return max(w.unet_batch * UNET_CHANNELS * positions, scores, decoded) * each


UNET_CHANNELS, DECODER_CHANNELS = 640 + 3 * 320 + 2 * 960, {"kl": 2 * 256, "tiny": 2 * 64}
"""Of those tensors."""
