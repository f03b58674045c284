"""What an artifact may hold: one table, checked field by field before anything computes with it.

Each field has an exact type and bounds, text is printable and short, and nothing is left over. What has passed needs no
further defence: whatever the workload, its prediction is finite and not negative.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from itertools import product
from typing import Any

from sdfit.equation.metrics import LEAST, METRIC_FEATURES, METRICS, UNSEEN
from sdfit.equation.regimes import REGIMES
from sdfit.equation.sizes import domain_columns
from sdfit.equation.stages import COMPONENTS, is_stage_key
from sdfit.equation.terms import terms_of
from sdfit.equation.weights import WEIGHTS_TABLES, baseline_label
from sdfit.errors import ArtifactError, SdfitError
from sdfit.files import file_name
from sdfit.predict.conformal import kept_ranks
from sdfit.workload import CHOICES, LIMITS, VARIANT_FIELDS

FORMAT = 2
RESTS_ON = {
    "measured": "a sweep of that card",
    "corrected": "a model of its kernels, corrected by a few measured runs of that card",
    "published": "a simulated trace, its kernel workspaces calibrated on published measurements",
    "traced": "a simulated trace without any kernel workspace, which predicts too little",
    "fake": "a made-up card, for tests",
}
"""Each provenance, and what the numbers then rest on."""
MOST_TEXT = 300
MOST_BYTES = 2.0**40
"""Of weights, and of a coefficient in the unit of its term: a terabyte, where an image of 16384² takes some 10^20 of them."""
MOST_COUNT = 10**9
MOST_NAMED = 10_000
"""Files, variants or misses that an artifact names: a text in it may stand in many places at two bytes each."""
MOST_ERROR = 1e9
"""Of relative errors and scores, either way."""
LARGEST = 2**62

Check = Callable[[Any], None]


class _Wrong(Exception):
    """What is wrong, and the path to it."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words, self.path = words, list[str]()


def check(value: Any) -> None:
    """Check the fields of an artifact.

    Raises
    ------
    ArtifactError
        With the path to what is wrong, what it is and what it must be.
    """
    found = value.get("format") if type(value) is dict else None
    if found != FORMAT or type(found) is not int:
        what = (
            f"its format is {_shown(found)}" if type(value) is dict and found is not None else "it is no sdfit artifact"
        )
        raise ArtifactError(f"{what}; this sdfit reads format {FORMAT}")
    try:
        _ARTIFACT(value)
        if "prior" in value:
            _inside("prior", _prior(value["stages"]), value["prior"])
    except _Wrong as wrong:
        where = "".join(f" {_shown(name)} >" for name in wrong.path)[:-2]
        raise ArtifactError(f"its field{where} {wrong.words}" if where else f"it {wrong.words}") from None


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    return (repr(value) if repr(value).isprintable() else ascii(value))[:60]


def _must(ok: Any, value: Any, what: str) -> None:
    if not ok:
        raise _Wrong(f"is {_shown(value)}; it must be {what}")


def _inside(name: Any, check: Check, value: Any) -> None:
    try:
        check(value)
    except _Wrong as wrong:
        wrong.path.insert(0, name)
        raise


# -- what values may be --


def _number(low: float, high: float, *kinds: type) -> Check:
    what = f"a {'' if float in kinds else 'whole '}number from {low:g} to {high:g}"
    return lambda value: _must(type(value) in kinds and low <= value <= high, value, what)


def _text(value: Any) -> None:
    _must(
        type(value) is str and len(value) <= MOST_TEXT and value.isprintable(),
        value,
        f"printable text of at most {MOST_TEXT} characters",
    )


def _name(value: Any) -> None:
    _text(value)
    try:
        file_name(value)
    except SdfitError:
        _must(False, value, "the name of a file")


def _variant(value: Any) -> None:
    """A variant in words, as `sdfit.workload.variant_name` writes it."""
    _text(value)
    dtype, _, rest = value.partition(" ")
    attention, *options = rest.split(" ")
    allowed = [f"{field}={choice}" for field in VARIANT_FIELDS[2:] for choice in CHOICES[field][1:]]
    places = [allowed.index(option) if option in allowed else -1 for option in options]
    fields = {option.partition("=")[0] for option in options}
    known = dtype in CHOICES["dtype"] and attention in CHOICES["attention"] and -1 not in places
    _must(known and places == sorted(places) and len(fields) == len(places), value, "the name of a variant")


def _any_of(*known: Any) -> Check:
    what = "one of " + ", ".join(map(str, known))
    return lambda value: _must(any(type(value) is type(k) and value == k for k in known), value, what)


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _table(must: Mapping[str, Check], may: Mapping[str, Check] | None = None) -> Check:
    """These fields and no others."""
    every = {**must, **(may or {})}

    def check(value: Any) -> None:
        _must(type(value) is dict, value, "a table")
        for name in must:
            if name not in value:
                raise _Wrong(f"lacks the field '{name}'")
        for name, part in value.items():
            if name not in every:
                raise _Wrong(f"has an unknown field {_shown(name)}")
            _inside(name, every[name], part)

    return check


