"""`fxray show`: print what a run holds, as tables and as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxray.cli.command import Command, add_place, add_run
from fxray.cli.series import add_series, chosen, kind_of, opened
from fxray.cli.text import number, print_array, print_table, statistics, times
from fxray.errors import NotSavedError

if TYPE_CHECKING:
    import argparse

    from fxray.run import Run, Series

__all__ = ["COMMAND"]

_HEAD, _TAIL = 12, 4
"""Rows printed from the beginning and the end of a long table."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument(
        "layer",
        metavar="LAYER",
        nargs="?",
        help='an op ("layer1.relu"), its key ("relu-0"), a module, or a logged number ("loss")',
    )
    add_run(parser)
    add_series(parser, step="print the numbers kept at this step", kind="all there are")
    parser.add_argument(
        "--call", metavar="N", type=int, help="of that step, the forward number N, from 0"
    )
    parser.add_argument("--all", action="store_true", help="print every row of a long table")


def _run(given: argparse.Namespace) -> None:
    run, layer = opened(given)
    if layer is None:
        _show_run(run, given)
        return
    found = chosen(run, layer, given.kind, given.field)
    if given.field is not None:
        found = [series.field(given.field) for series in found]
    if given.step is not None:
        _show_step(found, given.step, given.phase, given.call)
        return
    for place, series in enumerate(_in_phase(found, given.phase)):
        if place:
            print()
        _show_series(series, everything=given.all)


def _show_run(run: Run, given: argparse.Namespace) -> None:
    if given.kind or given.field:
        msg = "--kind and --field are of one layer; name it: fxray show PLACE LAYER …"
        raise NotSavedError(msg)
    if given.step is None:
        print(run if given.phase is None else _of_phase(run, given.phase))
        return
    kept = run.at(given.step, phase=given.phase, call=given.call)
    rows = []
    for op, kinds in kept.items():
        for kind, value in kinds.items():
            fields = _by_field(value)
            if all(not array.ndim for array in fields.values()):
                rows.append([op, kind, "", _numbers(fields)])
            else:
                rows += [[op, kind, field, statistics(a)] for field, a in fields.items()]
    print_table(["op", "kind", "field", f"at step {given.step}"], rows)


def _numbers(fields: dict[str, Any]) -> str:
    """Return single numbers in a line, e.g. `"mean 0.5, std 0.1"`."""
    return ", ".join(f"{field} {number(value)}".strip() for field, value in fields.items())


def _of_phase(run: Run, phase: str) -> Run:
    known = list(dict.fromkeys(name for row in run.captures() for name in row.phases))
    if phase not in known:
        msg = f"run {run.id} has no phase {phase!r}; it has {', '.join(known)}"
        raise NotSavedError(msg)
    return run.where(phase=phase)


def _in_phase(found: list[Series], phase: str | None) -> list[Series]:
    """Return the series that have records of `phase`; all as they are where none is given."""
    if phase is None:
        return found
    having = [series for series in found if phase in series.phases]
    return [series.in_phase(phase) for series in having or found[:1]]


def _show_series(series: Series, *, everything: bool) -> None:
    """Print a table of the records of `series`: where each stands, and its shape or numbers."""
    print(f"{series.op or 'logged'} {kind_of(series) if series.op else series.parameter}: ", end="")
    print(_about(series))
    scalar = all(not source.info.shape for source in series.sources)
    fields = series.fields if scalar else ("shape",)
    head = ["step", "epoch", "batch", "call", "phase", *(f or "value" for f in fields)]
    shown, left_out = _shown(len(series), everything=everything)
    several_calls = bool(series.calls.any())
    shapes = [] if scalar else series.shapes(series.fields[0])
    rows: list[list[str]] = []
    for place, at in enumerate(shown):
        if left_out and place == _HEAD:
            rows.append(["…", *[""] * (len(head) - 1)])
        row = series.row(at)
        call = str(row.call) if several_calls else ""
        where = [str(row.step), str(row.epoch), str(row.batch), call, row.phase]
        if scalar:
            value = series.record(at)
            values = value if isinstance(value, dict) else {fields[0]: value}
            rows.append([*where, *(number(values[f]) if f in values else "–" for f in fields)])
        else:
            rows.append([*where, times(shapes[at] or ())])
    print_table(head, rows)
    if left_out:
        print(f"({left_out} rows left out; --all prints them)")


def _about(series: Series) -> str:
    selection = str(series.selection.get("name", "")).rpartition(".")[2]
    by = f", selected by {selection}" if selection else ""
    fields = f" with fields {', '.join(series.fields)}" if series.has_fields else ""
    return f"{len(series)} records{fields}{by}"


def _shown(count: int, *, everything: bool) -> tuple[list[int], int]:
    """Return the numbers of the rows to print, and how many are left out after the head."""
    if everything or count <= _HEAD + _TAIL + 2:
        return list(range(count)), 0
    return [*range(_HEAD), *range(count - _TAIL, count)], count - _HEAD - _TAIL


def _show_step(found: list[Series], step: int, phase: str | None, call: int | None) -> None:
    """Print the records of `step`; an error names the nearest where nothing was kept."""
    having = [series for series in found if step in _steps(series, phase)]
    for place, series in enumerate(having or found[:1]):
        value = series.sel(step=step, phase=phase, call=call)
        row = next(
            series.row(at)
            for at in range(len(series))
            if series.steps[at] == step
            and (phase is None or series.phases[at] == phase)
            and (call is None or series.calls[at] == call)
        )
        if place:
            print()
        where = f"step {row.step}, epoch {row.epoch}, batch {row.batch}, phase {row.phase}"
        print(f"{series.title} at {where}")
        for field, array in _by_field(value).items():
            if not array.ndim:
                print(f"{field or 'value':13}  {number(array)}")
                continue
            print(f"{field}: {statistics(array)}" if field else statistics(array))
            print_array(array)


def _steps(series: Series, phase: str | None) -> Any:
    try:
        return series.in_phase(phase).steps
    except NotSavedError:
        return ()


def _by_field(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}


COMMAND = Command(
    "show",
    "Print what a run holds: its summary, a layer's records, or the numbers of one step.",
    (
        ("fxray show", "which layers were kept, at which steps and batches"),
        ("fxray show runs relu", "the records of one layer"),
        ("fxray show runs relu --kind output --step 40", "what it put out at step 40"),
        ("fxray show runs relu --kind grad --field norm --all", "one statistic at every step"),
        ("fxray show runs --step 40", "everything kept at step 40, in a line each"),
        ("fxray show runs loss", "a number that was logged"),
    ),
    _add_arguments,
    _run,
)
