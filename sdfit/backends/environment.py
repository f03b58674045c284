"""What a run depends on beside the card: whether one is there, the software's versions, and that other libraries keep quiet and load fast."""

from __future__ import annotations

import gc
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
    """Releases of what decides which memory a pipeline asks for, whatever they were built for; told without loading them."""
    found: dict[str, str | None] = {}
    for package in ("torch", "diffusers", "transformers", "accelerate"):
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = None
    return found


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
def libraries_loaded(*, compiles: bool) -> Iterator[None]:
    """Import PyTorch, diffusers and transformers inside the ``with`` block, in half of the time.

    Python looks for circles of dead values while modules are made of which nothing dies; the libraries ask twice which packages are
    installed, and transformers twice what is in its own files; and they import what a run does not use. That is loaded when
    something of it is asked for.

    Parameters
    ----------
    compiles : bool
        Whether this process may compile something. One that does not leaves PyTorch's compiler unloaded, and what the
        libraries tell it about their functions untold.
    """
    collects, postponed = gc.isenabled(), _Postponed(_UNUSED if compiles else _UNUSED | _COMPILER)
    gc.disable()
    installed, metadata.packages_distributions = metadata.packages_distributions, cache(metadata.packages_distributions)
    sys.meta_path.insert(0, postponed)
    try:
        yield
    finally:
        postponed.names = {}
        metadata.packages_distributions = installed
        gc.freeze()  # they stay: later looks leave them out
        if collects:
            gc.enable()


def _matched(*arguments: Any, **options: Any) -> Any:
    from scipy.optimize import _lsap

    return _lsap.linear_sum_assignment(*arguments, **options)


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    return _unmarked if function is None else function


_UNUSED: dict[str, dict[str, Any]] = {
    "scipy.stats": {},
    "scipy.integrate": {},
    "scipy.optimize": {"linear_sum_assignment": _matched},
}
"""Modules that diffusers and transformers import for schedulers and losses that a run has not, and what they take of them at once."""
_COMPILER: dict[str, dict[str, Any]] = {
    "torch._dynamo": {
        **dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _unmarked),
        "eval_frame": SimpleNamespace(OptimizedModule=type("NothingIsCompiled", (), {})),
    }
}
_APART = ("torch._dynamo._trace_wrapped_higher_order_op",)
"""What transformers takes of a postponed package that needs nothing else of it."""

_SCANS = "transformers.utils.import_utils"
"""What reads every file of transformers for the names in it."""


class _Postponed(MetaPathFinder, Loader):
    """Makes modules that load when something is asked of them that they do not have yet, a module inside them included.

    The standard library's `LazyLoader` would load them at the second import.
    """

    def __init__(self, names: dict[str, dict[str, Any]]) -> None:
        self.names = names
        self._waiting: dict[str, Loader] = {}
        self._there: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        package = fullname.rpartition(".")[0]
        if package in self._waiting and fullname not in _APART:
            self._load(package)
            if fullname in sys.modules:  # loaded with it: not once more
                self._there[fullname] = sys.modules[fullname]
                return ModuleSpec(fullname, self)
        if fullname not in self.names and fullname != _SCANS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._waiting[fullname], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See `importlib.abc.Loader`."""
        return self._there.get(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        if self._there.pop(module.__name__, None) is not None:
            return
        if module.__name__ == _SCANS:
            self._waiting.pop(_SCANS).exec_module(module)
            if scan := vars(module).get("create_import_structure_from_path"):
                found = cache(scan)
                vars(module)[scan.__name__] = lambda path: found(
                    Path(path).parent if Path(path).is_file() else Path(path)
                )
            return

        def asked(name: str) -> Any:
            self._load(module.__name__)
            return getattr(module, name)

        vars(module).update(self.names[module.__name__], __getattr__=asked)

    def _load(self, name: str) -> None:
        real, module = self._waiting.pop(name, None), sys.modules[name]
        if real is not None:
            vars(module).pop("__getattr__")
            real.exec_module(module)


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category.__module__.startswith("sdfit") and not quiet():
        print(f"note: {message}", file=sys.stderr)
