"""What a run depends on beside the card: whether one is there, the software's versions, and that other libraries keep quiet and load fast."""

from __future__ import annotations

import gc
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from sdfit.errors import DeviceError, LocalModelWarning, SimulatedModelWarning, SweepWarning, needs, quiet

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
    for category in (LocalModelWarning, SimulatedModelWarning, SweepWarning):
        warnings.simplefilter("always", category)  # also where others are errors


@contextmanager
def libraries_loaded() -> Iterator[None]:
    """Import PyTorch, diffusers and transformers inside the ``with`` block, in two thirds of the time.

    Python looks for circles of dead values while modules are made of which nothing dies; and diffusers imports `scipy.stats` for
    schedulers that few use: it is loaded when something of it is asked for.
    """
    collects, postponed = gc.isenabled(), _Postponed()
    gc.disable()
    sys.meta_path.insert(0, postponed)
    try:
        yield
    finally:
        sys.meta_path.remove(postponed)
        gc.freeze()  # they stay: later looks leave them out
        if collects:
            gc.enable()


class _Postponed(MetaPathFinder, Loader):
    """Makes `scipy.stats` a module that loads when something is asked of it that it does not have yet.

    The standard library's `LazyLoader` would load it at the second import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "scipy.stats" else None
        if spec is not None and spec.loader is not None:
            self._real, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""

        def load(name: str) -> Any:
            if vars(module).pop("__getattr__", None) is load:
                self._real.exec_module(module)
            return getattr(module, name)

        vars(module)["__getattr__"] = load


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category.__module__.startswith("sdfit") and not quiet():
        print(f"note: {message}", file=sys.stderr)
