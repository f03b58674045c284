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
    from sdfit.predict.prediction import Prediction
    from sdfit.predict.predictor import Predictor

__version__ = "0.1.0"
__all__ = [
    "Prediction",
    "Predictor",
    "SdfitError",
    "SimulatedModelWarning",
    "Workload",
    "__version__",
    "available",
    "errors",
    "guard",
    "load",
]
_MODULES = ("errors", "guard")

_LATER = {
    "Prediction": "sdfit.predict.prediction",
    "Predictor": "sdfit.predict.predictor",
    "available": "sdfit.predict.library",
    "load": "sdfit.predict.library",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"sdfit.{name}")  # which also sets the attribute
    if name not in _LATER:
        raise AttributeError(f"module 'sdfit' has no attribute '{name}'")
    found = getattr(import_module(_LATER[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
