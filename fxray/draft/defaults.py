"""What is kept of an op when nobody has said anything: a table by type."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from fxray.draft.layout import ACTIVATIONS, CONVOLUTIONS, EMBEDDINGS, LINEARS
from fxray.errors import DraftError

__all__ = ["DEFAULTS", "DefaultTable"]


def _frozen(entries: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(entries, Mapping):
        msg = f'{entries!r} is not a table; write DefaultTable({{"relu": {{"output": True}}}})'
        raise DraftError(msg)
    for kind, words in entries.items():
        if not isinstance(kind, str) or not isinstance(words, Mapping):
            msg = f'{kind!r}: {words!r} is no row; write for example "relu": {{"output": True}}'
            raise DraftError(msg)
    rows = {kind.lower(): MappingProxyType(dict(words)) for kind, words in entries.items()}
    return MappingProxyType(rows)


@attrs.frozen
class DefaultTable:
    """What is kept by default, by the type of op, in the words of a draft entry.

    A module of a subclass of a listed type counts as that type. A flag that an op cannot
    have (`weight` of a functional convolution) is passed over; an unknown word is refused
    when a draft is made.

    Attributes:
        entries: words of an entry by type in lower case.

    >>> table = DefaultTable({"linear": {"weight": True, "every": 50}})
    >>> dict(table.entries["linear"])
    {'weight': True, 'every': 50}
    >>> sorted(DEFAULTS.replace({"relu": {}}).entries["relu"])
    []
    """

    entries: Mapping[str, Mapping[str, Any]] = attrs.field(
        factory=dict, converter=_frozen, hash=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return DefaultTable, ({kind: dict(words) for kind, words in self.entries.items()},)

    def replace(self, entries: Mapping[str, Mapping[str, Any]]) -> DefaultTable:
        """Return a table with the rows of `entries` put in or in place of its own."""
        return DefaultTable({**self.entries, **entries})


_WEIGHTS = (*CONVOLUTIONS, *LINEARS, *EMBEDDINGS)

DEFAULTS = DefaultTable(
    {kind: {"weight": True, "every": 100} for kind in _WEIGHTS}
    | {kind: {"output": True, "every": 10} for kind in ACTIVATIONS}
)
"""Weights of convolutions, linear layers and embeddings every 100 steps; outputs of
activations, module or functional, every 10; nothing else."""
