"""Made-up cards: traced runs into which any table of kernel workspaces is put afterwards.

A bare trace knows what is live at each convolution, whatever a kernel then holds. So one trace of a workload, its
*skeleton*, gives the stage peaks of any number of cards, to the byte, at no further tracing. The cards here differ from
those of `sdfit.predict.simulation.workspaces` as a new card might; they are simulated, and made up on top.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdfit.backends.trace.follow import Operation
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.stages import stages_of
from sdfit.equation.weights import rounded
from sdfit.fit.live import Convolution
from sdfit.fit.live import Skeleton as Bare
from sdfit.fit.shown import record_of
from sdfit.predict.simulation.meter import Meter, Span
from sdfit.predict.simulation.workspaces import ARCHITECTURES, HALF, Architecture, Rule, convolution_bytes
from sdfit.records import Record
from sdfit.workload import Workload

CUBLAS_BYTES = 8_519_680
"""What the skeletons hold for a cuBLAS handle; a card with another takes the difference in every stage."""


class Skeleton(Bare):
    """A traced run without kernel workspaces; in its stages' peaks `CUBLAS_BYTES` are included."""

    __slots__ = ()

    def stage_peaks(self, card: MadeUp) -> dict[str, int]:
        """The peak of each stage on a card [bytes]."""
        more = rounded(card.architecture.cublas_bytes) - rounded(CUBLAS_BYTES)
        peaks = {}
        for stage in stages_of(self.workload.variant):
            peak = self.bare_bytes[stage]
            for one, live in self.live_bytes.get(stage, {}).items():
                held = convolution_bytes(card.architecture, *one)
                if card.larger is not None:
                    held = card.larger(one, live, held)
                peak = max(peak, live + held)
            peaks[stage] = peak + more + card.constant_bytes
        return peaks


class _Convolutions:
    """Follows the convolutions of one run, those of spans that are counted again too."""

    standing_bytes = CUBLAS_BYTES

    def __init__(self) -> None:
        self.found: dict[str, dict[Convolution, int]] = {}
        self._open: list[tuple[str, Convolution, int]] = []
        self._before = 0
        self._spans: dict[int, tuple[Span, list[tuple[str, Convolution, int]], int]] = {}

    def __call__(self, workload: Workload, func: Any, args: tuple[Any, ...], out: Any) -> int:
        """No workspace, whatever the operation."""
        return 0

    def attach(self, meter: Meter) -> Operation:
        """Begin to watch; the ``observe`` argument of `Tracer.run`."""
        self.meter, meter.listener = meter, self
        return self._see

    def begins(self) -> None:
        """Note what is live when a span begins."""
        self._open, self._before = [], self.meter.live_bytes

    def ends(self, span: Span) -> None:
        """Remember the convolutions of a span."""
        self._spans[id(span)] = (span, self._open, self._before)

    def again(self, span: Span) -> None:
        """Count those of a span once more, on top of what is live now."""
        _, found, before = self._spans[id(span)]
        for stage, one, live in found:
            self._keep(stage, one, live - before + self.meter.live_bytes)

    def _see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        if func.name() != "aten::convolution":
            return
        dtype = str(args[0].dtype).removeprefix("torch.")
        one = (dtype, tuple(args[0].shape), tuple(args[1].shape), tuple(out.shape))
        self._open.append((self.meter.stage, one, self.meter.live_bytes))
        self._keep(*self._open[-1])

    def _keep(self, stage: str, one: Convolution, live: int) -> None:
        known = self.found.setdefault(stage, {})
        known[one] = max(live, known.get(one, 0))


def skeleton(workload: Workload, tracer: Tracer) -> Skeleton:
    """Trace a workload for any card; ``tracer`` keeps the pipelines, and is given no workspaces."""
    seen = _Convolutions()
    tracer.workspace = seen
    traced = tracer.run(workload, observe=seen.attach)
    return Skeleton(
        workload,
        traced.component_bytes,
        traced.weights_bytes + traced.unsplit_bytes,
        traced.stage_peaks,
        seen.found,
    )


