"""A Graphviz picture as a file or as SVG text."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fxray.errors import MissingExtraError, PictureError
from fxray.look.dot import to_dot

if TYPE_CHECKING:
    import graphviz

__all__ = ["FORMATS", "engine", "save", "svg", "to_dot"]

FORMATS = ("svg", "png", "pdf", "dot")
"""What `save` writes, as suffixes without their dot."""

LAYOUT_SECONDS = 120
"""How long Graphviz may think about one picture."""

_DPI = {"png": "144"}

# A child process, although the library could be called in this one: Graphviz holds the
# GIL while it lays out, cannot be interrupted, is not thread-safe and writes to file
# descriptor 2. In the process that trains, any of these would be felt.
_BUNDLED = """
import sys, pygraphviz
graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode("utf-8"))
if len(sys.argv) > 2:
    graph.graph_attr["dpi"] = sys.argv[2]
sys.stdout.buffer.write(graph.draw(format=sys.argv[1], prog="dot"))
"""


def save(
    dot: graphviz.Digraph,
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
) -> Path:
    """Write the picture of `dot` to `path` and return where it stands.

    Args:
        dot: what `to_dot` gave.
        path: file to write; missing folders are made, an existing file is replaced.
        format: one of `FORMATS`; the suffix of `path` says when None.

    Raises:
        PictureError: a format that is not in `FORMATS`, or Graphviz failed.
        MissingExtraError: there is no Graphviz; the DOT text is left beside `path`.
    """
    target = Path(path)
    chosen = _format(target, format)
    target.parent.mkdir(parents=True, exist_ok=True)
    if chosen == "dot":
        target.write_text(dot.source, encoding="utf-8")
        return target
    try:
        picture = _draw(dot.source, chosen)
    except MissingExtraError as error:
        source = target.with_name(f"{target.name}.dot")
        source.write_text(dot.source, encoding="utf-8")
        msg = f"{error} The DOT source is in {source}: `dot -T{chosen}` draws it anywhere."
        raise MissingExtraError(msg) from None
    target.write_bytes(picture)
    return target


def svg(dot: graphviz.Digraph) -> str:
    """Return the picture of `dot` as an `<svg>` element, for a notebook or a page.

    Raises:
        PictureError: Graphviz failed.
        MissingExtraError: there is no Graphviz.
    """
    text = _draw(dot.source, "svg").decode("utf-8")
    # A browser takes the XML prolog and doctype inside a page for text.
    return text[text.index("<svg") :]


def engine() -> str | None:
    """Return what will draw: `"dot"`, `"pygraphviz"`, or None where there is neither."""
    if shutil.which("dot"):
        return "dot"
    return "pygraphviz" if sys.executable and importlib.util.find_spec("pygraphviz") else None


def _format(target: Path, given: str | None) -> str:
    suffix = target.suffix.removeprefix(".").lower()
    chosen = (given or suffix).removeprefix(".").lower()
    chosen = "dot" if chosen == "gv" else chosen
    if chosen not in FORMATS:
        what = f"format {given!r}" if given else f"{target.name!r}"
        legal = ", ".join(f".{known}" for known in FORMATS)
        msg = f"cannot save a picture as {what}; end its name in one of {legal}."
        raise PictureError(msg)
    return chosen


def _draw(source: str, format: str) -> bytes:  # noqa: A002
    chosen, dpi = engine(), _DPI.get(format)
    if chosen == "dot":
        command = ["dot", f"-T{format}", *([f"-Gdpi={dpi}"] if dpi else [])]
    elif chosen == "pygraphviz":
        command = [sys.executable, "-c", _BUNDLED, format, *([dpi] if dpi else [])]
    else:
        msg = "no Graphviz on this machine: `pip install 'fxray[dot]'` brings one."
        raise MissingExtraError(msg)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(  # noqa: S603 - our own words, the source goes through stdin
            command,
            input=source.encode("utf-8"),
            capture_output=True,
            timeout=LAYOUT_SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        msg = (
            f"Graphviz found no layout within {LAYOUT_SECONDS} s; a smaller depth= folds "
            "more modules, and a path ending in .dot saves the source without a layout."
        )
        raise PictureError(msg) from None
    return _checked(done)


def _checked(done: subprocess.CompletedProcess[bytes]) -> bytes:
    said = done.stderr.decode("utf-8", "replace")
    # Graphviz draws on after a label it cannot read, and still returns 0.
    faults = [line for line in said.splitlines() if line.startswith("Error:")]
    if done.returncode or faults or not done.stdout:
        last = faults[0] if faults else (said.strip().splitlines() or ["it said nothing"])[-1]
        msg = f"Graphviz failed: {last} Save with the suffix .dot to look at its source."
        raise PictureError(msg)
    return done.stdout
