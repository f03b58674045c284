"""What a run requires, by simulation and replay, for `sdfit.predict.replayed`: numpy and the standard library are all it takes."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any, NamedTuple

from sdfit.equation.metrics import MATERIALISED
from sdfit.equation.stages import resident
from sdfit.equation.weights import component_bytes
from sdfit.predict.simulation.capped import Beginning
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.library import NotSimulated
from sdfit.predict.simulation.order import Order
from sdfit.predict.simulation.programs import HEADS
from sdfit.predict.simulation.replay import between, replay, smallest_cap
from sdfit.predict.simulation.simulate import Simulator, uncollected
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import DTYPE_BYTES, SLICES, VAE_SCALE, Workload

MOST_SLICES = 16
"""Of an attention that are played; eight give the same bytes already, in all that was tried."""

MOST_BEGINNINGS = 16
"""That are kept: of runs of as many kinds."""
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
        self._beginnings: list[Beginning] = []
        self._known: dict[tuple[Any, str], tuple[int, float]] = {}

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
        known = alike(workload), metric
        above, most = self._known.get(known, (-1, math.inf))
        if above + 1 < most:
            most = self._number(workload, metric)
            self._known[known] = int(most) - 1, most
        return int(most)

    def _number(self, workload: Workload, metric: str) -> int:
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
        """Whether a metric of a run is no more than a cap [bytes]; what was found for other caps is kept."""
        known = alike(workload), metric
        above, most = self._known.get(known, (-1, math.inf))
        if above < cap_bytes < most:
            found = self._between(workload, metric, cap_bytes)
            above, most = self._known[known] = max(above, found[0]), min(most, found[1])
        return most <= cap_bytes

    def _between(self, workload: Workload, metric: str, cap_bytes: float) -> tuple[int, float]:
        """What a metric of a run is more than, and the most that it is [bytes], so far that a cap is not between them: nothing is
        replayed where what must be there is more than that.
        """
        least = least_bytes(workload)
        if least > cap_bytes:
            return least - 1, math.inf
        with uncollected():
            if metric == "allocated":
                peak = self._run(workload).peak_bytes
                return peak - 1, peak
            if workload.vae_slicing and workload.batch_size >= MANY:
                least = self._live(workload, metric)
                if least > cap_bytes:
                    return least - 1, math.inf
            try:
                order, beginning = self._order(workload, metric)
            except NotSimulated:  # too long a run, most likely
                least = self._live(workload, metric)
                if least > cap_bytes:
                    return least - 1, math.inf
                raise
            if order.requested_bytes > cap_bytes:
                return order.requested_bytes - 1, math.inf
            if metric == "reserved":
                reserved = replay(order.listed()).reserved_bytes
                return reserved - 1, reserved
            least = beginning.least_bytes(order)
            if least > cap_bytes and not beginning.meets(cap_bytes):
                return int(cap_bytes), math.inf
            return between(order, cap_bytes, beginning=beginning)

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
        last = self._last.get(simulator)
        if last is None or last[0] != workload:
            last = self._last[simulator] = workload, simulator.order(workload)
        order = last[1]
        beginning = next((one for one in self._beginnings if one.begins(order)), None) or Beginning(order)
        self._beginnings = [beginning, *(one for one in self._beginnings if one is not beginning)][:MOST_BEGINNINGS]
        return order, beginning


def alike(workload: Workload) -> tuple[Any, ...]:
    """What tells runs apart: those of which it is equal take the same memory, block by block.

    A run is what it really runs as. And an image that lies takes what it takes upright, unless it is cut into tiles, which come
    row by row.

    Examples
    --------
    >>> alike(Workload(512, 768)) == alike(Workload(775, 512, prompt_length=5, guidance_scale=3.0))
    True
    """
    height, width, *others = workload.runs_as
    sides = (height, width) if workload.vae_tiling or height <= width else (width, height)
    return (*sides, *others, *workload.variant)


def least_bytes(workload: Workload) -> int:
    """What a run has live at once, whatever its kernels, by its weights and a few tensors [bytes]: never more than it needs.

    In the UNet's last block what its feed-forward gates, beside ten feature maps; where attention is materialised, the scores and
    their softmax, which `math` has in float32. In the decoder of an image that is not tiled, what the last upsampling's convolution gives, normalised,
    and that activated.

    Examples
    --------
    >>> least_bytes(Workload(512, 512, offload="group_leaf")) / 2**20
    384.0
    """
    w, each = workload, DTYPE_BYTES[workload.dtype]
    positions = w.pixels // VAE_SCALE**2
    heads = SLICES.get(w.attention, w.unet_batch * HEADS) if w.attention in MATERIALISED else 0
    scores = 2 * heads * positions**2 * (DTYPE_BYTES["float32"] if w.attention == "math" else each)
    images = 1 if w.vae_slicing else w.batch_size
    decoded = 0 if w.vae_tiling else images * DECODER_CHANNELS[w.vae] * w.pixels * each
    there = {"unet": max(w.unet_batch * UNET_CHANNELS * positions * each, scores), "vae_decoder_blocks": decoded}
    weights = component_bytes(w)
    return max(
        tensors + sum(weights.get(component, 0) for component in resident(stage, w.offload))
        for stage, tensors in there.items()
    )


UNET_CHANNELS, DECODER_CHANNELS = 2560 + 2 * 1280 + 10 * 320, {"kl": 3 * 256, "tiny": 3 * 64}
"""Of those tensors."""
