"""Grid files: ``sweeps/*.toml`` to an ordered list of workloads.

A grid has blocks. A block is *factorial* (every combination of its axes, thinned to ``keep`` with the grid's seed),
*listed* (``workloads``), or *random* (``count`` draws from continuous sides, for a holdout). The order is seeded, so
that a sweep that is cut short has still seen every corner; workloads that need the same pipeline stay together.
"""

from __future__ import annotations

import itertools
import math
import random
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdfit.errors import GridError, SdfitError, listed, nearest, shown
from sdfit.files import fingerprint, read_bytes, shipped
from sdfit.workload import MAX_SIDE, ON_A_CARD, VAE_SCALE, WORKLOAD_FIELDS, Workload, variant_name

TOP_KEYS = ("description", "seed", "num_inference_steps", "block")
AXES = WORKLOAD_FIELDS[2:]
BLOCK_KEYS = ("name", "why", "shapes", "workloads", "random", "keep", "max_batch_pixels", *AXES)
RANDOM_KEYS = ("count", "min_side", "max_side", "multiple_of")
MOST_DRAWN = 100_000
"""Combinations, workloads or draws, of all blocks together."""
MOST_BYTES = 1 << 20
MOST_SEED = 2**63 - 1
MOST_STEPS = 1000
"""As many as the scheduler was trained with."""
MOST_MISSES = 10_000
"""Draws that may be too large before one is small enough, and again for each hundred that are: a hundred for one takes minutes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a grid file asks for: its workloads in the order in which they run."""

    name: str
    description: str
    seed: int
    num_inference_steps: int
    workloads: tuple[Workload, ...]
    sha256: str
    blocks: tuple[tuple[str, int], ...]

    def for_the_trace(self) -> Plan:
        """The same without the runs that a card alone can tell about (`sdfit.workload.CARD_ALONE`)."""
        left = tuple(w for w in self.workloads if w.execution not in ON_A_CARD)
        if len(left) == len(self.workloads):
            return self
        digest = fingerprint([[w.to_dict() for w in left], self.num_inference_steps])
        return replace(self, workloads=left, sha256=digest)

    def summary(self) -> str:
        """A few lines: how many runs, of what."""
        counts: dict[str, int] = {}
        for w in self.workloads:
            name = variant_name(w.variant)
            counts[name] = counts.get(name, 0) + 1
        shapes = {(w.height, w.width) for w in self.workloads}
        odd = sum(1 for h, w in shapes if h // VAE_SCALE % 8 or w // VAE_SCALE % 8)
        batches = sorted({w.batch_size for w in self.workloads})
        prompts = sorted({w.prompt_length for w in self.workloads})
        lines = [
            f"{self.name}: {len(self.workloads)} runs of {self.num_inference_steps} steps, seed {self.seed}",
            f"shapes: {len(shapes)}, {odd} of them with a latent side that is not a multiple of 8",
            f"batch sizes: {listed(batches)}; prompt lengths: {listed(prompts)}",
        ]
        lines += [f"{count:5d}  {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])]
        return "\n".join(lines)


def find(grid: str) -> Path:
    """Find a grid file: a path, ``./sweeps/<name>.toml``, or a shipped one."""
    candidates = [Path(grid), Path("sweeps", f"{grid}.toml"), shipped("sweeps") / f"{grid}.toml"]
    for path in candidates:
        if path.is_file():
            return path
    raise GridError(f"no grid '{grid}'; there are: {listed(names())}, or give the path of a .toml file", grid=grid)


def names() -> list[str]:
    """The grids that ship."""
    return sorted(p.stem for p in shipped("sweeps").glob("*.toml"))


def load(grid: str) -> Plan:
    """Read a grid file into a `Plan`.

    Raises
    ------
    GridError
        For an unknown key, an empty axis, a workload that cannot be, too many of them, or a file that is not TOML.
    """
    path = find(grid)
    try:
        text = read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise GridError(f"cannot read the grid '{path}': {error.strerror}", path=str(path)) from error
    try:
        content = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise GridError(f"'{path}' is not a TOML file: {error}", path=str(path)) from error
    try:
        return _plan(path.stem, content)
    except SdfitError as error:
        raise GridError(f"{path}: {error}", path=str(path)) from error


def _plan(name: str, content: dict[str, Any]) -> Plan:
    _known(content, TOP_KEYS, "the grid")
    seed = content.get("seed", 0)
    steps = content.get("num_inference_steps", 2)
    for key, value, low, high in (("seed", seed, 0, MOST_SEED), ("num_inference_steps", steps, 1, MOST_STEPS)):
        if not _whole(value, low, high):
            raise GridError(f"{key} is {shown(value)}; it must be a whole number from {low} to {high}")
    blocks = content.get("block", [])
    if not isinstance(blocks, list) or not blocks:
        raise GridError("the grid has no [[block]]; it must have one at least")
    rng = random.Random(seed)
    seen: dict[Workload, None] = {}
    counts = []
    left = MOST_DRAWN
    for number, block in enumerate(blocks, start=1):
        label = str(block.get("name", f"block {number}"))[:100] if isinstance(block, dict) else f"block {number}"
        try:
            count, found = _block(block, rng, left)
        except SdfitError as error:
            raise GridError(f"[[block]] '{label}': {error}") from error
        left -= count
        before = len(seen)
        seen.update(dict.fromkeys(found))
        counts.append((label, len(seen) - before))
    workloads = list(seen)
    rng.shuffle(workloads)
    # one pipeline after the other: building one takes longer than running a workload
    workloads.sort(key=lambda w: (w.dtype, w.vae, w.safety_checker, w.offload, w.execution))
    digest = fingerprint([[w.to_dict() for w in workloads], steps])
    return Plan(name, str(content.get("description", "")), seed, steps, tuple(workloads), digest, tuple(counts))


def _block(block: dict[str, Any], rng: random.Random, most: int) -> tuple[int, list[Workload]]:
    """How many combinations, workloads or draws a block asks for, and what is kept of them."""
    _known(block, BLOCK_KEYS, "the block")
    kinds = [k for k in ("shapes", "workloads", "random") if k in block]
    if len(kinds) != 1:
        raise GridError(f"it has {listed(kinds)}; it must have exactly one of shapes, workloads, random")
    axes = {name: _axis(name, block[name]) for name in AXES if name in block}
    cap = block.get("max_batch_pixels", math.inf)
    if isinstance(cap, bool) or not isinstance(cap, int | float) or not cap > 0:
        raise GridError(f"max_batch_pixels is {shown(cap)}; it must be a number of pixels")
    if kinds == ["workloads"]:
        if axes:
            raise GridError(f"{next(iter(axes))} does not go with workloads; write it into each of them")
        listed_ones = _axis("workloads", block["workloads"])
        count = _at_most(most, len(listed_ones), "workloads")
        found = [Workload.from_dict(item) for item in listed_ones]
    elif kinds == ["random"]:
        if "keep" in block:
            raise GridError("keep does not go with random; its count says how many")
        found = _drawn(block["random"], axes, cap, rng, most)
        return len(found), found
    else:
        shapes = [_shape(item) for item in _axis("shapes", block["shapes"])]
        count = _at_most(most, math.prod([len(shapes), *map(len, axes.values())]), "combinations")
        found = [
            Workload(*shape, **dict(zip(axes, values, strict=True)))
            for shape in shapes
            for values in itertools.product(*axes.values())
        ]
    found = [w for w in found if w.batch_size * w.pixels <= cap]
    if not found:
        raise GridError(f"max_batch_pixels {cap} leaves none of its workloads")
    keep = block.get("keep", len(found))
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise GridError(f"keep is {shown(keep)}; it must be a whole number >= 1")
    return count, _thinned(found, keep, rng)


def _at_most(most: int, count: int, what: str) -> int:
    if count > most:
        left = f", and the blocks before it leave {most}" if most < MOST_DRAWN else ""
        raise GridError(f"it has {count} {what}; a grid may have {MOST_DRAWN}{left}, so give fewer values")
    return count


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _thinned(found: list[Workload], keep: int, rng: random.Random) -> list[Workload]:
    """Keep some of a factorial, each shape as often as every other."""
    if keep >= len(found):
        return found
    by_shape: dict[tuple[int, int], list[Workload]] = {}
    for w in found:
        by_shape.setdefault((w.height, w.width), []).append(w)
    for group in by_shape.values():
        rng.shuffle(group)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_shape.values()))
    return list(itertools.islice((w for w in turns if w is not None), keep))