def _map(key: Check | Collection[str], each: Check, least: int = 0) -> Check:
    """Any number of names, each with the same kind of value."""
    what = f"a table with {least} name at least" if least else "a table"

    def check(value: Any) -> None:
        _must(type(value) is dict and len(value) >= least, value, what)
        for name, part in value.items():
            if callable(key):
                key(name)
            elif name not in key:
                raise _Wrong(f"has an unknown name {_shown(name)}")
            _inside(name, each, part)

    return check


def _list(each: Check, least: int = 0, most: int = MOST_COUNT) -> Check:
    what = f"a list of {least if least == most else f'{least} to {most}'} values"

    def check(value: Any) -> None:
        _must(type(value) is list and least <= len(value) <= most, value, what)
        for part in value:
            each(part)

    return check


def _each_once(texts: Check) -> Check:
    def check(value: Any) -> None:
        texts(value)
        _must(len(set(value)) == len(value), value, "a list that names each once")

    return check


def _row(length: int, high: float) -> Check:
    """A list of so many numbers from 0 to ``high``."""
    what = f"a list of {length} numbers from 0 to {high:g}"

    def check(value: Any) -> None:
        _must(type(value) is list and len(value) == length, value, what)
        for number in value:
            if not ((type(number) is float or type(number) is int) and 0 <= number <= high):
                raise _Wrong(f"holds {_shown(number)}; it must be {what}")

    return check


def _ascending(high: float) -> Check:
    """A list of numbers from -high to high, each at least as large as the one before."""

    def check(value: Any) -> None:
        _must(type(value) is list, value, "a list of numbers")
        last = -high
        for number in value:
            if not ((type(number) is float or type(number) is int) and last <= number <= high):
                raise _Wrong(f"holds {_shown(number)}; it must be a list of numbers up to {high:g} in ascending order")
            last = number

    return check


_whole, _amount, _error = (
    _number(0, LARGEST, int),
    _number(0, MOST_BYTES, int),
    _number(-MOST_ERROR, MOST_ERROR, int, float),
)
_count = _number(0, MOST_COUNT, int)
_errors = {"median": _error, "p95": _error, "worst": _error}


# -- what needs more than a type --


def _weights(value: Any) -> None:
    """A dtype's weights: a pipeline as a whole holds at least the sum of its components."""
    _LABELS(value)
    for vae, checked in product(CHOICES["vae"], (True, False)):
        label = baseline_label(str(vae), checked)
        parts = [f"vae/{vae}" if c == "vae" else c for c in COMPONENTS if checked or c != "safety_checker"]
        least = sum(value.get(part, 0) for part in parts)
        _inside(label, lambda whole: _must(whole >= least, whole, f"at least {least}"), value.get(label, least))  # noqa: B023


def _range(value: Any) -> None:
    _list(_whole, 2, 2)(value)
    _must(1 <= value[0] <= value[1], value, "the least and the most of a range")


@cache
def _stage(terms: tuple[str, ...]) -> Check:
    """A stage's sets of coefficients, one row each; `REGIMES` choose among them."""
    row, low = _row(len(terms), MOST_BYTES), _list(_row(len(terms), MOST_BYTES))
    high = _list(_list(_or_null(_number(0, MOST_BYTES, int, float)), len(terms), len(terms)))
    fields = _table({
        "terms": _list(_text, len(terms), len(terms)),
        "regimes": _list(_number(0, len(REGIMES) - 1, int), len(REGIMES), len(REGIMES)),
        "coef": _list(row, 1, len(REGIMES)),
        "low": low,
        "high": high,
        "unidentified": _map(terms, _text),
        "condition": _number(0, float("1e300"), int, float),
        "domain": _table(dict.fromkeys(domain_columns(1, 1, 1), _range)),
        "rows": _count,
    })  # fmt: skip

    def check(value: Any) -> None:
        fields(value)
        sets = len(value["coef"])
        _inside("terms", lambda found: _must(tuple(found) == terms, found, ", ".join(terms)), value["terms"])
        for name in ("low", "high"):
            _must(len(value[name]) == sets, value[name], f"a table with {sets} rows of '{name}'")
        _must(max(value["regimes"]) < sets, value, f"a table whose regimes choose among {sets} rows")

    return check


def _prior(stages: Mapping[str, Any]) -> Check:
    """Of the model that few runs corrected: its coefficients, and the share of each that the runs told, stage by stage."""
    parts = {}
    for name, stage in stages.items():
        count = len(stage["coef"])
        parts[name] = _table({
            "terms": _list(_any_of(*stage["terms"])),
            "prior": _list(_list(_number(0, MOST_BYTES, int, float)), count, count),
            "told": _list(_list(_number(0, 1, int, float)), count, count),
        })  # fmt: skip
    fields = _table({
        "name": _name,
        "provenance": _any_of(*RESTS_ON),
        "rows": _number(1, MOST_COUNT, int),
        "scale": _number(1, MOST_ERROR, int, float),
        "stages": _table(parts),
    }, {
        "kernels": _map(_any_of(*CHOICES["dtype"]), _text),
        "constant_bytes": _number(-MOST_BYTES, MOST_BYTES, int),
    })  # fmt: skip

    def check(value: Any) -> None:
        fields(value)
        for name, found in value["stages"].items():
            long = all(len(row) == len(found["terms"]) for row in (*found["prior"], *found["told"]))
            _inside(name, lambda part: _must(long, part, "a table with a number for each of its terms"), found)  # noqa: B023

    return check


