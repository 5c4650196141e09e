"""Which series of a run are meant by a layer, a kind, a phase and a field."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxray.cli.command import default_place, is_place
from fxray.errors import NotARunError, NotSavedError, UnknownNameError, nearest
from fxray.run import Run, Series, open_run

if TYPE_CHECKING:
    import argparse

__all__ = ["add_series", "chosen", "kind_of", "opened", "place_and_layer"]


def add_series(parser: argparse.ArgumentParser, *, step: str, kind: str) -> None:
    """Give `parser` the options that say which series and which step is meant."""
    parser.add_argument("--step", metavar="N", type=int, help=step)
    parser.add_argument(
        "--kind",
        metavar="K",
        help=f"output, grad, input, weight, weight_grad, or weight.bias (default: {kind})",
    )
    parser.add_argument(
        "--phase", metavar="P", help='name of a pass, e.g. "valid" (default: train, where there is)'
    )
    parser.add_argument(
        "--field", metavar="F", help='one field of a selection, e.g. "mean" (default: all)'
    )


def place_and_layer(first: str | None, second: str | None) -> tuple[str, str | None]:
    """Return the place and the layer that two words, either of which may be missing, mean.

    A single word is the layer unless it can only be a place, so that a place may be left
    out.
    """
    if second is not None or first is None or is_place(first):
        return default_place(first), second
    try:
        return default_place(None), first
    except NotARunError:
        return first, None


def opened(given: argparse.Namespace) -> tuple[Run, str | None]:
    """Return the run that is meant, and the layer."""
    place, layer = place_and_layer(given.place, given.layer)
    return open_run(place, given.run), layer


def kind_of(series: Series) -> str:
    """Return the kind as it is given on a command line, e.g. `"weight.bias"`."""
    other = series.parameter if series.op and series.parameter != "weight" else ""
    return ".".join(filter(None, (series.kind, other)))


def chosen(run: Run, layer: str, kind: str | None, field: str | None) -> list[Series]:
    """Return the series of `layer`: of one `kind`, or of all; those that have `field`.

    Raises:
        NotSavedError: nothing of that kind was kept; says what was.
        UnknownNameError: there is no such layer or field; names the nearest.
    """
    found = _of_layer(run, layer)
    if kind is not None:
        kinds = list(dict.fromkeys(kind_of(series) for series in found))
        found = [series for series in found if kind_of(series) == kind]
        if not found:
            close = nearest(kind, kinds, 1)
            hint = f"nearest: {close[0]!r}; " if close else ""
            msg = f"{layer!r} has no kind {kind!r} in this run; {hint}it has {', '.join(kinds)}"
            raise NotSavedError(msg)
    if field is None:
        return found
    having = [series for series in found if field in series.fields]
    if not having:
        fielded = next((series for series in found if series.has_fields), found[0])
        if not fielded.has_fields:
            msg = f"{fielded.title} has no fields: each record is one array"
            raise UnknownNameError(msg)
        fielded.field(field)  # raises, with the nearest
    return having


def _of_layer(run: Run, layer: str) -> list[Series]:
    try:
        records = run[layer]
    except UnknownNameError:
        # Logged numbers are asked for by their names too; an op of that name comes first.
        if layer in list(run.log):
            return [run.log[layer]]
        raise
    if not records.series:
        kept = list(dict.fromkeys(row.op for row in run.captures()))
        msg = f"nothing of {layer!r} was kept in run {run.id}; kept: {', '.join(kept[:8])}"
        raise NotSavedError(msg + (", …" if len(kept) > 8 else ""))
    return list(records.series)
