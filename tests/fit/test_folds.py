"""Leaving whole resolutions out."""

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold

from sdfit.fit.folds import left_out


@pytest.mark.parametrize("groups", [2, 9, 10, 11, 70])
@pytest.mark.parametrize("folds", [2, 10, None])
def test_the_folds_are_scikit_learns(groups: int, folds: int | None) -> None:
    """The rows that stay and those left out are those of GroupKFold; up to 60 groups are left out one by one."""
    names = np.random.default_rng(groups).integers(0, groups, 300).astype(str)
    found = list(left_out(names, folds))
    count = len(np.unique(names))
    expected = list(GroupKFold(min(folds or 60, count)).split(names, groups=np.unique(names, return_inverse=True)[1]))
    if folds is None and count <= 60:
        expected = [(np.flatnonzero(names != name), np.flatnonzero(names == name)) for name in np.unique(names)]
    assert len(found) == len(expected)
    for (stay, out), (train, test) in zip(found, expected, strict=True):
        assert (stay == train).all() and (out == test).all()


def test_of_one_group_nothing_is_left_out() -> None:
    """One group, or none, makes no pair."""
    assert not list(left_out(["a", "a"])) and not list(left_out([]))
