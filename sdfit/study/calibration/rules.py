"""From what kernels held at some shapes to what they hold at any: the rules of a workspace table.

A convolution's workspace is explained if it is a sum of copies of its operands (input, result, filter, in their own dtype or
in float32) or Winograd's tiles, and a constant pad. Of several explanations the one is taken that explains most layers. A
rule for all aligned 3x3 convolutions comes last, before it those layers that differ, by image or by more than one, and by
size where they change. What was seen is kept beside the rules, shape by shape, and answers for itself.

What it does not know: where between two sizes a kernel changes; the smaller size's rule ends with that size. A layer that no
copies explain is known at the shapes that were seen and nowhere else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, product
from typing import NamedTuple

from sdfit.predict.simulation.shapes import Shapes
from sdfit.predict.simulation.workspaces import (
    HALF,
    PAD_BYTES,
    Architecture,
    Measured,
    Rule,
    convolution_bytes,
    is_strided,
)

CONVOLUTION = "convolution"
PRODUCTS = ("addmm", "mm", "bmm", "baddbmm")
LARGEST_PAD_BYTES = 4096
_OPERANDS = ("input", "output", "weight")


class Form(NamedTuple):
    """One explanation of a workspace."""

    copies: tuple[str, ...]
    element_bytes: int | None = None
    pad_bytes: int = PAD_BYTES


class Layer(NamedTuple):
    """Convolutions that share their filter's shape: what a kernel is chosen by, beside sizes and batch."""

    dtype: str
    channels: tuple[int, int]
    side: int
    strided: bool


NOTHING = Form(())
_FORMS = [NOTHING, Form(("winograd",))] + [
    Form(tuple(name for name, on in zip(_OPERANDS, used, strict=True) if on), element_bytes)
    for element_bytes in (None, 4)
    for used in sorted(product((True, False), repeat=3), key=sum)
    if any(used)
]
"""The simplest first."""


def forms_of(shapes: Shapes, held_bytes: int) -> list[Form]:
    """Find every explanation of a convolution's workspace, the simplest first.

    Examples
    --------
    >>> shape = (1, 256, 512, 512)
    >>> forms_of(Shapes("convolution", "float16", (shape, (256, 256, 3, 3)), shape), 135397888)[0]
    Form(copies=('input', 'weight'), element_bytes=None, pad_bytes=512)
    """
    image, weight = shapes.inputs[:2]
    found = []
    for form in _FORMS:
        if form.element_bytes == 4 and shapes.dtype == "float32":
            continue
        bare = _bytes(form._replace(pad_bytes=0), shapes.dtype, image, weight, shapes.out)
        pad = held_bytes - bare
        fixed = form.copies in ((), ("winograd",))
        if pad == 0 or (not fixed and 0 < pad <= LARGEST_PAD_BYTES):
            found.append(form._replace(pad_bytes=PAD_BYTES if fixed else pad))
    return found


def explained(measured: Iterable[Measured]) -> dict[Shapes, Form | None]:
    """Give each convolution the explanation that explains most of all; None where there is none."""
    candidates = {m.shapes: forms_of(*m) for m in measured if m.shapes.operation == CONVOLUTION}
    chosen: dict[Shapes, Form | None] = dict.fromkeys(candidates)
    left = {shapes: forms for shapes, forms in candidates.items() if forms}
    while left:
        votes = Counter(form for forms in left.values() for form in forms)
        simplest = {form: i for i, form in reversed(list(enumerate(f._replace(pad_bytes=0) for f in _FORMS)))}
        best = min(votes, key=lambda f: (-votes[f], simplest[f._replace(pad_bytes=0)], f.pad_bytes))
        for shapes in [s for s, forms in left.items() if best in forms]:
            chosen[shapes] = best
            del left[shapes]
    return chosen


def architecture_of(
    measured: Sequence[Measured],
    *,
    name: str,
    cublas_bytes: int,
    evidence: str,
    base: Architecture | None = None,
) -> Architecture:
    """Make a workspace table of what kernels held.

    Parameters
    ----------
    measured : sequence of Measured
        Of one card.
    name : str
        The card.
    cublas_bytes : int
    evidence : str
        What the rows come from.
    base : Architecture, optional
        Whose rules stand for dtypes that were not seen; what was measured in it is kept.
    """
    rows = {m.shapes: m for m in (*(base.measured if base else ()), *measured)}
    forms = explained(rows.values())
    by_dtype: dict[str, dict[Shapes, Form | None]] = defaultdict(dict)
    for shapes, form in forms.items():
        by_dtype[shapes.dtype][shapes] = form
    rules = [rule for dtype, found in sorted(by_dtype.items()) for rule in _rules(dtype, found, evidence)]
    seen = set(by_dtype)
    for rule in base.rules if base else ():
        unseen = tuple(d for d in rule.dtypes if d not in seen)
        if unseen:
            rules.append(replace(rule, dtypes=unseen))
    if len(seen & set(HALF)) == 1:  # the other 16-bit dtype runs on the same units
        half = (seen & set(HALF)).pop()
        rules = [r for r in rules if r.dtypes == (half,) or not set(r.dtypes) <= set(HALF)]
        rules = [replace(r, dtypes=HALF) if r.dtypes == (half,) else r for r in rules]
    products = _products(rows.values())
    kept = [m for m in rows.values() if _worth_keeping(m, dict(products))]
    return Architecture(name, (name,), tuple(rules), cublas_bytes, evidence, tuple(sorted(products.items())),
                        tuple(sorted(kept)))  # fmt: skip


