"""Tables of what a card's convolutions may hold: copies of operands, and the ways in which kernels may depart from them.

A table says for a group of dtypes which operands every kernel copies. Cards may differ in more: kernels that change with the
size or with the number of images, an amount held for every layer, a larger plan that is taken while memory allows. Each
such way is an `Odd` of a table; `sdfit.fit.kernels` tries them where no plain table gives what runs show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

from sdfit.predict.simulation.workspaces import HALF, Architecture, Rule
from sdfit.units import format_bytes

GROUPS: tuple[tuple[str, ...], ...] = (HALF, ("float32",))
"""Dtypes that run the same plans."""
OPERANDS = ("input", "output", "weight")
MOST_COPIES, MOST_WIDENED = 3, 4
"""Of an operand; of 16 bits two copies are one that is widened."""
UPSAMPLED = (256, 256)
"""Channels of the convolution after the last upsampling, of which known cards copy nothing from two images on."""
TENTHS = tuple(range(11, 31))
"""By how much larger an optional plan may be."""
Copies = tuple[int, ...]


class Odd(NamedTuple):
    """A way in which kernels depart from copies alone.

    Parameters
    ----------
    kind : {'small', 'large', 'single', 'pad', 'unstrided', 'larger'}
        Other copies up to so many pixels of the result, above so many, or of one image; so much more for every layer that holds something; only
        convolutions that do not make their maps smaller; a plan that is larger while there is room.
    copies : tuple of int, optional
        Of ``small``, ``large`` and ``single``: how often input, output and filter are copied there.
    amount : int
        Of ``small`` the most pixels, of ``large`` the most that are not large, of ``pad`` bytes, of ``larger`` tenths of the usual plan.
    room_bytes : int, optional
        Of ``larger``: taken up to so much in use; None: always.
    scope : str
        Of ``larger``: of ``all`` convolutions, of ``one`` image's, of those after the last upsampling (``upsampled``), or of
        both (``one upsampled``). Of ``large``: of ``all``, of ``one`` image's, or of ``several``.
    """

    kind: str
    copies: Copies | None = None
    amount: int = 0
    room_bytes: int | None = None
    scope: str = "all"

    @property
    def words(self) -> str:
        """In words."""
        if self.kind == "small":
            return f"{_copied(self.copies or ())} up to about {round(self.amount**0.5)}x{round(self.amount**0.5)} pixels of the result"
        if self.kind == "large":
            images = {"one": "of one image ", "several": "from two images on "}.get(self.scope, "")
            return f"{images}{_copied(self.copies or ())} above about {round(self.amount**0.5)}x{round(self.amount**0.5)} pixels of the result"
        if self.kind == "single":
            return f"of one image it copies {_copied(self.copies or ())}"
        if self.kind == "pad":
            return f"each holds {self.amount:,} B more"
        if self.kind == "unstrided":
            return "those that make their feature maps smaller copy nothing"
        which = {"all": "", "one": " of one image", "upsampled": " after the last upsampling"}
        of = which.get(self.scope, " of one image after the last upsampling")
        room = "always" if self.room_bytes is None else f"while about {format_bytes(self.room_bytes)} hold it"
        return f"a plan{of} takes {self.amount / 10:g} times as much {room}"


class Table(NamedTuple):
    """What convolutions of one group of dtypes hold.

    Parameters
    ----------
    copies : tuple of int, optional
        How often input, output and filter are copied; None: by the prior's own rules.
    only : {'all', 'aligned'}
        Of which convolutions, as in `sdfit.predict.simulation.workspaces.Rule`.
    upsampled : bool
        Whether from two images on that after the last upsampling holds nothing.
    winograd : bool
        Whether heavy convolutions run in Winograd's domain.
    odd : tuple of Odd
        Further ways; at most one of each kind.
    """

    copies: Copies | None
    only: str
    upsampled: bool
    winograd: bool
    odd: tuple[Odd, ...] = ()

    def having(self, kind: str) -> Odd | None:
        """Its way of a kind, if it has one."""
        return next((odd for odd in self.odd if odd.kind == kind), None)

    def rules(self, dtypes: tuple[str, ...], own: Sequence[Rule]) -> tuple[Rule, ...]:
        """As an `Architecture` has them, which knows no larger plans; ``own`` are the prior's."""
        found = [Rule(dtypes, ("winograd",), "", only="heavy")] if self.winograd else []
        if self.upsampled:
            found.append(Rule(dtypes, (), "", min_batch=2, channels=UPSAMPLED))
        pad, strided = self.having("pad"), False if self.having("unstrided") else None
        more = pad.amount if pad is not None else 0
        plain = Rule(dtypes, (), "", only=self.only or "all", strided=strided)
        plain = replace(plain, pad_bytes=plain.pad_bytes + more)
        copied: list[Rule] = []
        small, single, large = (self.having(kind) for kind in ("small", "single", "large"))
        if small is not None:
            copied.append(replace(plain, copies=_named(small.copies or (0, 0, 0)), max_pixels=small.amount))
        if single is not None:
            copied.append(replace(plain, copies=_named(single.copies or (0, 0, 0)), max_batch=1))
        if self.copies is None:
            copied += [
                replace(r, pad_bytes=r.pad_bytes + more, strided=r.strided if strided is None else False) for r in own
            ]
        elif any(self.copies):
            copied.append(replace(plain, copies=_named(self.copies)))
        if large is not None:
            below = [replace(r, max_pixels=min(r.max_pixels or large.amount, large.amount)) for r in copied]
            above = replace(
                plain,
                copies=_named(large.copies or (0, 0, 0)),
                max_batch=1 if large.scope == "one" else None,
                min_batch=2 if large.scope == "several" else 1,
            )
            copied = [*below, above, *([] if large.scope == "all" else copied)]
        return (*found, *copied)

    @property
    def words(self) -> str:
        """In words.

        Examples
        --------
        >>> Table((1, 0, 2), "all", False, True).words
        'every convolution copies its input and twice its filter; heavy ones run in the domain of Winograd'
        """
        if self.copies is None:
            said = ["convolutions copy as the prior has it"]
        else:
            which = "every convolution" if self.only == "all" else "every convolution of 3x3 with aligned channels"
            said = (
                [f"{which} copies {_copied(self.copies)}"] if any(self.copies) else ["no convolution copies anything"]
            )
        said += [odd.words for odd in self.odd]
        if self.upsampled:
            said.append("the last upsampling's nothing from two images on")
        if self.winograd:
            said.append("heavy ones run in the domain of Winograd")
        return "; ".join(said)

    def changes(self, other: Table) -> int:
        """How many things differ; a way in which kernels depart from copies counts as three."""
        if self.copies is None or other.copies is None:
            copies = 0 if self.copies is other.copies else 2
        else:
            copies = sum(abs(a - b) for a, b in zip(self.copies, other.copies, strict=True))
        nothing = not all(
            any(one.copies or (1,)) for one in (self, other)
        )  # then it says nothing which convolutions copy it
        plain = (
            (self.winograd != other.winograd)
            if nothing
            else sum(a != b for a, b in zip(self[1:4], other[1:4], strict=True))
        )
        return copies + plain + 3 * len(set(self.odd) ^ set(other.odd))


