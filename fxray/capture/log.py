"""The user's own numbers beside the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxray.errors import RecordError
from fxray.store import ArrayInfo, Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxray.store import Row, Store, StreamWriter

__all__ = ["LogStream", "number"]


class LogStream:
    """The stream of what the user logs, one row per call."""

    def __init__(self, store: Store, run_id: str, rank: int = 0) -> None:
        self._store, self._run_id, self._name = store, run_id, f"log.r{rank}"
        self._rank = rank
        self._writer: StreamWriter | None = None
        self._declared: set[str] = set()

    def write(self, row: Row, numbers: Mapping[str, Any]) -> None:
        """Write one row of numbers by name."""
        if self._writer is None:
            attributes = {"moment": "log", "rank": self._rank}
            self._writer = self._store.writer(self._run_id, self._name, attributes)
        for name in numbers:
            if name not in self._declared:
                self._writer.declare(ArrayInfo(name, "float64", (), {"kind": "log"}))
                self._declared.add(name)
        self._writer.append(row, {name: Record(n, ()) for name, n in numbers.items()})

    def commit(self) -> None:
        """Make what was written readable."""
        if self._writer is not None:
            self._writer.commit()

    def close(self) -> None:
        """Commit and finish."""
        if self._writer is not None:
            self._writer.close()


def number(name: str, value: Any) -> Any:
    """Return a logged value as a 0-dim float64 array.

    Raises:
        RecordError: it is neither a number nor a tensor of one element.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            msg = f"log({name}=…) takes a number, and this is a tensor of {value.numel()} elements"
            raise RecordError(msg)
        value = value.detach().item()
    try:
        return np.asarray(float(value), dtype=np.float64)
    except (TypeError, ValueError):
        msg = f"log({name}=…) takes a number, and this is a {type(value).__qualname__}"
        raise RecordError(msg) from None
