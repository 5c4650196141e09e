"""See inside a PyTorch model while it trains.

fxray traces a model to a graph of all its operations, functional ones included, rewrites
that graph with capture nodes where you ask for them, and records what they see while the
rewritten model trains as the model did:

>>> import torch, fxray
>>> import torch.nn.functional as F
>>> from torch import nn
>>> class Net(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
...     def forward(self, x):
...         return self.head(F.relu(self.hidden(x)))
>>> model, x = Net(), torch.randn(16, 4)
>>> xray = fxray.trace(model, x)
>>> list(xray.architecture)
['x', 'hidden', 'relu', 'head']

What will be kept is a draft, a dict of dicts, with defaults by layer type. Edit it, or mark
ops by path, by module, by type, by function:

>>> xray.draft.clear()
>>> xray.mark(F.relu, output=True, grad=True, selection=fxray.Whole())
('relu',)

Train what `rewrite` gives. It computes, to the bit, what the model computes:

>>> net = xray.rewrite()
>>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
>>> with fxray.record(net, "memory://essay", name="first") as recorder:
...     for step in range(3):
...         loss = net(x).square().mean()
...         optimizer.zero_grad(); loss.backward(); optimizer.step()
...         recorder.log(loss=loss)

Then ask:

>>> run = fxray.open("memory://essay")
>>> run["relu"].output.steps
array([0, 1, 2])
>>> run["relu"].output[2].shape
(16, 8)
>>> run["relu"].grad[2].shape
(16, 8)
"""

from fxray.architecture import Architecture, Op, TensorSpec
from fxray.capture.recorder import Recorder
from fxray.draft import DEFAULTS, Capture, DefaultTable, Draft, Estimate, Schedule
from fxray.errors import (
    DraftError,
    FxrayError,
    FxrayWarning,
    MissingExtraError,
    NotARunError,
    NotSavedError,
    PictureError,
    RecordError,
    SelectionError,
    SpecialisationError,
    StoreError,
    TraceError,
    UnknownNameError,
)
from fxray.run import Run, Series, runs
from fxray.run import open_run as open  # noqa: A004 - read as fxray.open
from fxray.selections import (
    Histogram,
    Mean,
    NaturalSelection,
    Norm,
    Sample,
    Selection,
    Slice,
    Stats,
    TopK,
    Whole,
)
from fxray.version import VERSION as __version__  # noqa: F401, N811 - what Python calls it
from fxray.xray import Xray, record, trace

__all__ = [
    "DEFAULTS",
    "Architecture",
    "Capture",
    "DefaultTable",
    "Draft",
    "DraftError",
    "Estimate",
    "FxrayError",
    "FxrayWarning",
    "Histogram",
    "Mean",
    "MissingExtraError",
    "NaturalSelection",
    "Norm",
    "NotARunError",
    "NotSavedError",
    "Op",
    "PictureError",
    "RecordError",
    "Recorder",
    "Run",
    "Sample",
    "Schedule",
    "Selection",
    "SelectionError",
    "Series",
    "Slice",
    "SpecialisationError",
    "Stats",
    "StoreError",
    "TensorSpec",
    "TopK",
    "TraceError",
    "UnknownNameError",
    "Whole",
    "Xray",
    "open",
    "record",
    "runs",
    "trace",
]
