"""How much GPU memory will a Stable Diffusion v1.5 img2img run need, and will it fit?

>>> import sdfit
>>> sdfit.Workload(768, 512).unet_batch
2
"""

from sdfit.errors import SdfitError, SimulatedModelWarning
from sdfit.library import available, load
from sdfit.predictor import Prediction, Predictor
from sdfit.workload import Workload

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
