"""One model of the corpus: how it is built, how it is called, what may vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs
import torch
from torch import nn

__all__ = ["EVERYTHING", "Case", "Sizes", "Vary"]

Vary = Literal["values", "batch", "length"]
EVERYTHING: frozenset[Vary] = frozenset({"values", "batch", "length"})


@attrs.frozen
class Sizes:
    """What one call is made from.

    Attributes:
        batch: number of samples.
        length: of the sequence, or height and width of the image.
        seed: of the values; another seed, other values. Odd seeds are to take the other
            side of a branch that a case has.
    """

    batch: int
    length: int
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Return a generator that draws the values, beside torch's own."""
        return torch.Generator().manual_seed(1000 + self.seed)

    def __str__(self) -> str:
        return f"batch {self.batch}, length {self.length}, values {self.seed}"


Call = Callable[[Sizes], tuple[tuple[Any, ...], dict[str, Any]]]


def _nothing() -> None:
    """Do nothing."""


@attrs.frozen
class Case:
    """One model of the corpus.

    Attributes:
        name: tells the trap or the architecture.
        build: makes the model, with random weights; the harness seeds.
        call: `(args, kwargs)` of a call, new tensors every time.
        varies: what the eager model itself lets vary from call to call.
        lengths: lengths to call it at, the one it is traced at first.
        batches: batch sizes to call it at, the one it is traced at first.
        graph: whether it must become a graph; False where Python decides, at every call,
            what no graph can hold.
        why: the trap, in a line.
        training: whether the eager model can be trained as it stands.
        reset: forgets what earlier models left in caches that are not the model's own.
        scratch: attributes that only save time: they may be filled by a call, or not.
        hidden: activations inside what the model's author keeps as one op (`torch.fx.wrap`).
    """

    name: str
    build: Callable[[], nn.Module]
    call: Call
    varies: frozenset[Vary] = EVERYTHING
    lengths: tuple[int, ...] = (6, 9)
    batches: tuple[int, ...] = (2, 3)
    graph: bool = True
    why: str = ""
    training: bool = True
    reset: Callable[[], None] = _nothing
    scratch: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
