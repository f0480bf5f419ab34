"""How a compile tells what it is doing: stages, and steps within a stage. The default says nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Times the stages and passes their steps on to a listener.

    Attributes:
        on_stage: called with a stage's title when it begins.
        on_step: called with steps done and steps in all, within the current stage.
        seconds: what each finished stage took, in order.
    """

    on_stage: Callable[[str], None] = lambda title: None
    on_step: Callable[[int, int], None] = lambda done, of: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Time what happens inside under `title`."""
        self.on_stage(title)
        start = time.perf_counter()
        yield
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start

    def step(self, done: int, of: int) -> None:
        """`done` of `of` steps of the current stage are finished."""
        self.on_step(done, of)
