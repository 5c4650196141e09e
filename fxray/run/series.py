"""The records of one thing over steps."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from fxray.run import export
from fxray.run.answers import no_record, several_records
from fxray.run.rows import Rows
from fxray.run.sources import Window
from fxray.run.words import distinct, span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from fxray.store import Row

__all__ = ["Series"]


@attrs.frozen(eq=False, repr=False)
class Series(Rows):
    """What one kind of capture of one op kept, record by record, in the order of steps.

    A snapshot: rows committed after it was made are in the one that is asked for next.
    `series[120]` is the record of step 120 in phase `"train"` (where nothing was kept in
    training: in the only phase there is), with its true shape and dtype; a dict where the
    op returns several tensors or the selection several numbers. `series[0:50]` is a
    narrower series.

    Attributes:
        op: path of the op; `""` for logged numbers.
        kind: `"output"`, `"grad"`, `"input"`, `"weight"`, `"weight_grad"` or `"log"`.
        parameter: name of the parameter below the op, `""` where it is none.
        selected_rank: rank of the process whose records these are.
    """

    # Records.

    def __getitem__(self, step: Any) -> Any:
        """Return the record of a step, or, for a slice, a narrower series.

        Raises:
            NotSavedError: nothing was kept there, or several records were; says which.
        """
        if isinstance(step, slice):
            return self.where(Window(step=step))
        try:
            return self.sel(step=operator.index(step))
        except TypeError:
            msg = f"series[…] takes a step or a slice of steps, not {step!r}; a field is .field(…)"
            raise TypeError(msg) from None

    def __iter__(self) -> Iterator[tuple[Row, Any]]:
        for at in range(len(self)):
            yield self.row(at), self.record(at)

    def sel(
        self,
        *,
        step: int | None = None,
        epoch: int | None = None,
        batch: int | None = None,
        call: int | None = None,
        phase: str | None = None,
    ) -> Any:
        """Return the one record that stands there; `phase` as for `series[step]`.

        Raises:
            NotSavedError: there is none, or more than one; says what there is.
        """
        return self.record(self._place(Window(step, epoch, batch, call, phase)))

    def original_size(self, step: int, **where: Any) -> Any:
        """Return the shape of the tensor that the record of `step` was selected from.

        A dict by field where the op returns several tensors of different shapes.

        Raises:
            NotSavedError: see `sel`, which takes the same further arguments.
        """
        at = self._place(Window(step=step, **where))
        index = self.index
        part, place = index.parts[index.part[at]], index.place[at]
        sizes = {
            source.field: source.reader.sizes(source.info.name)[int(part.rows[place])]
            for source, here in zip(part.sources, part.present[:, place], strict=True)
            if here
        }
        return sizes if len(set(sizes.values())) > 1 else next(iter(sizes.values()))

    def _place(self, window: Window) -> int:
        """Return the number of the only record within `window`."""
        phase = self._phase(window.phase)
        meant = attrs.evolve(window, phase=phase).mask(self.index.coords)
        found = np.flatnonzero(meant)
        if len(found) == 1:
            return int(found[0])
        if not len(found):
            raise no_record(self, window, phase)
        raise several_records(self, window, found)

    # Elsewhere.

    def plot(
        self,
        *,
        step: int | None = None,
        steps: Sequence[int] | None = None,
        field: str | None = None,
        phase: str | None = None,
        loss: Series | tuple[Sequence[int], Sequence[float]] | None = None,
    ) -> Figure:
        """Return a picture that suits the data, see `fxray.look.plot.plot`.

        Args:
            step: draw this step alone.
            steps: draw these steps.
            field: draw this field alone.
            phase: draw this phase; by default as for `series[step]`.
            loss: drawn beneath lines over steps, e.g. `run.log["loss"]`.

        Raises:
            MissingExtraError: matplotlib is not installed.
            NotSavedError: nothing was kept there.
        """
        # Matplotlib takes a second to import; only who asks for a picture should wait.
        from fxray.run.picture import draw

        return draw(self, step=step, steps=steps, field=field, phase=phase, loss=loss)

    def to_numpy(self) -> NDArray[Any]:
        """Return all records as one array, shape (record, *record shape).

        Raises:
            NotSavedError: the records have several fields or differ in shape.
        """
        return export.stack(self)

    def to_xarray(self) -> xr.DataArray | xr.Dataset:
        """Return the series labelled and lazy: step, epoch, batch, call, phase, time over row.

        bfloat16 and float8 are widened to float32, which is exact; records smaller than the
        widest are padded with NaN (integers: 0). Several fields make a Dataset.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        return export.to_xarray(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return scalars or statistics as a table indexed by step, a column for each field.

        Raises:
            MissingExtraError: pandas is not installed.
            NotSavedError: the records are not single numbers.
        """
        return export.to_pandas(self)

    def __repr__(self) -> str:
        fields = f", fields {', '.join(self.fields)}" if self.has_fields else ""
        phases = ", ".join(distinct(self.phases))
        kept = f"{len(self)} records, {span(np.unique(self.steps))}" if self else "no records"
        what = f"{self.dtype} {list(self.shape)}" if not self.has_fields else ""
        return f"<Series {self.title}: {', '.join(filter(None, (kept, phases, what)))}{fields}>"
