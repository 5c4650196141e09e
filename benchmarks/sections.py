"""What was measured of one model in one way of running it, and the figures made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import attrs
import numpy as np

from benchmarks.step_time import Clocks, Interval, here, interval, ratios, rounds
from benchmarks.ways import Graphs, Runner, runners

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.peers import Remote

__all__ = ["Section", "as_markdown", "local", "with_peers"]

_WARM_UP = 10
_PEER_ROUNDS = 50
"""A peer may take a hundred times the step: its ratio needs no more rounds than these."""


@attrs.frozen(eq=False)
class Section:
    """Ways to train one model that were timed in the same rounds, the first being the bare one.

    Attributes:
        model: its name.
        running: in eager, compiled, or beside the peers.
        sites: of each way, in the order of the columns.
        clocks: (round, way) each.
        graphs: of the ways that are compiled.
        kept: of each way that keeps anything, the share of what it was to keep.
        bases: of the ways that another process ran, the bare way of that process.
    """

    model: str
    running: Literal["eager", "compiled", "peers"]
    sites: Mapping[str, int]
    clocks: Clocks
    graphs: Mapping[str, Graphs] = attrs.field(factory=dict)
    kept: Mapping[str, float] = attrs.field(factory=dict)
    bases: Mapping[str, str] = attrs.field(factory=dict)

    def __contains__(self, way: str) -> bool:
        return way in self.sites

    def column(self, way: str) -> int:
        """Return the column of a way."""
        return [*self.sites].index(way)

    @property
    def milliseconds(self) -> float:
        """How long a bare step takes."""
        return float(np.median(self.clocks.wall[:, 0])) * 1e3

    def ratio(self, way: str, clock: Literal["wall", "cpu"] = "wall") -> Interval:
        """Return the step of a way over the bare step of its round and process."""
        seconds = getattr(self.clocks, clock)[:, [self._base(way), self.column(way)]]
        return interval(ratios(seconds)[:, 1:], lambda medians: medians[:, 0])

    def microseconds(self, way: str) -> Interval:
        """Return what a way costs at each of its sites, in processor time."""
        return interval(self._costs([way]), lambda medians: medians[:, 0])

    def share_a_site(self, way: str, rival: str) -> Interval:
        """Return what a way costs at a site over what `rival` costs at one of its own."""
        return interval(self._costs([way, rival]), lambda medians: medians[:, 0] / medians[:, 1])

    def share(self, way: str, rival: str) -> Interval:
        """Return what a way adds to a step over what `rival` adds, in processor time."""
        columns = ratios(self.clocks.cpu)[:, [self.column(way), self.column(rival)]]
        return interval(columns, lambda medians: (medians[:, 0] - 1) / (medians[:, 1] - 1))

    def _costs(self, ways: Sequence[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        cpu = self.clocks.cpu
        each = [
            (cpu[:, self.column(way)] - cpu[:, self._base(way)]) / max(1, self.sites[way])
            for way in ways
        ]
        return np.stack(each, axis=1) * 1e6

    def _base(self, way: str) -> int:
        return self.column(self.bases[way]) if way in self.bases else 0

    def lines(self) -> list[list[str]]:
        """Return the table of its ways, with its head."""
        found = [["way", "sites", "wall", "processor", "µs a site"]]
        if self.graphs:
            found[0] += ["graphs", "breaks", "recompiled", "first step s", "kept"]
        for way, sites in self.sites.items():
            found.append([way, *self._figures(way, sites)])
            graphs = self.graphs.get(way)
            if graphs is not None:
                counts = graphs.settled, graphs.breaks, graphs.recompiled
                kept = f"{self.kept[way]:.0%}" if way in self.kept else ""
                found[-1] += [*map(str, counts), f"{graphs.seconds:.1f}", kept]
        return found

    def _figures(self, way: str, sites: int) -> tuple[str, str, str, str]:
        if not self.column(way):
            return "", "1", "1", ""
        wall, cpu = str(self.ratio(way)), str(self.ratio(way, "cpu"))
        if not sites:
            return "", wall, cpu, ""
        each = self.microseconds(way)
        return str(sites), wall, cpu, f"{each.middle:.1f} [{each.low:.1f}, {each.high:.1f}]"


def local(model: str, ways: Sequence[str], pairs: int, backend: str = "") -> Section:
    """Train the model called `model` in all `ways` and return what each took.

    Args:
        model: one of `MODELS`.
        ways: the bare one first.
        pairs: how many rounds.
        backend: of `torch.compile`; empty for eager.
    """
    with runners(model, ways, backend) as found:
        for runner in found.values():
            runner.warm_up(_WARM_UP)
        clocks = rounds([here(runner.step) for runner in found.values()], pairs)
        kept = {way: _share_kept(runner, pairs + _WARM_UP) for way, runner in found.items()}
    sites = {way: runner.sites for way, runner in found.items()}
    graphs = {way: runner.graphs for way, runner in found.items() if runner.graphs is not None}
    shares = {way: share for way, share in kept.items() if share}
    return Section(model, "compiled" if backend else "eager", sites, clocks, graphs, shares)


def _share_kept(runner: Runner, steps: int) -> float:
    if runner.graphs is None or not runner.sites:
        return 0.0
    return sum(map(len, runner.kept().values())) / (2 * runner.sites * steps)


def with_peers(model: str, ways: Sequence[str], peers: Mapping[str, Remote], pairs: int) -> Section:
    """Train the model called `model` in all `ways` and, elsewhere, with and without each peer."""
    with runners(model, ways) as found:
        for runner in found.values():
            runner.warm_up(_WARM_UP)
        steps: list[Callable[[], tuple[float, float]]] = [here(r.step) for r in found.values()]
        sites = {way: runner.sites for way, runner in found.items()}
        bases = {}
        for name, peer in peers.items():
            steps += [peer.bare, peer]
            bases[f"{name}: mean"] = f"{name}: bare"
            sites |= {f"{name}: bare": 0, f"{name}: mean": peer.sites}
        clocks = rounds(steps, min(pairs, _PEER_ROUNDS))
    return Section(model, "peers", sites, clocks, bases=bases)


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return lines as a table in Markdown, the first being its head, every cell in its column.

    >>> print(as_markdown([["way", "sites"], ["bare", ""]]))
    | way  | sites |
    |------|-------|
    | bare |       |
    """
    width = len(lines[0])
    full = [[*line, *[""] * (width - len(line))] for line in lines]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    rows = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in full
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])
