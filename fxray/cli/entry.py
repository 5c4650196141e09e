"""Reads the command line, and says in one line what went wrong."""

from __future__ import annotations

import io
import os
import platform
import sys
import warnings
from importlib import metadata
from typing import Any

from fxray.cli import demo, plot, render, runs, show, trace
from fxray.cli.command import Parser, examples_text
from fxray.errors import FxrayError, FxrayWarning, nearest
from fxray.version import VERSION

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    command.name: command
    for command in (
        demo.COMMAND,
        trace.COMMAND,
        runs.COMMAND,
        show.COMMAND,
        plot.COMMAND,
        render.COMMAND,
    )
}

_EXAMPLES = (
    ("fxray demo", "train a small network and look inside it"),
    ("fxray trace model.py:Net --input 2x3x32x32", "trace a model of your own, and draw it"),
    ("fxray runs", "list what was recorded in ./runs or ./fxray-demo/runs"),
    ("fxray show relu --step 40", "print what the layer put out"),
    ("fxray plot conv1", "draw its weights"),
)


def main(words: list[str] | None = None) -> int:
    """Do what `words`, by default those of the command line, say; return the exit status.

    0 when all went well, 1 when it could not be done, 130 when interrupted.

    Raises:
        SystemExit: with status 2 where the words make no sense, 0 after `--help`.
    """
    words = sys.argv[1:] if words is None else list(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where the terminal's encoding lacks a "×" that is no reason to stop.
        sys.stdout.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]  # no file, no line
            _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has gone (`fxray show | head`). What is still in the buffer would make
        # Python complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except FxrayError as error:
        return _say(str(error))
    except OSError as error:
        return _say(": ".join(filter(None, (str(error.filename or ""), error.strerror or "error"))))
    return 0


def _say(message: str, status: int = 1) -> int:
    print(f"fxray: {' '.join(message.split())}", file=sys.stderr)
    return status


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, line: int, *_: Any
) -> None:
    if issubclass(category, FxrayWarning):
        _say(f"warning: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, line), end="", file=sys.stderr)


def _run(words: list[str]) -> None:
    name = words[0] if words else "--help"
    if name in COMMANDS:
        command = COMMANDS[name]
        command.run(command.parse(words[1:]))
        return
    parser = _parser()
    if not name.startswith("-"):
        close = nearest(name, COMMANDS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        parser.error(f"no command {name!r}{hint} There are {', '.join(COMMANDS)}")
    if "--version" in words:
        print(_versions())
        return
    parser.parse_args(words or ["--help"])
    parser.error("no command given")


def _parser() -> Parser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {one.summary}" for name, one in COMMANDS.items())
    parser = Parser(
        "fxray",
        "See inside a PyTorch model while it trains.",
        f"commands:\n{listed}\n\n{examples_text(_EXAMPLES)}\n\n"
        "`fxray COMMAND --help` says more of each.",
    )
    parser.usage = "fxray COMMAND [WORDS ...]"
    parser.add_argument("--version", action="store_true", help="print the versions of what is used")
    return parser


def _versions() -> str:
    used = ("torch", "tensorstore", "numpy")
    versions = [f"{name} {metadata.version(name)}" for name in used]
    python = f"Python {platform.python_version()}"
    return f"fxray {VERSION} ({', '.join([*versions, python])})"
