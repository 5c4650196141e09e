"""What a place holds, and any rows of words, as tables of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

import attrs

__all__ = ["RunList", "RunSummary", "StepRecords", "human_bytes", "table", "tags_text"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@attrs.frozen
class RunSummary:
    """One run of a place, as it is listed.

    Attributes:
        id: unique; any prefix of it that is unique opens the run.
        name: what the user called it, or `""`.
        started: when, ISO 8601, UTC.
        finished: when, or None: it is running, or was killed.
        tags: the user's.
        model: `class`, `parameters`, `fingerprint`.
    """

    id: str
    name: str = ""
    started: str = ""
    finished: str | None = None
    tags: Mapping[str, Any] = attrs.field(factory=dict, hash=False)
    model: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RunSummary:
        """Return the summary that a store gave as `plain`."""
        finished = plain.get("finished")
        tags, model = (_mapping(plain.get(name)) for name in ("tags", "model"))
        return cls(
            str(plain["id"]),
            str(plain.get("name") or ""),
            str(plain.get("started") or ""),
            None if finished is None else str(finished),
            tags,
            model,
        )

    def __str__(self) -> str:
        named = f" {self.name!r}" if self.name else ""
        started = f", started {self.started}" if self.started else ""
        return f"run {self.id}{named}{started}"


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


@attrs.frozen(eq=False, repr=False)
class RunList(Sequence[RunSummary]):
    """The runs of a place, oldest first; prints as a table.

    Attributes:
        place: where they are.
        summaries: the runs.
    """

    place: str
    summaries: tuple[RunSummary, ...]

    @overload
    def __getitem__(self, index: int) -> RunSummary: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RunSummary, ...]: ...
    def __getitem__(self, index: int | slice) -> RunSummary | tuple[RunSummary, ...]:
        return self.summaries[index]

    def __len__(self) -> int:
        return len(self.summaries)

    def __repr__(self) -> str:
        if not self.summaries:
            return f"no runs in {self.place}"
        rows = [
            [run.id, run.name, str(run.model.get("class", "")), run.started, run.finished or "–",
             tags_text(run.tags)]
            for run in self.summaries
        ]  # fmt: skip
        return table(["run", "name", "model", "started", "finished", "tags"], rows)


class StepRecords(dict[str, dict[str, Any]]):
    """Everything kept at one step, by op, then by kind; prints as a table of shapes.

    Attributes:
        step: the step.
    """

    def __init__(self, step: int) -> None:
        """Hold nothing yet of `step`."""
        super().__init__()
        self.step = step

    def __repr__(self) -> str:
        rows = [
            [op, kind, ", ".join(f"{name} {_sketch(a)}".strip() for name, a in _fields(value))]
            for op, kinds in self.items()
            for kind, value in kinds.items()
        ]
        return table(["op", "kind", f"at step {self.step}"], rows)


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [*value.items()] if isinstance(value, dict) else [("", value)]


def _sketch(array: Any) -> str:
    if not array.ndim:
        return f"{array[()]:.4g}" if array.dtype.kind in "fiu" else str(array[()])
    return f"{array.dtype} {'×'.join(map(str, array.shape))}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return `rows` under `head`, each column as wide as its widest entry.

    >>> print(table(["op", "records"], [["relu", "12"]]))
    op    records
    relu  12
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join(lines)


def tags_text(tags: Mapping[str, Any]) -> str:
    """Return tags as `name=value` pairs."""
    return " ".join(f"{name}={value}" for name, value in tags.items())


def human_bytes(nbytes: float) -> str:
    """Return a number of bytes for a reader.

    >>> human_bytes(0), human_bytes(1536), human_bytes(3 << 30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    power = min(len(_UNITS) - 1, int(math.log2(nbytes)) // 10) if nbytes >= 1 else 0
    digits = 0 if power == 0 else 1
    return f"{nbytes / (1 << 10 * power):.{digits}f} {_UNITS[power]}"
