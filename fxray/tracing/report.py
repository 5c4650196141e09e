"""What a trace obtained, what it fixed, and how far it was verified."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from fxray.tracing.ops import info_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Branch", "Report", "baked_values", "branches_in", "count_ops"]

WIDTH = 88
"""Columns of the printed report. Not the terminal's: the same report is the same text."""

SHOWN = 8
"""How many branches are printed; `Report.branches` has them all."""

_LABELS = 12


@attrs.frozen
class Branch:
    """A line where Python's way depends on the input, and which way it went.

    Attributes:
        where: `file.py:line`.
        was: the outcome that the graph was traced for, e.g. `"True"`.
        by: `"data"` where numbers of a tensor decide, `"size"` where a size does.
    """

    where: str
    was: str
    by: str

    def __str__(self) -> str:
        return f"{self.where} (was {self.was})"


@attrs.frozen
class Report:
    """What a trace obtained: as data, and printed as a block of a line for each fact.

    Attributes:
        frontend: `"execution"` or `"symbolic"`; `"interposed"` where a mode has no graph.
        ops: number of ops by mode.
        free: the sizes that may differ from call to call, e.g. `"batch size"`.
        fixed: those that were shown to matter, each with the reason.
        branches: every branch that a call may take another way: it is then traced again.
        constants: number of values baked into the graphs.
        regions: number of checkpointed regions kept.
        interposed: why there is no graph, by mode; the model itself runs there.
        verified: how the product compared with the model on the traced input.
        equal: whether that was bit-equal.
        notes: whatever else a user must know.
        since: what the user was told since: branches that went another way, modes given up.

    >>> print(Report("execution", {"train": 6, "eval": 6}, ("batch size",), regions=1))
    traced      by execution: the model ran on the input, and what it computed is a graph
    ops         6 in train mode, 6 in eval mode
    sizes       batch size free
    regions     1 checkpointed, and kept so
    verified    no: there was no input to run; the first calls will be
    """

    frontend: str
    ops: Mapping[str, int]
    free: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    branches: tuple[Branch, ...] = ()
    constants: int = 0
    regions: int = 0
    interposed: Mapping[str, str] = attrs.field(factory=dict)
    verified: str = "not verified: there was no input to run; the first calls will be"
    equal: bool = False
    notes: tuple[str, ...] = ()
    since: tuple[str, ...] = ()

    @property
    def reservations(self) -> tuple[str, ...]:
        """Everything that is less than a graph for every call, equal to the model bit for bit.

        What `strict=True` makes an error of.
        """
        found = [f"no graph in {mode} mode: {why}" for mode, why in self.interposed.items()]
        found += self.fixed
        found += [f"branch on data at {b}" for b in self.branches if b.by == "data"]
        found += self.notes
        return tuple(found if self.equal else [*found, self.verified])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready plain data."""
        plain: dict[str, Any] = attrs.asdict(self)
        return {**plain, "reservations": list(self.reservations)}

    def __str__(self) -> str:
        """Return the facts as a block, each on a line of its own under a label.

        Labels come in one order, those with nothing to say are left out, and what is longer
        than `WIDTH` goes on below: the same report is always the same text.
        """
        return "\n".join(_line(label, fact) for label, fact in self._facts())

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "traced", self._how()
        yield "ops", ", ".join(f"{count} in {mode} mode" for mode, count in self.ops.items())
        for why in dict.fromkeys(self.interposed.values()):
            modes = [mode for mode, reason in self.interposed.items() if reason == why]
            yield "no graph", f"in {' and '.join(modes)} mode: {why}"
        for size in self.free:
            yield "sizes", f"{size} free"
        for size in _merged(self.fixed):
            yield "sizes", size
        if self.branches:
            told = ", ".join(map(str, self.branches[:SHOWN]))
            left = len(self.branches) - SHOWN
            more = f" and {left} more, in report.branches" if left > 0 else ""
            yield "branches", f"guarded: {told}{more}"
        if any(branch.by == "data" for branch in self.branches):
            yield "compile", "leave fullgraph=True out: with branches on data it runs eagerly"
        if self.regions:
            yield "regions", f"{self.regions} checkpointed, and kept so"
        if self.constants:
            words = "tensors" if self.constants > 1 else "tensor"
            yield "constants", f"{self.constants} {words} the forward made, kept as in the example"
        for note in self.notes:
            yield "note", note
        yield "verified", self._verified()
        for told in self.since:
            # Before the first colon stands what it is about, which the sentence names again.
            yield "since then", told.partition(": ")[2] or told

    def _how(self) -> str:
        if self.frontend == "symbolic":
            return "symbolically, by torch.fx: no numbers went through, so no shapes are known"
        if self.frontend == "execution":
            return "by execution: the model ran on the input, and what it computed is a graph"
        rest = [mode for mode in self.ops if mode not in self.interposed]
        graph = f"by execution in {' and '.join(rest)} mode; " if rest else ""
        where = f"in {' and '.join(self.interposed)} mode"
        return f"{graph}interposed {where}: the model itself runs there, its ops named"

    def _verified(self) -> str:
        text = self.verified
        if text.startswith("not verified: "):
            return text.replace("not verified", "no", 1)
        return text.removeprefix("verified ") if self.equal else f"up to rounding: {text}"


def _merged(facts: Sequence[str]) -> Iterator[str]:
    """Yield each fact, what is said alike of train mode and of eval mode as one of both.

    >>> [*_merged(["batch size fixed in train mode", "batch size fixed in eval mode"])]
    ['batch size fixed in both modes']
    """
    alike: dict[str, list[str]] = {}
    for fact in facts:
        both = fact.replace("train mode", "both modes").replace("eval mode", "both modes")
        alike.setdefault(both, []).append(fact)
    for both, told in alike.items():
        yield told[0] if len(told) == 1 else both


def _line(label: str, fact: str) -> str:
    return textwrap.fill(
        fact,
        WIDTH,
        initial_indent=f"{label:{_LABELS}}",
        subsequent_indent=" " * _LABELS,
        break_long_words=False,
        break_on_hyphens=False,
    )


def branches_in(graphs: Mapping[str, Any]) -> tuple[Branch, ...]:
    """Return every branch of all modes that another call may take another way."""
    found: dict[str, Branch] = {}
    for graph in graphs.values():
        for node in graph.nodes:
            by_data = "fxray_branch" in node.meta
            if by_data or "fxray_live" in node.meta:
                where = str(node.args[2]).replace("\\", "/").rpartition("/")[2]
                by = "data" if by_data else "size"
                found.setdefault(where, Branch(where, _short(node.args[1]), by))
    return tuple(found.values())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:17]}..."


def baked_values(constants: Mapping[str, Any]) -> int:
    """Return how many of the constants are values; a function or a class is none."""
    return sum(isinstance(value, (torch.Tensor, np.ndarray)) for value in constants.values())


def count_ops(graph: Any) -> int:
    """Return the number of ops in an fx graph."""
    return sum(info_of(node) is not None for node in graph.nodes)
