"""How much GPU memory will a Stable Diffusion v1.5 img2img run need, and will it fit?

>>> import sdfit
>>> sdfit.Workload(768, 512).unet_batch
2

Importing this is cheap: what needs numpy is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from sdfit.errors import SdfitError, SimulatedModelWarning
from sdfit.workload import Workload

if TYPE_CHECKING:
    from sdfit.predict.library import available, load
    from sdfit.predict.predictor import Prediction, Predictor

__version__ = "0.1.0"
__all__ = [
    "Prediction",
    "Predictor",
    "SdfitError",
    "SimulatedModelWarning",
    "Workload",
    "__version__",
    "available",
    "load",
]

_LATER = {
    "Prediction": "sdfit.predict.predictor",
    "Predictor": "sdfit.predict.predictor",
    "available": "sdfit.predict.library",
    "load": "sdfit.predict.library",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sdfit' has no attribute '{name}'")
    from importlib import import_module

    found = getattr(import_module(_LATER[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