def _drawn(
    wanted: dict[str, Any], axes: dict[str, list[Any]], cap: float, rng: random.Random, most: int
) -> list[Workload]:
    _known(wanted, RANDOM_KEYS, "random")
    numbers: list[Any] = [wanted.get(k, 1 if k == "multiple_of" else None) for k in RANDOM_KEYS]
    count, low, high, step = numbers
    if not all(_whole(v, 1, MAX_SIDE) for v in (low, high, step)) or not _whole(count, 1, MOST_DRAWN) or low > high:
        raise GridError(
            f"random needs count (up to {MOST_DRAWN}), min_side <= max_side as whole numbers up to {MAX_SIDE} and may have "
            f"multiple_of, not {shown(wanted)}"
        )
    _at_most(most, count, "draws")
    found: list[Workload] = []
    misses = 0
    while len(found) < count:
        # log-uniform: a small side is as likely as a large one
        drawn = [math.exp(rng.uniform(math.log(low), math.log(high))) for _ in range(2)]
        sides = [round(side / step) * step for side in drawn]
        w = Workload(sides[0], sides[1], **{name: rng.choice(values) for name, values in axes.items()})
        if w.batch_size * w.pixels <= cap:
            found.append(w)
            continue
        misses += 1
        if misses > MOST_MISSES * (1 + len(found) / 100):
            raise GridError(f"max_batch_pixels {cap} leaves no room for sides from {low} to {high}")
    return found


def _shape(item: Any) -> tuple[int, int]:
    if isinstance(item, int) and not isinstance(item, bool):
        return item, item
    if isinstance(item, list) and len(item) == 2:
        return item[0], item[1]
    raise GridError(f"a shape is a side or [height, width], not {shown(item)}")


def _axis(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        values = [values]
    if not values:
        raise GridError(f"the axis '{name}' is empty; give it one value at least, or leave it out")
    return list(values)


def _known(given: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(given, dict):
        raise GridError(f"{where} must be a table, not {shown(given)}")
    for key in given:
        if key not in known:
            raise GridError(f"{where} has an unknown key '{key}'{nearest(key, known)}")