def _any_value(value: Any) -> None:
    """Checked elsewhere."""


def _group(value: Any) -> None:
    """A metric's coefficients: a row for each range of sizes between the edges."""
    _GROUP(value)
    _list(_row(len(METRIC_FEATURES), MOST_BYTES), len(value["edges"]) + 1, len(value["edges"]) + 1)(value["coef"])


def _scores(value: Any) -> None:
    """Order statistics as `sdfit.predict.conformal.Scores` keeps them of so many."""
    _SCORES(value)
    kept = len(kept_ranks(value["count"]))
    _must(len(value["values"]) == kept, value, f"a table with {kept} values of {value['count']}")


def _having(name: str, table: Check) -> Check:
    """A table in which one name is not missing."""

    def check(value: Any) -> None:
        table(value)
        if name not in value:
            raise _Wrong(f"lacks the name '{name}'" + ", which holds for all" * (not name))

    return check


def _with_all(each: Check) -> Check:
    """Names with values, one of them ``""``, which holds for all."""
    return _having("", _map(_text, each))


def _families(value: Any) -> None:
    """Scores by family, with one that holds for all; of what packing adds in kinds never seen the least beside the most."""
    _with_all(_scores)(value)
    for name in value:
        if name.split("|")[0] == UNSEEN and not name.endswith(LEAST):
            _having(f"{name}|{LEAST}", _any_value)(value)


_LABELS = _map(
    {"unet", "text_encoder", "safety_checker"}
    | {f"vae/{vae}" for vae in CHOICES["vae"]}
    | {baseline_label(str(vae), checked) for vae in CHOICES["vae"] for checked in (True, False)},
    _amount,
)
_GROUP = _table({"edges": _ascending(LARGEST), "coef": _list(_row(len(METRIC_FEATURES), MOST_BYTES), 1)})
_SCORES = _table({"count": _number(1, MOST_COUNT, int), "values": _ascending(MOST_ERROR)})


def _stages(value: Any) -> None:
    _must(type(value) is dict, value, "a table")
    for name, part in value.items():
        key = tuple(name.split("|")) if type(name) is str else ()
        if not is_stage_key(key):
            raise _Wrong(f"has an unknown stage {_shown(name)}")
        _inside(name, _stage(terms_of(key)), part)


def _fact(value: Any) -> None:
    if type(value) is not bool and value is not None:
        (_text if type(value) is str else _number(-LARGEST, LARGEST, int, float))(value)


_WORKLOAD = {
    **{name: _number(low, high, int) for name, (low, high) in LIMITS.items()},
    "guidance_scale": _number(0, LARGEST, int, float),
}
_OPTIONS = {name: _any_of(*choices) for name, choices in CHOICES.items()}
_NO_PUBLISHED = _table({"rows": _any_of(0), "cards": _map(_text, _count)})
_PUBLISHED = _table({
    "rows": _count,
    "cards": _map(_text, _count),
    **_errors,
    "misses": _list(_table({"id": _text, "size": _text, "error": _error, "reason": _text}), most=MOST_NAMED),
})  # fmt: skip


def _published(value: Any) -> None:
    (_NO_PUBLISHED if type(value) is dict and value.get("rows") == 0 else _PUBLISHED)(value)


_EVALUATION = _table(
    {"rows": _count, "oom_rows": _count, "crashed_rows": _count, "folds": _count, "fitted": _table(_errors)},
    {"metrics": _map(METRICS, _table({**_errors, "rows": _count})), "cross_validated": _table({**_errors, "rows": _count}), "regime_known": _table({**_errors, "rows": _count}), "worst_row": _table({**_WORKLOAD, "error": _error}, _OPTIONS),
     "published": _published},
)  # fmt: skip
_BASELINE = _table({
    "terms": _list(_text, 4, 4),
    "units": _list(_text, 4, 4),
    "variants": _map(_text, _table({"coef": _row(4, MOST_BYTES), "rows": _count, **_errors}), 1),
})  # fmt: skip
_ARTIFACT = _table({
    "format": _any_of(FORMAT),
    "name": _name,
    "provenance": _any_of(*RESTS_ON),
    "environment": _map(_text, _fact),
    "sources": _list(_table({"name": _text, "sha256": _text, "rows": _count, "oom": _count, "grid": _text}), most=MOST_NAMED),
    "components": _map(WEIGHTS_TABLES, _weights),
    "stages": _stages,
    "metrics": _map(METRICS[1:], _with_all(_group)),
    "scores": _having("allocated", _map(METRICS, _families)),
    "swept": _each_once(_list(_variant, most=MOST_NAMED)),
    "baseline": _BASELINE,
    "evaluation": _EVALUATION,
}, {"prior": _any_value})  # fmt: skip
