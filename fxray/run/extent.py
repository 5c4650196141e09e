"""How much stands in the arrays of a run, counted without reading a record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from fxray.run.words import distinct

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from fxray.run.sources import Source, Window
    from fxray.store import StreamReader

__all__ = ["Extent", "Extents", "coords_of"]


@attrs.frozen
class Extent:
    """How many records there are, and from where to where.

    Attributes:
        records: how many.
        first: step of the first, None where there are none.
        last: step of the last.
        phases: phases they are from, in the order of steps.
    """

    records: int = 0
    first: int | None = None
    last: int | None = None
    phases: tuple[str, ...] = ()

    @classmethod
    def of(cls, steps: NDArray[np.int64], phases: NDArray[np.str_]) -> Extent:
        """Return the extent of records at `steps` and in `phases`, each of shape (record,)."""
        if not len(steps):
            return cls()
        return cls(len(steps), int(steps.min()), int(steps.max()), tuple(distinct(phases)))

    @classmethod
    def union(cls, extents: Iterable[Extent]) -> Extent:
        """Return the extent of all records of `extents`."""
        held = sorted((one for one in extents if one.records), key=lambda one: one.first or 0)
        if not held:
            return cls()
        phases = tuple(dict.fromkeys(phase for one in held for phase in one.phases))
        last = max(one.last or 0 for one in held)
        return cls(sum(one.records for one in held), held[0].first, last, phases)


class Extents:
    """Counts arrays one after the other, looking at what they share only once.

    For one table, then thrown away: a living run has more the next time.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        """Count the rows within `windows`."""
        self._windows = windows
        self._masks: dict[str, NDArray[np.bool_] | None] = {}
        self._whole: dict[str, Extent] = {}

    def of(self, source: Source) -> Extent:
        """Return how much the array `source` holds."""
        reader, stream = source.reader, source.stream
        if stream not in self._whole:
            mask = _mask(reader, self._windows)
            self._masks[stream] = mask
            self._whole[stream] = _extent(reader, mask)
        whole = self._whole[stream]
        if reader.whole(source.info.name) or not whole.records:
            return whole
        mask, present = self._masks[stream], reader.present(source.info.name)
        meant = present if mask is None else present & mask
        if len(whole.phases) > 1:
            return _extent(reader, meant)
        # Comparing the name of every row's phase is most of the work.
        steps = reader.coords["step"][meant]
        return attrs.evolve(Extent.of(steps, np.array([], str)), phases=whole.phases)


def coords_of(sources: Sequence[Source], windows: Sequence[Window]) -> Mapping[str, NDArray[Any]]:
    """Return the coordinates of the rows of one stream at which any of `sources` has a record."""
    reader = sources[0].reader
    mask = _mask(reader, windows)
    # One array that misses nothing says it for all.
    if not any(reader.whole(source.info.name) for source in sources):
        held = np.zeros(reader.rows, np.bool_)
        for source in sources:
            held |= reader.present(source.info.name)
        mask = held if mask is None else held & mask
    if mask is None or mask.all():
        return reader.coords
    return {name: values[mask] for name, values in reader.coords.items()}


def _mask(reader: StreamReader, windows: Sequence[Window]) -> NDArray[np.bool_] | None:
    """Return which rows are within `windows`, None for all."""
    mask = None
    for window in windows:
        if window.given:
            within = window.mask(reader.coords)
            mask = within if mask is None else mask & within
    return mask


def _extent(reader: StreamReader, mask: NDArray[np.bool_] | None) -> Extent:
    steps, phases = reader.coords["step"], reader.coords["phase"]
    return Extent.of(steps, phases) if mask is None else Extent.of(steps[mask], phases[mask])