def _copied(copies: Copies) -> str:
    times = ("", "", "twice ", "three times ", "four times ")
    named = zip(("input", "output", "filter"), copies, strict=False)
    return " and ".join(f"{times[often]}its {name}" for name, often in named if often) or "nothing"


def _named(copies: Copies) -> tuple[str, ...]:
    return tuple(name for name, often in zip(OPERANDS, copies, strict=True) for _ in range(often))


def own_rules(dtypes: tuple[str, ...], own: Architecture) -> tuple[Rule, ...]:
    """Those of the prior for a group of dtypes, but for the exception and the plan that a `Table` has words for."""
    rules = tuple(replace(rule, dtypes=dtypes) for rule in own.rules if set(dtypes) & set(rule.dtypes))
    return tuple(r for r in rules if r.copies != ("winograd",) and (r.copies or r.channels != UPSAMPLED))


@cache
def known_table(dtypes: tuple[str, ...], own: Architecture) -> Table:
    """The prior's own table."""
    rules = [rule for rule in own.rules if set(dtypes) & set(rule.dtypes)]
    main, plain = own_rules(dtypes, own), Rule((), (), "")
    heavy = any(rule.copies == ("winograd",) for rule in rules)
    upsampled = any(not rule.copies and rule.channels == UPSAMPLED for rule in rules)
    if not main:
        return Table((0, 0, 0), "all", False, heavy)
    bare = replace(main[0], dtypes=(), copies=(), evidence="", only="all", element_bytes=None)
    if len(main) == 1 and bare == plain:
        wide = 2 if main[0].element_bytes == 4 and dtypes == HALF else 1
        return Table(tuple(wide * main[0].copies.count(name) for name in OPERANDS), main[0].only, upsampled, heavy)
    return Table(None, "", upsampled, heavy)


@cache
def tables(dtypes: tuple[str, ...], own: Architecture) -> tuple[Table, ...]:
    """The plain tables that a group of dtypes may have: the prior's own first, then those nearest to it."""
    known = known_table(dtypes, own)
    return tuple(sorted({known: 0} | dict.fromkeys(_family(known, dtypes == HALF), 0), key=known.changes))


def _family(known: Table, widened: bool) -> Iterator[Table]:
    for winograd in (False, True):
        yield Table((0, 0, 0), "all", False, winograd)
        for copies in copies_of_operands(widened):
            if any(copies):
                yield from (Table(copies, *rest, winograd) for rest in product(("aligned", "all"), (False, True)))
        if known.copies is None:
            yield known._replace(winograd=winograd)


def copies_of_operands(widened: bool = True) -> list[Copies]:
    """How often input, output and filter may be copied."""
    return list(product(range((MOST_WIDENED if widened else MOST_COPIES) + 1), repeat=len(OPERANDS)))
