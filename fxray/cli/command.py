"""What a sub-command is, and the parser that reads its words."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import attrs

from fxray.errors import NotARunError

__all__ = [
    "DEFAULT_PLACES",
    "Command",
    "Parser",
    "add_place",
    "add_run",
    "default_place",
    "examples_text",
    "is_place",
    "whole",
]

DEFAULT_PLACES = ("runs", "fxray-demo/runs")
"""Where runs are looked for when nobody says where."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after one line; argparse's own usage is many."""
        self.exit(2, f"fxray: {message}; see: {self.prog} --help\n")


@attrs.frozen
class Command:
    """One word after `fxray`.

    Attributes:
        name: the word.
        summary: what it does, in a line.
        examples: command lines with what each does.
        add_arguments: gives a parser its arguments.
        run: does it, with what the parser read.
    """

    name: str
    summary: str
    examples: tuple[tuple[str, str], ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Return what the words after the name say; exits where they make no sense.

        Each command has a parser of its own: options may then stand between PLACE and
        LAYER, which argparse's own sub-commands do not read.
        """
        parser = Parser(f"fxray {self.name}", self.summary, examples_text(self.examples))
        self.add_arguments(parser)
        return parser.parse_intermixed_args(words)


def examples_text(examples: tuple[tuple[str, str], ...]) -> str:
    """Return examples for the end of a help text."""
    width = max(len(line) for line, _ in examples)
    lines = [f"  {line:{width}}  {words}".rstrip() for line, words in examples]
    return "\n".join(["examples:", *lines])


def whole(least: int) -> Callable[[str], int]:
    """Return what reads a whole number of at least `least`.

    >>> whole(1)("12")
    12
    """

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            msg = f"{text!r} is no whole number of at least {least}"
            raise argparse.ArgumentTypeError(msg)
        return value

    return number


def add_place(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the argument PLACE."""
    first, second = DEFAULT_PLACES
    parser.add_argument(
        "place",
        metavar="PLACE",
        nargs="?",
        help=f"folder that runs were recorded to (default: ./{first}, else ./{second})",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option --run."""
    parser.add_argument(
        "--run",
        metavar="ID",
        help="the run's id, the beginning of it, or its name (default: the latest run)",
    )


def default_place(given: str | None) -> str:
    """Return the place `given`, or the first of the usual ones that there is.

    Raises:
        NotARunError: none is given and there is none.
    """
    if given is not None:
        return given
    for place in DEFAULT_PLACES:
        if Path(place).is_dir():
            return place
    usual = " nor ".join(f"{place}/" for place in DEFAULT_PLACES)
    msg = f"there is neither {usual} here; name the folder, or make one: fxray demo"
    raise NotARunError(msg)


def is_place(word: str) -> bool:
    """Return whether `word` can only be meant as a place."""
    return "://" in word or "/" in word or Path(word).is_dir()
