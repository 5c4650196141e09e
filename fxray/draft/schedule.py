"""At which steps something is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from fxray.errors import DraftError

__all__ = ["SCHEDULE_KEYS", "Schedule"]

SCHEDULE_KEYS = ("every", "steps", "start", "stop")
"""The words of a schedule, in marks and in draft entries."""


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _steps(value: Any) -> Any:
    """Return steps ascending, each once; what is no list of steps as it is."""
    if not isinstance(value, Iterable) or isinstance(value, str):
        return value
    steps = tuple(value)
    return tuple(sorted(set(steps))) if all(_whole(n, 0) for n in steps) else steps


@attrs.frozen
class Schedule:
    """At which steps something is kept, counting each phase's own steps from 0.

    Attributes:
        every: at `start`, `start + every`, `start + 2 * every`…
        steps: exactly at these, ascending, instead of `every`, `start` and `stop`.
        start: the first step.
        stop: the step before which it ends (exclusive); None for never.

    >>> [step for step in range(30) if Schedule(every=10, start=5).due(step)]
    [5, 15, 25]
    """

    every: int = attrs.field(default=1)
    steps: tuple[int, ...] | None = attrs.field(default=None, converter=_steps)
    start: int = attrs.field(default=0)
    stop: int | None = attrs.field(default=None)

    def __attrs_post_init__(self) -> None:
        msg = ""
        if not _whole(self.every, 1):
            msg = f"every={self.every!r} is not a whole number of at least 1"
        elif not _whole(self.start, 0):
            msg = f"start={self.start!r} is not a step: a whole number, 0 or more"
        elif self.stop is not None and not _whole(self.stop, self.start + 1):
            msg = f"stop={self.stop!r} is not a step after start={self.start} (or None for no end)"
        elif self.steps is not None:
            msg = self._wrong_steps(self.steps)
        if msg:
            raise DraftError(msg)

    def _wrong_steps(self, steps: object) -> str:
        if not isinstance(steps, tuple) or not steps or not all(_whole(n, 0) for n in steps):
            return f"steps={steps!r} is not a list of steps, e.g. [0, 5, 7]"
        if (self.every, self.start, self.stop) != (1, 0, None):
            return "steps= says all; leave every, start and stop out, or steps"
        return ""

    def due(self, step: int) -> bool:
        """Return whether something is kept at `step` of the phase."""
        if self.steps is not None:
            return step in self.steps
        started = step >= self.start and (self.stop is None or step < self.stop)
        return started and (step - self.start) % self.every == 0

    def count(self, steps: int) -> int:
        """Return at how many of the first `steps` steps it is due.

        >>> Schedule(every=10, start=5, stop=26).count(1000)
        3
        """
        if self.steps is not None:
            return sum(step < steps for step in self.steps)
        end = steps if self.stop is None else min(steps, self.stop)
        return max(0, -(-(end - self.start) // self.every))

    @property
    def name(self) -> str:
        """The part of a stream's name, different for different schedules.

        >>> Schedule().name, Schedule(10, start=5, stop=50).name, Schedule(steps=[0, 7]).name
        ('always', 'every10from5to50', 'steps-0-7')
        """
        if self.steps is not None:
            text = "-".join(map(str, self.steps))
            if len(text) > 24:  # names of streams are names of folders
                text = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
            return f"steps-{text}"
        if self == Schedule():
            return "always"
        begin = f"from{self.start}" if self.start else ""
        end = "" if self.stop is None else f"to{self.stop}"
        return f"every{self.every}{begin}{end}"

    def __str__(self) -> str:
        if self.steps is not None:
            shown = ", ".join(map(str, self.steps[:6]))
            return f"steps {shown}{'…' if len(self.steps) > 6 else ''}"
        begin = f" from {self.start}" if self.start else ""
        end = "" if self.stop is None else f" to {self.stop}"
        return ("every step" if self.every == 1 else f"every {self.every}") + begin + end

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready plain data."""
        plain = attrs.asdict(self)
        return plain | {"steps": None if self.steps is None else list(self.steps)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schedule:
        """Return the schedule that `to_dict` gave as `plain`."""
        return cls(**plain)
