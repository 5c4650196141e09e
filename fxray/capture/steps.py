"""Which step, epoch, batch and call a forward belongs to."""

from __future__ import annotations

import collections
import contextlib
import time
from typing import TYPE_CHECKING

import attrs

from fxray.errors import RecordError
from fxray.store import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Forward", "Steps"]


@attrs.frozen
class Forward:
    """One forward that began.

    Attributes:
        row: where it stands in the training.
        count: which of its phase's own steps it belongs to, from 0; what schedules count.
        index: which forward of its phase it is, from 0.
    """

    row: Row
    count: int
    index: int


class Steps:
    """Counts forwards.

    Without help, a forward in training mode is a step. `epoch` numbers epochs and
    batches, `phase` names a pass that trains nothing, `group` makes one step of
    several forwards. As long as nothing was trained, forwards in eval mode are steps
    of their own phase, so that a run of prompts alone has steps to ask for.
    """

    def __init__(self, step: int = 0) -> None:
        self.step, self.epoch = step, 0
        self._epochs_begun = 0
        self._trained = step > 0
        self._batch: int | None = None
        self._trained_batch = 0
        self._phase: str | None = None
        self._grouped = False
        self._group_phases: set[str] = set()
        self._forwards: collections.Counter[str] = collections.Counter()
        self._passes: collections.Counter[str] = collections.Counter()
        self._calls: dict[str, tuple[int, int]] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    @property
    def phase(self) -> str | None:
        """The named pass that is open, None outside of one."""
        return self._phase

    @property
    def grouped(self) -> bool:
        """Whether a step of several forwards is open."""
        return self._grouped

    def begin(self, *, training: bool) -> Forward:
        """Count a forward that begins in this mode."""
        phase = self._phase_of(training=training)
        trains = training and self._phase is None
        first = self._is_first(phase)
        if first:
            self._counts[phase] += 1
            self._group_phases.add(phase)
        if trains and first:
            self.step += 1
            self._trained = True
        if trains:
            step = self.step - 1
            self._trained_batch = step if self._batch is None else self._batch
        elif self._trained or self._phase is not None:
            # Not below a step given before training began, so that steps never decrease.
            step = max(self.step, self._calls.get(phase, (0, 0))[0])
        else:
            step = self._counts[phase] - 1
        batch = self._batch
        if batch is None:
            batch = step if trains else self._passes[phase]
        self._passes[phase] += 1
        call = self._next_call(phase, step)
        index = self._forwards[phase]
        self._forwards[phase] += 1
        row = Row(step, self.epoch, batch, call, phase, time.time_ns())
        return Forward(row, self._counts[phase] - 1, index)

    def peek(self, *, training: bool) -> int:
        """Return the count that a forward would have if it began in this mode now."""
        phase = self._phase_of(training=training)
        return self._counts[phase] - (not self._is_first(phase))

    def _phase_of(self, *, training: bool) -> str:
        return self._phase or ("train" if training else "eval")

    def _is_first(self, phase: str) -> bool:
        """Return whether the next forward of `phase` begins a step of it."""
        return not self._grouped or phase not in self._group_phases

    def now(self, what: str) -> Row:
        """Return the row of something that happens in the training step begun last.

        Args:
            what: whose calls within a step are counted, e.g. `"log"`.
        """
        step = max(self.step - 1, 0)
        call = self._next_call(f"@{what}", step)
        phase = self._phase or "train"
        return Row(step, self.epoch, self._trained_batch, call, phase, time.time_ns())

    def _next_call(self, whose: str, step: int) -> int:
        before, call = self._calls.get(whose, (-1, 0))
        call = call + 1 if before == step else 0
        self._calls[whose] = (step, call)
        return call

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """Make one step of the forwards inside."""
        if self._grouped:
            msg = "recorder.step() inside recorder.step(): leave the first before the second"
            raise RecordError(msg)
        self._grouped, self._group_phases = True, set()
        try:
            yield
        finally:
            self._grouped = False

    @contextlib.contextmanager
    def named(self, phase: str) -> Iterator[None]:
        """Let the forwards inside be of `phase`, and train nothing."""
        if self._phase is not None:
            msg = f"phase {phase!r} inside phase {self._phase!r}: leave one before the other"
            raise RecordError(msg)
        if not phase or phase == "train":
            msg = f"{phase!r} is no name for a pass that trains nothing; say e.g. 'valid'"
            raise RecordError(msg)
        before, self._phase = self._batch, phase
        self._batch = None
        self._passes[phase] = 0
        try:
            yield
        finally:
            self._phase, self._batch = None, before

    @contextlib.contextmanager
    def next_epoch(self) -> Iterator[None]:
        """Let the forwards inside be of the next epoch."""
        if self._phase is not None:
            msg = f"an epoch inside phase {self._phase!r}: leave the phase first"
            raise RecordError(msg)
        self.epoch = self._epochs_begun
        self._epochs_begun += 1
        try:
            yield
        finally:
            self._batch = None

    def at_batch(self, batch: int) -> None:
        """Let the forwards that follow be of this batch of the pass."""
        self._batch = batch