def skeletons(
    workloads: Iterable[Workload], cache: Path | None = None, report: Callable[[int], None] = lambda done: None
) -> list[Skeleton]:
    """Trace workloads, some three a second; those that a cache file holds are read from it, and new ones added."""
    known: dict[Workload, Skeleton] = {}
    if cache is not None and cache.is_file():
        with cache.open(encoding="utf-8") as lines:
            for line in lines:
                one = _parsed(json.loads(line))
                known[one.workload] = one
    tracer, found = Tracer(), []
    for done, workload in enumerate(workloads):
        if workload not in known:
            known[workload] = skeleton(workload, tracer)
            if cache is not None:
                with cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_plain(known[workload])) + "\n")
        found.append(known[workload])
        report(done)
    return found


def _plain(one: Skeleton) -> dict[str, Any]:
    return {
        "workload": one.workload.to_dict(),
        "component_bytes": one.component_bytes,
        "baseline_bytes": one.baseline_bytes,
        "bare_bytes": one.bare_bytes,
        "live_bytes": {stage: [[*key, live] for key, live in known.items()] for stage, known in one.live_bytes.items()},
    }


def _parsed(values: dict[str, Any]) -> Skeleton:
    live = {
        stage: {(dtype, tuple(image), tuple(weight), tuple(out)): held for dtype, image, weight, out, held in rows}
        for stage, rows in values["live_bytes"].items()
    }
    return Skeleton(**values | {"workload": Workload.from_dict(values["workload"]), "live_bytes": live})


@dataclass(frozen=True, slots=True)
class MadeUp:
    """A card that does not exist.

    Parameters
    ----------
    name : str
    why : str
        How it differs.
    architecture : Architecture
        Its table of workspaces.
    constant_bytes : int
        What it holds besides, all the time [bytes].
    larger : callable, optional
        ``larger(convolution, live_bytes, held_bytes) -> bytes`` that a plan holds where there is room for more.
    """

    name: str
    why: str
    architecture: Architecture
    constant_bytes: int = 0
    larger: Callable[[Convolution, int, int], int] | None = None

    def record(self, index: int, one: Skeleton) -> Record:
        """What a sweep of the card would have written of a workload."""
        return record_of(index, one, list(one.stage_peaks(self).values()))

    def records(self, found: Sequence[Skeleton]) -> list[Record]:
        """A record of each workload, in their order."""
        return [self.record(index, one) for index, one in enumerate(found)]


def _with(rules: Callable[[Rule], Rule | None], like: str = "sm75") -> Architecture:
    """An architecture with other rules."""
    kept = [changed for rule in ARCHITECTURES[like].rules if (changed := rules(rule)) is not None]
    return replace(ARCHITECTURES[like], name="made up", rules=tuple(kept))


def _copies(*operands: str, **other: Any) -> Callable[[Rule], Rule]:
    return lambda rule: replace(rule, copies=operands, **other) if rule.copies else rule


ROOM_BYTES = 14 << 30
"""Up to so much in use the card with an optional plan takes the larger one."""


def _where_there_is_room(one: Convolution, live: int, held: int) -> int:
    _, image, weight, _ = one
    wanted = 9 * held // 5
    single = image[0] == 1 and weight[:2] == (256, 256) and held > 0
    return wanted if single and live + wanted <= ROOM_BYTES else held


_T4 = ARCHITECTURES["sm75"]
MADE_UP: dict[str, MadeUp] = {
    card.name: card
    for card in (
        MadeUp("both ways", "input, output and filter are copied from two images on too", _with(
            lambda rule: rule if rule.copies else None)),
        MadeUp("one way", "output and filter are copied, the input is not", _with(_copies("output", "weight"))),
        MadeUp("none", "no convolution holds a workspace", replace(_T4, name="made up", rules=())),
        MadeUp("widened", "copies are of float32, in float16 too", _with(
            lambda rule: replace(rule, element_bytes=4) if rule.copies else rule)),
        MadeUp("every layer", "all convolutions copy, not those of 3x3 alone", _with(
            lambda rule: replace(rule, only="all") if rule.copies else rule)),
        MadeUp("constant", "100 MiB more are held all the time", _T4, 100 << 20),
        MadeUp("cublas", "cuBLAS keeps 33,554,432 B", replace(_T4, cublas_bytes=33_554_432)),
        MadeUp("larger plan", "one image's widest convolution takes 1.8 times as much while 14 GiB hold it", _T4, 0,
               _where_there_is_room),
    )
}  # fmt: skip
"""Cards that differ from a T4 as the trace has it."""


