"""What a run depends on beside the card: whether one is there, the software's versions, and that other libraries keep quiet."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sdfit.errors import DeviceError, needs, quiet

NO_CARD = "there is no CUDA card here; run this on a machine with one, or simulate: --backend trace"


def a_card_is_there(gpu: str) -> None:
    """Refuse to go on without a CUDA card.

    Raises
    ------
    DeviceError
        Naming both ways on: another machine, or a trace.
    """
    try:
        import torch
    except ImportError as error:
        raise needs("sweep", "torch") from error
    if not torch.cuda.is_available():
        raise DeviceError(NO_CARD, gpu=gpu)


def software() -> dict[str, str | None]:
    """Versions of what runs the pipeline."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "transformers", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def releases() -> dict[str, str | None]:
    """Releases of what decides which memory a pipeline asks for, whatever they were built for."""
    return {package: of and of.partition("+")[0] for package, of in software().items() if package != "python"}


def quiet_libraries() -> None:
    """Keep the advice and warnings of other libraries off the terminal; sdfit's own warnings are notes on stderr.

    To be called before PyTorch, diffusers and transformers are imported, by each process that a person has started.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler tells of each start and stop
    warnings.showwarning = _note


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category.__module__.startswith("sdfit") and not quiet():
        print(f"note: {message}", file=sys.stderr)
