"""The made-up card speaks the equation's words."""

from sdfit.backends.fake import COEFFICIENTS, SCORES
from sdfit.equation.stages import STAGE, STAGES
from sdfit.equation.terms import TERMS


def test_its_coefficients_are_of_terms_that_their_stages_have():
    """A coefficient of a term that no stage knows would silently be left out of the world that tests are held to."""
    assert set(COEFFICIENTS) == set(STAGES)
    for stage, known in COEFFICIENTS.items():
        assert set(known) <= set(STAGE[stage].terms), stage
    assert {name for name, _ in SCORES.values()} <= set(TERMS)
