"""What is handed in as attributes, as strict JSON."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["to_json"]

_SPELLED = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def to_json(document: Any) -> str:
    """Return `document` as strict JSON.

    Numbers that JSON lacks become `"NaN"`, `"Infinity"`, `"-Infinity"`, as zarr spells them;
    scalars of numpy and torch become numbers, anything else its `str`.

    >>> to_json({"lr": float("inf"), "shape": (1, 2)})
    '{"lr":"Infinity","shape":[1,2]}'
    """
    try:
        return json.dumps(document, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(document), separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _SPELLED[str(value)]
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if callable(getattr(value, "item", None)) and getattr(value, "size", None) == 1:
        return _plain(value.item())
    return str(value)