def drawn(seed: int) -> MadeUp:
    """A card drawn at random: its operands copied so and so often, by kernels that hold for some layers, sizes or batches.

    Some draws are of what a table of copies can say, some of what it cannot: workspaces of a fixed size for every layer, plans
    that change with the size or with the batch, a larger plan that is taken while there is room.
    """
    rng = random.Random(seed)
    rules = [*_drawn_rules(rng, HALF), *_drawn_rules(rng, ("float32",))]
    larger = None
    if rng.random() < 0.15:
        tenths, room = rng.randint(12, 30), rng.uniform(8, 40) * (1 << 30)
        larger = lambda one, live, held: tenths * held // 10 if live + tenths * held // 10 <= room else held  # noqa: E731
    constant = rng.choice((0, rng.randint(1, 400))) << 19
    return MadeUp(
        f"drawn {seed}", "drawn at random", Architecture("made up", (), tuple(rules), CUBLAS_BYTES), constant, larger
    )


def strange(seed: int) -> MadeUp:
    """A card drawn at random that no table of copies says: shares of the operands that are no whole numbers, and others by size,
    number of images and filter. Intervals of few runs are to hold on it all the same."""
    rng = random.Random(1000 + seed)
    shares = [rng.uniform(0, 3) for _ in range(3)]
    edges = sorted(rng.choice((128, 256, 512, 768, 1024)) ** 2 for _ in range(2))
    by_size = [rng.uniform(0.4, 1.8) for _ in range(3)]
    by_images = [rng.uniform(0.5, 1.5) for _ in range(3)]
    by_side = {1: rng.uniform(0, 1), 3: rng.uniform(0.5, 1.2)}
    half = rng.uniform(0.6, 1.6)

    def held(one: Convolution, live: int, usual: int) -> int:
        dtype, image, weight, out = one
        size = by_size[sum(out[2] * out[3] > edge for edge in edges)]
        operands = [
            convolution_bytes(
                Architecture("", (), (Rule((dtype,), (name,), "", element_bytes=2, pad_bytes=0),), 0), *one
            )
            for name in ("input", "output", "weight")
        ]
        total = sum(share * held for share, held in zip(shares, operands, strict=True))
        wide = 2.0 if dtype == "float32" else half
        return int(total * wide * size * by_images[min(image[0], 3) - 1] * by_side.get(weight[-1], 0.7)) // 512 * 512

    constant = rng.choice((0, rng.randint(1, 400))) << 19
    return MadeUp(f"strange {seed}", "no table says it", Architecture("made up", (), (), CUBLAS_BYTES), constant, held)


def _drawn_rules(rng: random.Random, dtypes: tuple[str, ...]) -> list[Rule]:
    found = []
    if rng.random() < 0.3:
        found.append(Rule(dtypes, ("winograd",), "drawn", only="heavy"))
    if rng.random() < 0.5:
        found.append(Rule(dtypes, (), "drawn", min_batch=2, channels=(256, 256)))
    copies = tuple(name for name in ("input", "output", "weight") for _ in range(rng.choice((0, 1, 1, 2))))
    main = Rule(
        dtypes, copies, "drawn", only=rng.choice(("all", "aligned")),
        element_bytes=rng.choice((None, None, 4)),
    )  # fmt: skip
    odd = rng.choice(("", "", "", "pixels", "strided", "one", "several", "pad"))
    if odd == "pixels":
        other = replace(main, copies=(*copies, "output"), max_pixels=rng.choice((256, 512, 1024)) ** 2)
        found.append(other)
    elif odd == "strided":
        main = replace(main, strided=False)
    elif odd == "one":
        main = replace(main, max_batch=1)
    elif odd == "several":
        main = replace(main, min_batch=2)
    elif odd == "pad":
        main = replace(main, pad_bytes=rng.randint(1, 128) << 20)
    return [*found, main]
