"""What will be kept of a model, and when."""

from __future__ import annotations

from fxray.draft.defaults import DEFAULTS, DefaultTable
from fxray.draft.draft import Capture, Draft
from fxray.draft.entry import KINDS, Entry, MarkWords
from fxray.draft.estimate import Estimate
from fxray.draft.schedule import Schedule

__all__ = [
    "DEFAULTS",
    "KINDS",
    "Capture",
    "DefaultTable",
    "Draft",
    "Entry",
    "Estimate",
    "MarkWords",
    "Schedule",
]
