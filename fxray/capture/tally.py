"""What every capture kept in a run, and why one kept nothing."""

from __future__ import annotations

import collections
import contextlib
import warnings
from typing import TYPE_CHECKING

from fxray.errors import FxrayWarning

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fxray.capture.spots import Site

__all__ = ["Tally"]

_Key = tuple[str, str]


class Tally:
    """What came of each capture, and what was said once already.

    Attributes:
        steps: how many there were, by phase.
        called: names of the modules that were called.
    """

    def __init__(self) -> None:
        self.steps: collections.Counter[str] = collections.Counter()
        self.called: set[str] = set()
        self._due: set[_Key] = set()
        self._kept: set[_Key] = set()
        self._failures: dict[_Key, tuple[int, str]] = {}
        self._counted: collections.Counter[str] = collections.Counter()
        self._said: set[str] = set()

    def due(self, sites: Iterable[Site]) -> None:
        """Note captures that were due."""
        self._due.update(site.name for site in sites)

    def kept(self, site: Site) -> None:
        """Note a capture that kept something."""
        self._kept.add(site.name)

    def failed(self, site: Site, error: Exception) -> None:
        """Count a selection that failed; say so once per capture."""
        count, _ = self._failures.get(site.name, (0, ""))
        text = f"{type(error).__name__}: {error}"
        self._failures[site.name] = (count + 1, text)
        path, kind = site.name
        selection = type(site.capture.selection).__name__
        if not count:
            self.say(
                f"selection {selection} failed on the {kind} of {path!r}: {text}. "
                "Nothing of it is kept while it fails; training goes on"
            )

    def count(self, what: str, say: str = "") -> None:
        """Count something that a run should tell at its end; say it once, if given words."""
        self._counted[what] += 1
        if say:
            self.say(say)

    def say(self, text: str) -> None:
        """Warn, once; never raises, where warnings are errors either: training goes on."""
        if text not in self._said:
            self._said.add(text)
            with contextlib.suppress(FxrayWarning):
                warnings.warn(text, FxrayWarning, stacklevel=2)

    def notes(self, sites: Iterable[Site]) -> list[str]:
        """Return what the run's end should tell: failures, counts, captures that kept nothing."""
        told = [
            f"the selection of {path} {kind} failed {count} times: {text}"
            for (path, kind), (count, text) in self._failures.items()
        ]
        told += [f"{count} {what}" for what, count in self._counted.items()]
        return told + self.empty(sites)

    def empty(self, sites: Iterable[Site], *, named: int | None = None) -> list[str]:
        """Return one sentence per reason for which captures kept nothing, naming them.

        Args:
            sites: the captures.
            named: how many captures a sentence names, all for None.
        """
        by_reason: dict[tuple[str, str], list[str]] = {}
        for site in sites:
            if site.name not in self._kept:
                path, kind = site.name
                by_reason.setdefault((kind, self._reason(site)), []).append(path)
        return [
            f"nothing was kept of the {kind} of {_enumerated(paths, named)}: {reason}"
            for (kind, reason), paths in by_reason.items()
        ]

    def _reason(self, site: Site) -> str:
        _, kind = site.name
        if site.module not in self.called:
            which = repr(site.module) if site.module else "the module"
            return f"{which} was never called while recording"
        if site.name in self._failures:
            return "its selection failed every time"
        if site.name not in self._due:
            steps = ", ".join(f"{count} of {phase}" for phase, count in self.steps.items())
            hint = "; recorder.step() makes one step of several forwards" if site.module else ""
            return f"never due (kept {site.capture.schedule.name}; steps were {steps}){hint}"
        if kind == "weight_grad":
            return "no optimizer of torch.optim stepped with a gradient for it"
        if kind == "grad":
            return "no gradient came (frozen, under no_grad, or no backward)"
        modes = " and ".join(site.op.nodes)
        return f"not reached (it stands in the graph of {modes} mode)"


def _enumerated(names: list[str], limit: int | None) -> str:
    if limit is None or len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"
