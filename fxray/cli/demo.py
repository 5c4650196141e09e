"""`fxray demo`: train a small network and look inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxray.cli.command import Command, whole
from fxray.demo import EPOCHS, demo

if TYPE_CHECKING:
    import argparse

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="fxray-demo",
        help="folder for the run and the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=whole(1),
        default=EPOCHS,
        help="how often the network sees all digits (default: %(default)s)",
    )


def _run(given: argparse.Namespace) -> None:
    demo(given.out, given.epochs)


COMMAND = Command(
    "demo",
    "Train a small CNN on handwritten digits, record it, and draw what was recorded.",
    (
        ("fxray demo", "half a minute; everything goes to fxray-demo/"),
        ("fxray demo --out digits --epochs 3", "elsewhere, and shorter"),
    ),
    _add_arguments,
    _run,
)
