"""`fxray render`: draw the graph with what was kept of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxray.cli.command import Command, add_place, add_run, default_place, whole
from fxray.run import open_run

if TYPE_CHECKING:
    import argparse

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="saved.svg",
        help="file to write: .svg, .png, .pdf or .dot (default: %(default)s)",
    )
    add_run(parser)
    parser.add_argument(
        "--depth",
        metavar="N",
        type=whole(0),
        help="levels of modules drawn open (default: as many as stay readable)",
    )


def _run(given: argparse.Namespace) -> None:
    run = open_run(default_place(given.place), given.run)
    print(f"{run.render(given.output, depth=given.depth)}: the graph of run {run.id}")


COMMAND = Command(
    "render",
    "Draw a run's graph; badges on each op say how often what was kept.",
    (
        ("fxray render", "the latest run, to saved.svg"),
        ("fxray render fxray-demo/runs -o net.png", "as PNG"),
        ("fxray render runs --run 8f3a --depth 1", "another run, its blocks folded"),
    ),
    _add_arguments,
    _run,
)
