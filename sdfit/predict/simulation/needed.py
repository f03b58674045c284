"""What a run requires, by simulation and replay, for `sdfit.predict.replayed`: numpy and the standard library are all it takes."""

from __future__ import annotations

from typing import NamedTuple

from sdfit.equation.metrics import MATERIALISED
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.programs import HEADS
from sdfit.predict.simulation.replay import replay, smallest_cap, without
from sdfit.predict.simulation.simulate import Simulator, uncollected
from sdfit.predict.simulation.workspaces import workspaces_for
from sdfit.workload import DTYPE_BYTES, SLICES, VAE_SCALE, Workload

MOST_SLICES = 16
"""Of an attention that are played; eight give the same bytes already, in all that was tried."""


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

    Raises
    ------
    NotSimulated
        When called, for a run that is not covered (see `sdfit.predict.simulation.simulate`).

    Examples
    --------
    >>> Needed("sm75")(Workload(512, 512), "required")
    3523215360
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self._simulator = Simulator(workspaces_for(kernels), most_slices=MOST_SLICES)
        self._last: tuple[Workload, Traced] | None = None

    def __reduce__(self) -> tuple[type[Needed], tuple[str]]:
        return (Needed, (self.kernels,))

    def __call__(self, workload: Workload, metric: str, limit_bytes: float | None = None) -> int:
        """``required``: the smallest cap under which the run succeeds [bytes]; ``minimum``: if no kernel takes a workspace;
        ``reserved``: what the allocator takes of the card where there is room; ``allocated``: what is live of it.

        Where that is above ``limit_bytes``, what is given may be any number between the two, and is found sooner.
        """
        with uncollected():
            return self._needed(workload, metric, limit_bytes)

    def stages(self, workload: Workload, limit_bytes: float | None = None) -> Stages:
        """The peak of each stage, and the weights that are on the card in it; of a run far above a limit, one at least."""
        least = least_bytes(workload)
        if limit_bytes is not None and least > limit_bytes:
            return Stages({"unet": least}, {"unet": 0})
        run = self._run(workload)
        return Stages(dict(run.stage_peaks), run.resident_bytes)

    def _run(self, workload: Workload, *, keep_events: bool = False) -> Traced:
        """The last one is kept: a run is mostly asked for several metrics in a row."""
        last = self._last
        if last is None or last[0] != workload or (keep_events and last[1].events is None):
            last = self._last = workload, self._simulator.run(workload, keep_events=keep_events)
        return last[1]

    def _needed(self, workload: Workload, metric: str, limit_bytes: float | None) -> int:
        if limit_bytes is not None and least_bytes(workload) > limit_bytes:
            return least_bytes(workload)
        if metric == "allocated":
            return self._run(workload).peak_bytes
        if limit_bytes is not None and metric in ("required", "reserved"):
            live = self._run(workload).peak_bytes
            if live > limit_bytes:
                return live
        simulated = self._run(workload, keep_events=True)
        assert simulated.events is not None
        if metric == "reserved":
            return replay(simulated.events).reserved_bytes
        events = simulated.events if metric == "required" else without(simulated.events, simulated.workspaces)
        return smallest_cap(events, limit_bytes=None if limit_bytes is None else int(limit_bytes))


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
