"""The numbers of one capture, as a plot takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from fxray.errors import NotSavedError, PictureError

__all__ = ["Array", "PlotData", "evenly", "numbers"]

Array = np.ndarray[Any, np.dtype[Any]]

_GUESSES = {
    True: {1: "O", 2: "OI", 3: "OIL", 4: "OIHW"},
    False: {1: "C", 2: "NC", 3: "NTC", 4: "NCHW"},
}


def _frozen_records(
    records: Mapping[str, Sequence[Array]],
) -> Mapping[str, tuple[Array, ...]]:
    return {field: tuple(np.asarray(a) for a in arrays) for field, arrays in records.items()}


def _integers(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _shapes(values: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(_integers(value) for value in values)


@attrs.frozen(eq=False)
class PlotData:
    """The records of one op and kind, rows where nothing was kept left out.

    Attributes:
        op: path of the op.
        kind: `"output"`, `"grad"`, `"weight"`, `"weight_grad"` or `"input"`.
        records: one array per row by field of the selection; the field is `""` for a
            selection that returns a single tensor. Shapes may differ between rows.
        steps: training step of each row; may repeat.
        epochs: epoch of each row, or empty.
        phase: name of the pass, e.g. `"train"`.
        axes: one letter per dim of the records (`N` sample, `C` channel, `T` token, `H`
            `W` space, `O` `I` out and in), or `""`, and they are guessed.
        parameter: name of the parameter, for weights and their gradients.
        item: which of several tensors that the op returns, e.g. `"1.0"`.
        selection: name of the selection, e.g. `"NaturalSelection"`.
        sizes: shape per row of the tensor that the selection was given, or empty.
        kept: how many rows there are of which these were chosen; 0 where these are all.
        type: type of the op, e.g. `"conv2d"`.
    """

    op: str
    kind: str
    records: Mapping[str, tuple[Array, ...]] = attrs.field(converter=_frozen_records)
    steps: tuple[int, ...] = attrs.field(converter=_integers)
    epochs: tuple[int, ...] = attrs.field(default=(), converter=_integers)
    phase: str = ""
    axes: str = ""
    parameter: str = ""
    item: str = ""
    selection: str = ""
    sizes: tuple[tuple[int, ...], ...] = attrs.field(default=(), converter=_shapes)
    kept: int = 0
    type: str = ""

    def __attrs_post_init__(self) -> None:
        """Check that there are rows, and as many of everything."""
        if not self.records or not self.steps:
            msg = f"no records of {self.title} to plot; plot what was kept."
            raise NotSavedError(msg)
        lengths = {"steps": len(self.steps)}
        lengths |= {f"records[{field!r}]": len(rows) for field, rows in self.records.items()}
        lengths |= {"epochs": len(self.epochs)} if self.epochs else {}
        lengths |= {"sizes": len(self.sizes)} if self.sizes else {}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} {n}" for name, n in lengths.items())
            msg = f"the rows of {self.title} do not match: {counts}; give one of each per row."
            raise PictureError(msg)

    @property
    def title(self) -> str:
        """The op and what of it is shown, e.g. `"conv1 · weight"`; the name of a logged number."""
        if self.kind == "log":
            return self.parameter
        kind = self.kind
        if self.parameter and self.parameter != "weight":
            kind = f"{kind} ({self.parameter})"
        return " · ".join(filter(None, (self.op, kind, self.item)))

    @property
    def fields(self) -> frozenset[str]:
        """Names of what the selection returned; `{""}` for a single tensor."""
        return frozenset(self.records)

    @property
    def only(self) -> tuple[Array, ...]:
        """The records of the single field."""
        (records,) = self.records.values()
        return records

    @property
    def ndim(self) -> int:
        """Number of dims of the single field; -1 where there are several or it varies."""
        dims = {a.ndim for rows in self.records.values() for a in rows}
        return dims.pop() if len(self.records) == 1 and len(dims) == 1 else -1

    @property
    def is_scalar(self) -> bool:
        """Whether every record of every field is one number."""
        return all(a.size == 1 for rows in self.records.values() for a in rows)

    @property
    def signed(self) -> bool:
        """Whether zero is the middle: weights, gradients, and what has negative numbers."""
        if self.kind in ("weight", "weight_grad", "grad"):
            return True
        return any((numbers(a) < 0).any() for rows in self.records.values() for a in rows)

    @property
    def letters(self) -> str:
        """`axes` where they name every dim, else what is usual for the kind; or `""`."""
        if len(self.axes) == self.ndim:
            return self.axes
        return _GUESSES[self.kind in ("weight", "weight_grad")].get(self.ndim, "")

    def arranged(self, order: str) -> tuple[Array, ...]:
        """Return the records with their dims transposed to `order`, e.g. `"NCHW"`."""
        places = [self.letters.index(letter) for letter in order]
        return tuple(a.transpose(places) for a in self.only)

    def with_field(self, field: str) -> PlotData:
        """Return the data of one field, as a single tensor.

        Raises:
            NotSavedError: the selection returned no such field.
        """
        if field not in self.records:
            names = ", ".join(map(repr, self.records))
            msg = f"{self.title} has no field {field!r}; it has {names}."
            raise NotSavedError(msg)
        item = ", ".join(filter(None, (self.item, field)))
        return attrs.evolve(self, records={"": self.records[field]}, item=item)

    def at_steps(self, steps: Iterable[int]) -> PlotData:
        """Return the rows of `steps`.

        Raises:
            NotSavedError: nothing was kept at one of them; names the nearest.
        """
        wanted = list(dict.fromkeys(int(step) for step in steps))
        for step in wanted:
            if step not in self.steps:
                close = min(self.steps, key=lambda kept: abs(kept - step))
                msg = f"{self.title} was not kept at step {step}; the nearest is {close}."
                raise NotSavedError(msg)
        return self.at_rows([row for step in wanted for row in self._rows(step)])

    def _rows(self, step: int) -> list[int]:
        return [row for row, kept in enumerate(self.steps) if kept == step]

    def at_rows(self, rows: Sequence[int]) -> PlotData:
        """Return the rows of these numbers, counted from 0."""
        return attrs.evolve(
            self,
            records={field: [kept[n] for n in rows] for field, kept in self.records.items()},
            steps=[self.steps[n] for n in rows],
            epochs=[self.epochs[n] for n in rows] if self.epochs else (),
            sizes=[self.sizes[n] for n in rows] if self.sizes else (),
            kept=self.kept if len(rows) == len(self.steps) else 0,
        )

    def thinned(self, limit: int) -> PlotData:
        """Return at most `limit` rows, evenly chosen; they say of how many."""
        whole = max(self.kept, len(self.steps))
        return attrs.evolve(self.at_rows(evenly(len(self.steps), limit)), kept=whole)


def numbers(array: Array) -> Array:
    """Return `array` as float64: bfloat16 and bool widened, complex as magnitudes."""
    return (np.abs(array) if np.iscomplexobj(array) else array).astype(np.float64)


def evenly(count: int, limit: int) -> list[int]:
    """Return at most `limit` of `range(count)`, evenly spaced, the first and last among them.

    >>> evenly(10, 4)
    [0, 3, 6, 9]
    """
    if count <= limit:
        return list(range(count))
    return sorted({round(n) for n in np.linspace(0, count - 1, limit)})
