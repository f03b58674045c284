"""The solver of the fits: what scipy's public function gives, to the bit, whichever of the two is called."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import nnls

from sdfit.fit import solver
from sdfit.fit.stage_model import median


def test_it_gives_what_the_public_function_gives() -> None:
    """Of tall, square and wide problems, in any layout, with columns of no use."""
    rng = np.random.default_rng(0)
    for rows, terms in ((30, 6), (6, 6), (3, 7), (1, 1), (400, 9)):
        columns = rng.normal(size=(rows, terms))
        columns[:, terms // 2] *= 0.0
        for target in (rng.normal(size=rows), columns @ rng.random(terms)):
            for given in (columns, np.asfortranarray(columns), np.repeat(columns, 2, axis=0)[::2]):
                expected = nnls(columns, target, maxiter=50 * terms)[0]
                assert solver.least(given, target, 50 * terms).tobytes() == expected.tobytes()


def test_it_says_that_it_did_not_finish() -> None:
    """As the public function does."""
    rng = np.random.default_rng(0)
    with pytest.raises(RuntimeError, match=r"did not finish|Maximum number"):
        solver.least(rng.random((40, 12)), rng.random(40), 1)


def test_without_the_compiled_solver_the_public_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is of another name, takes other arguments, or gives something else."""
    compiled = pytest.importorskip("scipy.optimize._slsqplib")
    if solver._compiled() is None:
        pytest.skip("this scipy's is not as known")
    for other in (lambda a, b: None, lambda a, b, n: (a[0], 0.0, 1), lambda a, b, n: None):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "nnls", other)
            assert solver._compiled() is None
    with monkeypatch.context() as patch:
        patch.delattr(compiled, "nnls")
        assert solver._compiled() is None


def test_the_median_is_numpys() -> None:
    """To the bit; of nothing it is not a number."""
    rng = np.random.default_rng(0)
    assert np.isnan(median(np.array([])))
    for count in (*range(1, 12), 100, 101):
        values = rng.normal(size=count)
        assert median(values) == np.median(values)
