"""How a sweep shows where it stands: a bar on a terminal, plain lines in a pipe, both on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from types import TracebackType
from typing import Any

from sdfit.sweep.run import Progress
from sdfit.units import format_duration

LINE_EVERY_S = 10.0


class Reporter:
    """Called with each `Progress` of a sweep.

    Parameters
    ----------
    title : str
    total : int
        Runs in the plan.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self._bar: Any = None
        self._task: Any = None
        self._last_s = 0.0

    def __enter__(self) -> Reporter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[failed]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.title, total=self.total, failed="starting")
            try:
                self._bar.start()
            except BaseException:  # a signal in the midst of it, when the cursor may be hidden already
                self._bar.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def of_few(self, progress: Progress) -> None:
        """Show it where only some of the plan are to run."""
        each = (progress.elapsed_s / progress.done) if progress.done else 0.0
        left = max(self.total - progress.done - progress.crashed, 0)
        self(replace(progress, total=self.total, left=left, eta_s=each * left))

    def __call__(self, progress: Progress) -> None:
        """Show it."""
        failed = f"{progress.oom} out of memory, {progress.crashed} crashed"
        if self._bar is not None:
            self._bar.update(
                self._task, total=progress.total, completed=progress.done + progress.crashed, failed=failed
            )
            return
        now = time.monotonic()
        if now - self._last_s >= LINE_EVERY_S or not progress.left:
            self._last_s = now
            left = f", about {format_duration(progress.eta_s)} left" if progress.eta_s else ""
            print(f"{self.title}: {progress.done}/{progress.total} done, {failed}{left}", file=sys.stderr, flush=True)
