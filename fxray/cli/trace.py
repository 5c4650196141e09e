"""`fxray trace`: trace a model of the user's own, and draw it."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fxray.cli.command import Command, whole
from fxray.cli.example import input_words, inputs_of
from fxray.cli.named import Named, make, shortened, user_place
from fxray.cli.text import print_table
from fxray.errors import FxrayError, MissingExtraError, NoGraphError, TraceError
from fxray.look.render import FORMATS
from fxray.tracing.ladder import FRONTENDS
from fxray.xray import Xray

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from fxray.architecture import Architecture

__all__ = ["COMMAND"]

_LONGEST = 40
"""Characters of a module's settings in the table."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "callable",
        metavar="MODULE:CALLABLE",
        help="a module (or file.py), and what in it makes the model: a class, a model, or a "
        "function that returns model, (model, x), (model, args), (model, kwargs) or "
        "(model, args, kwargs)",
    )
    parser.add_argument(
        "-i",
        "--input",
        metavar="TENSOR",
        action="append",
        type=input_words,
        default=[],
        help="[NAME=]SHAPE[:DTYPE][<N] of an argument, e.g. 2x3x32x32 or 'ids=2x12:int64<100' "
        "(whole numbers below 100); again for each further one, in place of what CALLABLE returns "
        "(default: that; without any, the model is traced symbolically)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"picture to write: {', '.join(f'.{end}' for end in FORMATS)} "
        "(default: CALLABLE.svg, here)",
    )
    parser.add_argument("--no-picture", action="store_true", help="draw nothing")
    parser.add_argument(
        "--depth",
        metavar="N",
        type=whole(0),
        help="levels of modules drawn open (default: as many as stay readable)",
    )
    parser.add_argument(
        "--frontend",
        choices=FRONTENDS,
        help="force a way of tracing (default: the first that can)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail unless every call has a graph that equals the model bit for bit",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the report as JSON and nothing else; draws where -o says",
    )


def _run(given: argparse.Namespace) -> None:
    picture = _picture(given)
    # What the user's code prints is no part of what we print; `--json` is read by programs.
    with contextlib.redirect_stdout(sys.stderr):
        named = make(given.callable)
        xray = _traced(given, named)
    if given.json:
        print(json.dumps(xray.report.to_dict(), indent=2))
    else:
        _print(xray, given.callable)
    if picture is None:
        return
    xray.draft.clear()  # nothing is going to be kept, so no badge says so
    try:
        written = xray.render(picture, depth=given.depth)
    except MissingExtraError as error:
        if given.output:
            raise
        print(f"fxray: warning: {error} --no-picture does without", file=sys.stderr)
        return
    if not given.json:
        print(f"\n{written}: the graph of {xray.architecture.model}")


def _picture(given: argparse.Namespace) -> Path | None:
    """Return the file to draw to, None for none; refused before the model is made."""
    if given.no_picture or (given.json and not given.output):
        return None
    path = Path(given.output or f"{given.callable.rpartition(':')[2]}.svg")
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        msg = f"cannot draw to {path.name!r}; end its name in .{', .'.join(FORMATS)}"
        raise FxrayError(msg)
    return path


def _traced(given: argparse.Namespace, named: Named) -> Xray:
    args, kwargs = inputs_of(given.input) if given.input else (named.args, named.kwargs)
    try:
        return Xray(named.model, args, kwargs, frontend=given.frontend, strict=given.strict)
    except TraceError as error:
        raise FxrayError(_told(error, given, named.model)) from error


def _told(error: TraceError, given: argparse.Namespace, model: nn.Module) -> str:
    """Return the user's line, what was traced, what is wrong and what to try, in that order."""
    message = str(error)
    leading = re.match(r"(\S+):(\d+): ", message)
    if leading:
        place, message = f"{shortened(leading[1])}:{leading[2]}", message[leading.end() :]
    else:
        place = user_place(error)
        place = "" if place and place in message else place
    forward = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in forward if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    example = f"--input SHAPE (of {', '.join(needed)})" if needed else "--input NAME=SHAPE"
    for python in ("fxray.trace(model, x)", "fxray.trace(m, x)", "trace(model, x)"):
        message = message.replace(python, example)
    try_this = ""
    if given.strict and message.startswith("strict=True, and "):
        message = message.replace("strict=True, and ", "--strict, and ", 1)
        try_this = "without --strict this is told in the report"
    elif isinstance(error, NoGraphError):
        try_this = "without --frontend the model runs itself, interposed, where it has no graph"
    elif "fails on this input" in message or "input does not fit" in message:
        try_this = "give it another with --input"
    told = f"tracing {given.callable}: {message}"
    return "; ".join(filter(None, (f"{place}: {told}" if place else told, try_this)))


def _print(xray: Xray, words: str) -> None:
    architecture = xray.architecture
    count = f"{len(architecture)} ops, {architecture.parameter_count:,} parameters"
    print(f"{architecture.model} of {words}: {count}\n")
    head = ["op", "key", "output", "parameters", "settings", "line"]
    print_table(head, _rows(architecture))
    # Last, so that it stands above the prompt however many ops there are.
    print(f"\n{xray.report}")
    if xray.report.frontend == "symbolic" and not (xray.inputs[0] or xray.inputs[1]):
        print("\nWith an input, e.g. --input 2x3x32x32, the shapes are told and all is verified.")


def _rows(architecture: Architecture) -> list[list[str]]:
    return [
        [
            op.path,
            op.key,
            ", ".join(map(str, op.outputs)),
            f"{op.parameter_count:,}" if op.parameters else "",
            op.settings if len(op.settings) <= _LONGEST else f"{op.settings[: _LONGEST - 3]}...",
            op.where,
        ]
        for op in architecture.values()
    ]


COMMAND = Command(
    "trace",
    "Trace a model of your own: its ops, what was found out about it, and its picture.",
    (
        ("fxray trace model.py:Net --input 2x3x32x32", "a class of ./model.py, on such an input"),
        ("fxray trace model.py:make -o net.png", "a function that returns (model, x)"),
        ("fxray trace my.models:bert -i 'ids=2x12:int64<100'", "by keyword, numbers below 100"),
        ("fxray trace torchvision.models:resnet18", "without an input: symbolically"),
        ("fxray trace model.py:make --json --strict", "for a script: the report, or status 1"),
    ),
    _add_arguments,
    _run,
)
