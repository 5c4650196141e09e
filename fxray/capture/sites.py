"""The captures of a module, resolved to where they are taken and when they are due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from fxray.capture.spots import Site, Spot
from fxray.draft import Schedule

if TYPE_CHECKING:
    from fxray.capture.rewrite import RewrittenModule
    from fxray.draft import Capture

__all__ = ["Due", "Lane", "Sites"]

MOMENTS = {
    "output": "forward",
    "input": "forward",
    "weight": "forward",
    "grad": "backward",
    "weight_grad": "optimizer",
}
"""When in a step each kind is taken."""

_HANDED = ("output", "grad", "input")
"""The kinds that capture nodes hand over."""

_NAMED_SETS = 1
"""So many sets have a graph of their own, beside that of nothing and that of all: of one code
a compiler keeps eight, and both modes and static and dynamic sizes are among them."""
_ALL, _AND = "all", "+"


@attrs.frozen
class Lane:
    """What decides, within a phase, which rows a capture goes to: one stream a phase."""

    schedule: Schedule
    moment: str


_Handed = tuple[tuple[Site, Spot], ...]


@attrs.frozen(eq=False)
class Due:
    """The captures that are due together.

    Attributes:
        sites: all of them.
        at: those a capture node hands over, by path and kind.
        lanes: the lanes they fill, by index.
        weights: those of weights.
        weight_grads: those of what an optimizer used.
        told: whether the tally knows of these sites, by whether the forward trains.
    """

    sites: tuple[Site, ...]
    at: Mapping[tuple[str, str], Site]
    lanes: Mapping[int, Lane]
    weights: tuple[Site, ...]
    weight_grads: tuple[Site, ...]
    told: set[bool] = attrs.field(factory=set, init=False)
    _handed: dict[tuple[str, ...], dict[str, _Handed]] = attrs.field(factory=dict, init=False)

    def handed(self, path: str, kinds: tuple[str, ...]) -> _Handed:
        """Return the captures that a node at `path` hands over to, in the order of `kinds`.

        Each with its spot of a tensor that is all an op gave.
        """
        by_path = self._handed.get(kinds)
        if by_path is None:
            by_path = self._handed[kinds] = {}
        found = by_path.get(path)
        if found is None:
            sites = (self.at.get((path, kind)) for kind in kinds)
            found = by_path[path] = tuple((s, s.spot("")) for s in sites if s is not None)
        return found


class Sites:
    """Every capture of a module, and which of them are due when."""

    def __init__(
        self, net: RewrittenModule, captures: tuple[Capture, ...], module: str = ""
    ) -> None:
        self.captures, self._module = captures, module
        self.lanes: list[Lane] = []
        self.all = tuple(self._site(net, chosen) for chosen in captures)
        self._schedules = tuple(dict.fromkeys(chosen.schedule for chosen in captures))
        self._due: dict[tuple[bool, ...], Due] = {}
        self._names: dict[tuple[bool, ...], str] = {}
        self._covered: dict[tuple[str, Due], bool] = {}

    def _site(self, net: RewrittenModule, chosen: Capture) -> Site:
        lane = Lane(chosen.schedule, MOMENTS[chosen.kind])
        if lane not in self.lanes:
            self.lanes.append(lane)
        op = net.architecture[chosen.op]
        return Site(chosen, op, self.lanes.index(lane), self._module)

    def due(self, count: int) -> Due | None:
        """Return the captures due at the phase's own step `count`, None if none is."""
        met = self._met(count)
        if True not in met:
            return None
        found = self._due.get(met)
        if found is None:
            found = self._due[met] = self._gather(met)
        return found

    def _met(self, count: int) -> tuple[bool, ...]:
        return tuple([schedule.due(count) for schedule in self._schedules])

    def _gather(self, met: tuple[bool, ...]) -> Due:
        schedules = {s for s, is_met in zip(self._schedules, met, strict=True) if is_met}
        sites = tuple(site for site in self.all if site.capture.schedule in schedules)
        return Due(
            sites,
            {site.key: site for site in sites if site.capture.kind in _HANDED},
            {site.lane: self.lanes[site.lane] for site in sites},
            tuple(site for site in sites if site.capture.kind == "weight"),
            tuple(site for site in sites if site.capture.kind == "weight_grad"),
        )

    # ------------------------------------------------------------------ sets by name

    def name_due(self, count: int) -> str:
        """Return the name of what capture nodes are to hand over at step `count`.

        `""` for nothing. Of the names of single sets few are given out: each is a graph that
        somebody compiles. After those it is the name of all captures.
        """
        met = self._met(count)
        name = self._names.get(met)
        if name is None:
            name = self._names[met] = self._name(met)
        return name

    def _name(self, met: tuple[bool, ...]) -> str:
        due = self._due.get(met) or self._gather(met)
        names = dict.fromkeys(site.capture.schedule.name for site in due.at.values())
        name = _AND.join(names)
        if due.at and len(due.at) == sum(site.capture.kind in _HANDED for site in self.all):
            return _ALL
        given = {known for known in self._names.values() if known not in ("", _ALL)}
        return name if not name or name in given or len(given) < _NAMED_SETS else _ALL

    def named(self, name: str) -> frozenset[tuple[str, str]]:
        """Return path and kind of the captures of a set by its name."""
        schedules = set(name.split(_AND))
        return frozenset(
            site.key
            for site in self.all
            if site.capture.kind in _HANDED
            and (name == _ALL or site.capture.schedule.name in schedules)
        )

    def covers(self, name: str, due: Due) -> bool:
        """Return whether the set of that name holds all that nodes are to hand over."""
        found = self._covered.get((name, due))
        if found is None:
            found = self._covered[name, due] = due.at.keys() <= self.named(name)
        return found
