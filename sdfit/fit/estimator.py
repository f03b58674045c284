"""The regression of one stage as a scikit-learn estimator: to be cloned, searched and cross-validated with its tools.

By itself, because importing scikit-learn takes longer than `sdfit fit` does, which needs none of it.
"""

from __future__ import annotations

from sklearn.base import BaseEstimator, RegressorMixin

from sdfit.fit.stage_model import StageModel


class StageRegressor(RegressorMixin, BaseEstimator, StageModel):
    """`StageModel`, of which ``X`` has the columns `sdfit.equation.sizes.SIZE_COLUMNS`.

    Examples
    --------
    >>> StageRegressor(("unet", "float16", "eager")).get_params()
    {'key': ('unet', 'float16', 'eager')}
    """
