"""A progress bar that appears when work has taken a second and somebody watches."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

_PATIENCE = 1.0  # seconds


class Steps:
    """`with Steps("training", total) as steps: steps.advance()`; show: None means where stderr is a terminal."""

    def __init__(self, title: str, total: int, show: bool | None) -> None:
        from rich.console import Console  # `import metate` needs torch alone
        from rich.progress import Progress

        console = Console(stderr=True)
        self._title, self._total, self._done, self._began = title, total, 0, time.monotonic()
        shown = console.is_terminal if show is None else show
        self._bar = Progress(console=console, transient=True) if shown else None
        self._task: TaskID | None = None

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._bar is None or time.monotonic() - self._began < _PATIENCE:
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        self._bar.update(self._task, completed=self._done)

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None and self._bar is not None:
            self._bar.stop()
