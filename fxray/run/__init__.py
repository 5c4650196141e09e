"""What training left behind, to read: a run, its series, their records.

`open_run` finds a run; `run[op]` is what was kept of an op; `.output`, `.grad`, `.input`,
`.weight`, `.weight_grad` are series over steps; `series[step]` is a record, a numpy array of
its true shape and dtype. Nothing here needs the model or the code that trained it, and
opening a stranger's run executes nothing of theirs.
"""

from fxray.run.kept import CaptureTable, Kept
from fxray.run.opening import open_run, runs
from fxray.run.records import Log, OpRecords
from fxray.run.run import Run
from fxray.run.series import Series
from fxray.run.tables import RunList, RunSummary

__all__ = [
    "CaptureTable",
    "Kept",
    "Log",
    "OpRecords",
    "Run",
    "RunList",
    "RunSummary",
    "Series",
    "open_run",
    "runs",
]
