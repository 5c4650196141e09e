"""`fxray plot`: draw one series of a layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fxray.cli.command import Command, add_place, add_run
from fxray.cli.series import add_series, chosen, kind_of, opened
from fxray.errors import FxrayError, NotSavedError, UnknownNameError

if TYPE_CHECKING:
    from fxray.run import Series

__all__ = ["COMMAND", "FORMATS"]

FORMATS = (".png", ".svg", ".pdf")
"""How the name of a picture may end."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument(
        "layer",
        metavar="LAYER",
        nargs="?",
        help='an op ("layer1.relu"), its key ("relu-0"), or a logged number ("loss")',
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="file to write: .png, .svg, .pdf (default: LAYER.KIND.png, here)",
    )
    add_run(parser)
    add_series(parser, step="draw this step alone", kind="the first there is")
    parser.add_argument(
        "--steps",
        metavar="A:B",
        type=_steps,
        help="draw the steps from A up to but without B; A:B:C takes every C-th, A,B,C just those",
    )


def _steps(text: str) -> slice | list[int]:
    """Return steps from text.

    >>> _steps("0:100"), _steps("::50"), _steps("0,40,80")
    (slice(0, 100, None), slice(None, None, 50), [0, 40, 80])
    """
    try:
        if ":" not in text:
            return [int(part) for part in text.split(",")]
        ends = [int(part) if part else None for part in text.split(":")]
        if len(ends) <= 3 and all(end is None or end >= 0 for end in ends) and ends[2:] != [0]:
            return slice(*ends)
    except ValueError:
        pass
    msg = f"{text!r} are no steps; write 0:100, 0:100:10 or 0,50,100"
    raise argparse.ArgumentTypeError(msg)


def _run(given: argparse.Namespace) -> None:
    run, layer = opened(given)
    if layer is None:
        kept = list(dict.fromkeys(row.op for row in run.captures()))
        msg = f"say which layer to draw; run {run.id} kept {', '.join(kept)}"
        raise UnknownNameError(msg)
    found = chosen(run, layer, given.kind, given.field)
    series = next((one for one in found if given.step in one.steps), found[0])
    what = ".".join(filter(None, (series.title, given.field)))
    path = Path(given.output or f"{what}.png")
    if path.suffix.lower() not in FORMATS:
        msg = f"cannot draw to {path.name!r}; end its name in {', '.join(FORMATS)}"
        raise FxrayError(msg)
    figure = series.plot(
        step=given.step,
        steps=_kept(series, given.steps, given.phase),
        field=given.field,
        phase=given.phase,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    others = [kind_of(other) for other in found if other is not series]
    more = f"; --kind draws {', '.join(others)}" if others else ""
    print(f"{path}: {what} of run {run.id}{more}")


def _kept(series: Series, steps: slice | list[int] | None, phase: str | None) -> list[int] | None:
    """Return the kept steps that `steps` means, None for all."""
    if not isinstance(steps, slice):
        return steps
    within = series.in_phase(phase)[steps].steps.tolist()
    if not within:
        every = series.in_phase(phase).steps
        msg = f"{series.title} was kept at no step in that range; it has {every[0]} to {every[-1]}"
        raise NotSavedError(msg)
    return [int(step) for step in dict.fromkeys(within)]


COMMAND = Command(
    "plot",
    "Draw what was kept of a layer: filters, maps, lines over steps, whatever suits it.",
    (
        ("fxray plot runs conv1 --kind weight", "the filters, as they last were"),
        ("fxray plot runs relu --step 40 -o relu.png", "the maps of step 40"),
        ("fxray plot runs conv1 --kind weight --steps 0:400:100", "the filters as they form"),
        ("fxray plot runs relu --kind grad --field norm", "one statistic over steps"),
        ("fxray plot runs loss", "a number that was logged"),
    ),
    _add_arguments,
    _run,
)
