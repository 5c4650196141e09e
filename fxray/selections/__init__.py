"""Which numbers of one tensor are kept."""

from __future__ import annotations

from fxray.selections.natural import NaturalSelection
from fxray.selections.numbers import Histogram, Mean, Norm, Stats
from fxray.selections.places import Sample, Slice, TopK, Whole
from fxray.selections.protocol import Selection, check_selection, describe, select, spec_of

__all__ = [
    "Histogram",
    "Mean",
    "NaturalSelection",
    "Norm",
    "Sample",
    "Selection",
    "Slice",
    "Stats",
    "TopK",
    "Whole",
    "check_selection",
    "describe",
    "select",
    "spec_of",
]

# Stores keep the qualified name of a selection: the one a reader can import, which
# stays when a file moves.
for _shipped in (NaturalSelection, Whole, Slice, TopK, Sample, Mean, Norm, Stats, Histogram):
    _shipped.__module__ = __name__
