"""Rows that wait for their captures, sealed in order into the streams of a store."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import attrs
from torch.utils.hooks import RemovableHandle

from fxray.architecture import within
from fxray.capture.spots import Kept, Spot
from fxray.capture.values import all_to_numpy
from fxray.draft import Schedule
from fxray.store import Record, Row

if TYPE_CHECKING:
    import torch

    from fxray.capture.spots import Field
    from fxray.capture.steps import Forward
    from fxray.capture.tally import Tally
    from fxray.store import ArrayInfo, Store, StreamWriter

__all__ = ["OpenRow", "Stream", "StreamKey"]

_FORWARDS_AT_ONCE = 4096
"""More forwards than others finish while one, on a thread of its own, is kept from going on."""


@attrs.frozen
class StreamKey:
    """What the rows of one stream share.

    Attributes:
        phase: name of the pass.
        moment: `"forward"`, `"backward"` or `"optimizer"`.
        schedule: when its captures are due.
        rank: of the process.
        module: name of the module, `""` where a run records only one.
    """

    phase: str
    moment: str
    schedule: Schedule
    rank: int = 0
    module: str = ""

    @property
    def name(self) -> str:
        """Name of the stream, e.g. `"train.forward.every10.r0"`."""
        own = f"{self.phase}.{self.moment}.{self.schedule.name}.r{self.rank}"
        return within(self.module, own)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the store writes of it."""
        named = {"module": self.module} if self.module else {}
        return {
            **named,
            "phase": self.phase,
            "moment": self.moment,
            "schedule": self.schedule.to_dict(),
            "rank": self.rank,
        }


@attrs.define(eq=False)
class OpenRow:
    """One row that is being filled.

    Attributes:
        row: where it stands in the training.
        index: which forward of its phase it belongs to.
        expected: whose gradients have yet to come.
        all_expected: whether `expected` will grow no more: the forward has returned.
        kept: what has come.
        sealed: whether it was written; what comes later comes too late.
        hooks: those to take off again when it is written.
    """

    row: Row
    index: int = 0
    expected: set[Spot] = attrs.field(factory=set)
    all_expected: bool = False
    kept: Kept = attrs.field(factory=dict)
    sealed: bool = False
    hooks: list[RemovableHandle] = attrs.field(factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing more is to come."""
        return self.all_expected and not self.expected

    def clear(self) -> None:
        """Forget what has come, and what was to come of it."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.expected.clear()
        self.kept.clear()


class Stream:
    """The rows of one stream, open ones first in first out, and its writer."""

    def __init__(self, key: StreamKey, store: Store, run_id: str, tally: Tally) -> None:
        self.key = key
        self._store, self._run_id, self._tally = store, run_id, tally
        self._writer: StreamWriter | None = None
        self._names: dict[ArrayInfo, str] = {}
        self._name_of: dict[Field, str] = {}
        self._fields: list[Field] = []
        self._numbers: list[list[int]] = []
        self._known: list[str] = []
        self._open: collections.deque[OpenRow] = collections.deque()

    def open(self, forward: Forward) -> OpenRow:
        """Begin the row of a forward."""
        row = OpenRow(forward.row, forward.index)
        self._open.append(row)
        return row

    def seal_complete(self) -> None:
        """Write the rows at the front that nothing more comes for."""
        while self._open and self._open[0].complete:
            self.write(self._open.popleft())

    def seal_before(self, index: int, *, open_step: int | None = None) -> None:
        """Write the rows of forwards before `index`, complete or not.

        A forward that still runs, on another thread, is waited for, but not for ever.
        Rows of `open_step` wait.
        """
        while self._open and self._open[0].index < index:
            if self._open[0].row.step == open_step:
                return
            if not self._open[0].all_expected and self._open[0].index > index - _FORWARDS_AT_ONCE:
                return
            self.write(self._open.popleft())

    def write(self, row: OpenRow) -> None:
        """Hand a row to the store; one in which nothing came is left out."""
        row.sealed = True
        for hook in row.hooks:
            hook.remove()
        # The hooks of a graph that lives on hold the row, and need not hold what it kept.
        kept, row.kept = row.kept, {}
        if kept:
            records = self._records(kept)
            if records:
                self._begun().append(row.row, records)

    def _records(self, kept: Kept) -> dict[str, Record]:
        """Return what was kept as the store takes it, its arrays declared."""
        fields = [*kept]
        # Row after row the same arrays come in the same order.
        if fields != self._fields:
            self._fields, self._numbers, self._known = fields, _numbers(fields), []
        tensors, sizes = zip(*kept.values(), strict=True)
        arrays, errors = all_to_numpy(tensors, self._numbers)
        for at, error in errors.items():
            self._tally.failed(fields[at].spot.site, error)
            fields[at].forget()
        if errors:
            return {
                self._name(field): Record(arrays[at], sizes[at])
                for at, field in enumerate(fields)
                if at not in errors
            }
        if not self._known:
            self._known = [self._name(field) for field in fields]
        return dict(zip(self._known, map(Record, arrays, sizes), strict=True))

    def _name(self, field: Field) -> str:
        """Return the name of the array that a field fills here, declared if it was not."""
        name = self._name_of.get(field)
        if name is None:
            name = self._name_of[field] = self._declare(self._begun(), field.info)
            self._tally.kept(field.spot.site)
            field.filled = True
        return name

    def _begun(self) -> StreamWriter:
        if self._writer is None:
            self._writer = self._store.writer(self._run_id, self.key.name, self.key.attributes)
        return self._writer

    def _declare(self, writer: StreamWriter, info: ArrayInfo) -> str:
        """Return the name under which the store keeps the array, declared if it was not.

        An op marked anew with another selection fills an array of its own from then on.
        """
        name = self._names.get(info)
        if name is None:
            name, number = info.name, 2
            while name in self._names.values():
                name, number = f"{info.name}#{number}", number + 1
            writer.declare(attrs.evolve(info, name=name))
            self._names[info] = name
        return name

    def commit(self) -> None:
        """Make what was written readable."""
        if self._writer is not None:
            self._writer.commit()

    def seal(self) -> None:
        """Write what is open, complete or not."""
        while self._open:
            self.write(self._open.popleft())

    def close(self) -> None:
        """Seal, commit and finish."""
        self.seal()
        if self._writer is not None:
            self._writer.close()


def _numbers(fields: list[Field]) -> list[list[int]]:
    """Return the places of fields that are single numbers, those of one dtype together."""
    places: dict[torch.dtype, list[int]] = {}
    for at, field in enumerate(fields):
        if not field.dims:
            places.setdefault(field.dtype, []).append(at)
    return [*places.values()]