def followed(architecture: Architecture) -> tuple[int, int]:
    """How many of a table's measured convolutions its rules give to the byte, and how many there are."""
    rows = [m for m in architecture.measured if m.shapes.operation == CONVOLUTION]
    return sum(predicted(architecture, m.shapes) == m.held_bytes for m in rows), len(rows)


def predicted(architecture: Architecture, shapes: Shapes) -> int:
    """What a table's rules and products say of an operation, whatever was measured [bytes]."""
    if shapes.operation != CONVOLUTION:
        return dict(architecture.products).get(shapes.operation, 0)
    image, weight = shapes.inputs[:2]
    return convolution_bytes(architecture, shapes.dtype, image, weight, shapes.out)


def _products(rows: Iterable[Measured]) -> dict[str, int]:
    held: dict[str, set[int]] = defaultdict(set)
    for shapes, held_bytes in rows:
        if shapes.operation in PRODUCTS:
            held[shapes.operation].add(held_bytes)
    return {operation: amounts.pop() for operation, amounts in held.items() if len(amounts) == 1}


def _worth_keeping(m: Measured, products: dict[str, int]) -> bool:
    """Convolutions always, they are the evidence; of the others what no constant says."""
    if m.shapes.operation in PRODUCTS:
        return m.shapes.operation not in products
    return m.shapes.operation == CONVOLUTION or m.held_bytes > 0


def _bytes(form: Form, dtype: str, image: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> int:
    rule = Rule((dtype,), form.copies, "", element_bytes=form.element_bytes, pad_bytes=form.pad_bytes)
    return convolution_bytes(Architecture("", (), (rule,), 0), dtype, image, weight, out)


def _layer(shapes: Shapes) -> Layer:
    image, weight = shapes.inputs[:2]
    return Layer(shapes.dtype, (weight[1], weight[0]), weight[-1], is_strided(image, shapes.out))


def _aligned(layer: Layer) -> bool:
    return layer.side == 3 and layer.channels[0] % 8 == layer.channels[1] % 8 == 0


def _rules(dtype: str, forms: dict[Shapes, Form | None], evidence: str) -> list[Rule]:
    """The layers that differ from the most frequent form of their class, then that form."""
    layers: dict[Layer, dict[Shapes, Form]] = defaultdict(dict)
    for shapes, form in forms.items():
        if form is not None:
            layers[_layer(shapes)][shapes] = form
    votes = Counter(form for layer, found in layers.items() if _aligned(layer) for form in found.values())
    general = votes.most_common(1)[0][0] if votes else NOTHING
    found = []
    for layer, seen in sorted(layers.items()):
        default = general if _aligned(layer) else NOTHING
        if set(seen.values()) != {default}:
            found += _of_layer(layer, seen, evidence)
    if general != NOTHING:
        found.append(_rule(dtype, general, evidence, only="aligned"))
    return _needed(found, forms)


def _needed(rules: list[Rule], forms: dict[Shapes, Form | None]) -> list[Rule]:
    """Leave out the rules without which every convolution that was seen gets the same."""

    def says(these: list[Rule]) -> list[int]:
        table = Architecture("", (), tuple(these), 0)
        return [predicted(table, shapes) for shapes in forms]

    whole = says(rules)
    for rule in list(rules):
        fewer = [other for other in rules if other is not rule]
        if says(fewer) == whole:
            rules = fewer
    return rules


def _of_layer(layer: Layer, seen: dict[Shapes, Form], evidence: str) -> list[Rule]:
    one = {s: f for s, f in seen.items() if s.inputs[0][0] == 1}
    more = {s: f for s, f in seen.items() if s.inputs[0][0] > 1}
    pieces, batched = _pieces(one), _pieces(more)
    limits: list[tuple[list[tuple[int | None, Form]], dict[str, int]]]
    if pieces == batched or not one or not more:
        limits = [(pieces or batched, {})]
    else:
        limits = [(batched, {"min_batch": 2}), (pieces, {})]
    where = {"channels": layer.channels, "side": layer.side, "strided": layer.strided}
    return [
        _rule(layer.dtype, form, evidence, **where, **batch, **({} if most is None else {"max_pixels": most}))
        for found, batch in limits
        for most, form in found
    ]


def _pieces(seen: dict[Shapes, Form]) -> list[tuple[int | None, Form]]:
    """By rising size: up to how many pixels which form; the last one goes on for ever."""
    by_size: dict[int, list[Form]] = defaultdict(list)
    for shapes, form in seen.items():
        by_size[shapes.out[2] * shapes.out[3]].append(form)
    usual = [(pixels, Counter(found).most_common(1)[0][0]) for pixels, found in sorted(by_size.items())]
    runs = [list(run) for _, run in groupby(usual, key=lambda entry: entry[1])]
    return [(None if run is runs[-1] else run[-1][0], run[0][1]) for run in runs]


def _rule(dtype: str, form: Form, evidence: str, **where: object) -> Rule:
    return Rule((dtype,), form.copies, evidence, element_bytes=form.element_bytes, pad_bytes=form.pad_bytes, **where)  # type: ignore[arg-type]
