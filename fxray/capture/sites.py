"""The captures of a module, resolved to where they are taken and when they are due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from fxray.architecture import Op, TensorSpec
from fxray.capture.values import dtype_name, to_numpy
from fxray.draft import Capture, Schedule
from fxray.errors import SelectionError
from fxray.selections import NaturalSelection, describe, select
from fxray.store import ArrayInfo, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fxray.capture.rewrite import RewrittenModule

__all__ = ["Due", "Lane", "Site", "Sites", "array_name"]

MOMENTS = {
    "output": "forward",
    "input": "forward",
    "weight": "forward",
    "grad": "backward",
    "weight_grad": "optimizer",
}
"""When in a step each kind is taken."""


def array_name(path: str, kind: str, *rest: str) -> str:
    """Return the name of an array in its stream.

    >>> array_name("lstm", "output", "", "1.0", "mean")
    'lstm.output.1.0.mean'
    """
    return ".".join(part for part in (path, kind, *rest) if part)


@attrs.frozen
class Lane:
    """What decides, within a phase, which rows a capture goes to: one stream a phase."""

    schedule: Schedule
    moment: str


@attrs.frozen(eq=False)
class Site:
    """One capture, the op it is of, and the arrays it fills.

    Attributes:
        key: path and kind, which name a capture.
        lane: index of its lane among those of the module.
    """

    capture: Capture
    op: Op
    lane: int
    key: tuple[str, str] = attrs.field(init=False)
    _infos: dict[tuple[str, str, str], ArrayInfo] = attrs.field(factory=dict, init=False)

    @key.default
    def _key(self) -> tuple[str, str]:
        return self.capture.op, self.capture.kind

    def parameters(self, net: RewrittenModule) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, parameter) as the module holds them now.

        Looked up each time: `functional_call` and the like put others in their place.
        """
        for name in self.op.parameters:
            path, _, last = self.op.parameter_path(name).rpartition(".")
            parameter: Any = getattr(net.original.get_submodule(path), last, None)
            if parameter is not None:
                yield name, parameter

    def records(
        self, tensor: torch.Tensor, *, parameter: str = "", item: str = ""
    ) -> Iterator[tuple[ArrayInfo, Record]]:
        """Yield what the selection keeps of `tensor`; raises what the selection raises."""
        size = tensor.shape
        for field, kept in select(self.capture.selection, tensor.detach()).items():
            values = to_numpy(kept)
            info = self._infos.get((parameter, item, field))
            if info is None:
                name = array_name(*self.key, parameter, item, field)
                told = self._attributes(size, parameter, item, field)
                # A selection that keeps every dim keeps what they mean.
                told["axes"] = NaturalSelection(self.capture.axes or None).axes_of(values.ndim)
                info = ArrayInfo(name, dtype_name(kept), values.shape, told)
                self._infos[parameter, item, field] = info
            elif values.ndim != len(info.shape) or dtype_name(kept) != info.dtype:
                was, now = TensorSpec(info.shape, info.dtype), TensorSpec.of(kept)
                msg = f"it kept {was} before and {now} now; an array has one dtype and as many dims"
                raise SelectionError(msg)
            yield info, Record(values, size)

    def _attributes(
        self, size: tuple[int, ...], parameter: str, item: str, field: str
    ) -> dict[str, Any]:
        return {
            "op": self.op.path,
            "type": self.op.type,
            "kind": self.capture.kind,
            "parameter": parameter,
            "item": item,
            "field": field,
            "selection": describe(self.capture.selection),
            "size": list(size),
        }


@attrs.frozen(eq=False)
class Due:
    """The captures that are due together.

    Attributes:
        sites: all of them.
        at: those a capture node hands over, by path and kind.
        lanes: the lanes they fill, by index.
    """

    sites: tuple[Site, ...]
    at: Mapping[tuple[str, str], Site]
    lanes: Mapping[int, Lane]


class Sites:
    """Every capture of a module, and which of them are due when."""

    def __init__(self, net: RewrittenModule, captures: tuple[Capture, ...]) -> None:
        self.captures = captures
        self.lanes: list[Lane] = []
        self.all = tuple(self._site(net, chosen) for chosen in captures)
        self._schedules = tuple(dict.fromkeys(chosen.schedule for chosen in captures))
        self._due: dict[tuple[bool, ...], Due] = {}

    def _site(self, net: RewrittenModule, chosen: Capture) -> Site:
        lane = Lane(chosen.schedule, MOMENTS[chosen.kind])
        if lane not in self.lanes:
            self.lanes.append(lane)
        return Site(chosen, net.architecture[chosen.op], self.lanes.index(lane))

    def due(self, count: int) -> Due | None:
        """Return the captures due at the phase's own step `count`, None if none is."""
        met = tuple(schedule.due(count) for schedule in self._schedules)
        if not any(met):
            return None
        if met not in self._due:
            self._due[met] = self._gather(met)
        return self._due[met]

    def _gather(self, met: tuple[bool, ...]) -> Due:
        schedules = {s for s, is_met in zip(self._schedules, met, strict=True) if is_met}
        sites = tuple(site for site in self.all if site.capture.schedule in schedules)
        at = {s.key: s for s in sites if s.capture.kind in ("output", "grad", "input")}
        return Due(sites, at, {site.lane: self.lanes[site.lane] for site in sites})
