"""What lies on a card beside the tensors of a run: weights that come and go, what stands around them; and what a run took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdfit.equation.stages import resident
from sdfit.equation.weights import rounded
from sdfit.predict.simulation.meter import Meter
from sdfit.predict.simulation.unsplit import unsplit_bytes

Weights = Mapping[str, Sequence[int]]
"""Sizes of the weights and buffers of each component, as the allocator rounds them [bytes], in the order of its modules."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What one run took. All amounts in bytes, rounded block by block as the allocator rounds them."""

    component_bytes: dict[str, int]
    stage_peaks: dict[str, int]
    stage_seconds: dict[str, float]
    events: list[tuple[int, int]] | None
    standing_bytes: int = 0
    """Of every stage's peak: what is there beside the weights all the time (cuBLAS, the allocator's remainders)."""
    unsplit_bytes: int = 0
    """Of the standing bytes, the allocator's remainders around the weights."""
    resident_bytes: dict[str, int] = field(default_factory=dict)
    """The weights that are on the card in each stage."""
    workspaces: frozenset[int] = frozenset()
    """Those blocks of the events that a kernel holds while it runs, and for which it may have a plan that needs none."""

    @property
    def weights_bytes(self) -> int:
        """The weights of all components."""
        return sum(self.component_bytes.values())

    @property
    def peak_bytes(self) -> int:
        """The highest of the stages."""
        return max(self.stage_peaks.values())

    @property
    def requested_bytes(self) -> int:
        """The peak of what is asked for at once: that of the events, which know no remainders. No cap below it suffices."""
        return self.peak_bytes - self.unsplit_bytes

    def is_like(self, other: Traced) -> bool:
        """Whether another run took the same, event by event; blocks may have other numbers, and seconds are not looked at."""

        def facts(run: Traced) -> tuple[object, ...]:
            return (run.component_bytes, run.stage_peaks, run.standing_bytes, run.unsplit_bytes, run.resident_bytes)

        return facts(self) == facts(other) and self.renumbered() == other.renumbered()

    def renumbered(self) -> tuple[list[tuple[int, int]], set[int]]:
        """The events with blocks numbered as they are born, and which of them are workspaces."""
        numbers: dict[int, int] = {0: 0}  # the cache given back is an event of block 0
        events = [(numbers.setdefault(block, len(numbers)), size) for block, size in self.events or ()]
        return events, {numbers[block] for block in self.workspaces}


class Card:
    """Loads and unloads whole components, as under `enable_model_cpu_offload`; without it all are there at once.

    Parameters
    ----------
    meter : Meter
    weights : dict of str to sequence of int
        See `Weights`.
    offload : str
        Of `sdfit.workload.CHOICES`.
    standing_bytes : int
        What the kernels' libraries keep from the beginning (`sdfit.predict.simulation.workspaces.Workspaces`); 0 for no card, which
        has no allocator with remainders either.
    encodes : bool
        Whether there is an image to encode; else the VAE comes only to decode.
    unsplit : dict, optional
        Remainders that were worked out already, by components; they take some milliseconds.
    """

    def __init__(
        self,
        meter: Meter,
        weights: Weights,
        *,
        offload: str,
        standing_bytes: int = 0,
        encodes: bool = True,
        unsplit: dict[tuple[str, ...], int] | None = None,
    ) -> None:
        self.meter, self.weights, self.offload, self.encodes = meter, weights, offload, encodes
        self.standing_bytes, self.unsplit_bytes = standing_bytes, 0
        self._blocks: dict[str, range] = {}
        if standing_bytes and offload != "model":  # the remainders around weights that come and go are left out
            stay = tuple(name for name in resident("unet", offload) if name in weights)
            known = {} if unsplit is None else unsplit
            if stay not in known:
                known[stay] = unsplit_bytes({name: weights[name] for name in stay})
            self.unsplit_bytes = known[stay]

    def enter(self, stage: str) -> None:
        """Begin a stage, with the components that it needs."""
        self._unload(stage)
        first = not self.meter.stage
        self.meter.enter(stage)  # before the loading: what is loaded counts to the stage that needs it
        for name, sizes in self.weights.items():
            if name in self._resident(stage) and name not in self._blocks:
                self._blocks[name] = self.meter.allocate_all(sizes)
        if first and self.standing_bytes:
            self.meter.allocate(rounded(self.standing_bytes))
            self.meter.live_bytes += self.unsplit_bytes  # no event: a replay through the allocator finds it by itself

    def taken(self, events: list[tuple[int, int]] | None, seconds: Mapping[str, float], *, buffers: int = 0) -> Traced:
        """What the run that is over took.

        Parameters
        ----------
        buffers : int
            What else is there all the time [bytes].
        """
        return Traced(
            {name: sum(sizes) for name, sizes in self.weights.items()},
            self.meter.stage_peaks,
            dict(seconds),
            events,
            self.standing_bytes + self.unsplit_bytes + buffers,
            self.unsplit_bytes,
            {stage: self._resident_bytes(stage) for stage in self.meter.stage_peaks},
            frozenset(self.meter.workspaces),
        )

    def _resident(self, stage: str) -> set[str]:
        found = set(resident(stage, self.offload))
        if self.offload != "none" and not self.encodes and stage == "unet":
            found -= {"vae"}
        return found

    def _resident_bytes(self, stage: str) -> int:
        return sum(sum(sizes) for name, sizes in self.weights.items() if name in self._resident(stage))

    def _unload(self, stage: str) -> None:
        leaving = sorted(set(self._blocks) - self._resident(stage))
        for name in leaving:
            for block, size in zip(self._blocks.pop(name), self.weights[name], strict=True):
                self.meter.free(block, size)
        if leaving:
            self.meter.give_cache_back()  # as `CpuOffload.pre_forward` of accelerate does between unloading and loading
