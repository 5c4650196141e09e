"""The living write side: takes what capture nodes hand over and records it."""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import os
import platform
import secrets
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxray.capture.commits import CommitThread
from fxray.capture.log import LogStream, number
from fxray.capture.node import connect, disconnect, receiver_of
from fxray.capture.numbered import NumberedIntake
from fxray.capture.progress import shown
from fxray.capture.steps import Steps
from fxray.capture.tally import Tally
from fxray.errors import FxrayWarning, RecordError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from types import TracebackType

    from fxray.capture.rewrite import RewrittenModule
    from fxray.capture.rows import Stream
    from fxray.store import Store

__all__ = ["Pass", "Recorder"]

T = TypeVar("T")


class Pass:
    """A named pass that trains nothing: loop over it, or enter it with `with`."""

    def __init__(self, recorder: Recorder, name: str, loader: Iterable[Any] | None) -> None:
        self._recorder, self._name, self._loader = recorder, name, loader
        self._entered = contextlib.ExitStack()

    def __iter__(self) -> Iterator[Any]:
        if self._loader is None:
            msg = (
                f"phase {self._name!r} was given nothing to loop over; say "
                f"recorder.phase({self._name!r}, loader), or `with recorder.phase(…):`"
            )
            raise RecordError(msg)
        with self:
            for batch, item in enumerate(shown(self._loader, self._name)):
                self._recorder._steps.at_batch(batch)  # noqa: SLF001 - a part of the recorder
                yield item

    def __enter__(self) -> None:
        self._entered.enter_context(self._recorder._steps.named(self._name))  # noqa: SLF001

    def __exit__(self, *error: object) -> None:
        self._entered.close()


class Recorder:
    """Records what a rewritten module captures, until closed.

    Made by `fxray.record`; a context manager. Whatever goes wrong on its side is
    absorbed, told once and raised at `close`, never in the middle of training.

    Attributes:
        id: the run's unique id, which opens it: `fxray.open(place, id)`.
    """

    def __init__(  # noqa: PLR0913 - what a run is begun with, each by its name
        self,
        net: RewrittenModule,
        store: Store,
        *,
        name: str,
        tags: Mapping[str, Any],
        versions: Mapping[str, str],
        commit_every: float,
        read: Callable[[str], Any],
    ) -> None:
        if receiver_of(net.handle) is not None:
            msg = "this module is being recorded already; close that recorder first"
            raise RecordError(msg)
        self.id = secrets.token_hex(6)
        self._net, self._store, self._read = net, store, read
        self._pid = os.getpid()
        self._error: Exception | None = None
        self._closed = False
        self._tally = Tally()
        self._steps = Steps()
        self._intake = NumberedIntake(
            net, store, self.id, steps=self._steps, tally=self._tally, absorb=self._absorb
        )
        self._log = LogStream(store, self.id)
        self._told = net.architecture
        store.begin_run(self.id, self._attributes(name, tags, versions), self._told.to_dict())
        connect(net.handle, self._intake)
        # These hold the recorder, so that one nobody kept still records until the process ends.
        self._optimizer_hook = register_optimizer_step_post_hook(self._intake.stepped)
        atexit.register(self.close)
        self._commits = CommitThread(self._commit, commit_every)
        self._commits.start()

    def _attributes(
        self, name: str, tags: Mapping[str, Any], versions: Mapping[str, str]
    ) -> dict[str, Any]:
        architecture, model = self._net.architecture, type(self._net.original)
        return {
            "id": self.id,
            "name": name,
            "started": _now_text(),
            "finished": None,
            "tags": dict(tags),
            "model": {
                "class": f"{model.__module__}.{model.__qualname__}",
                "parameters": architecture.parameter_count,
                "fingerprint": architecture.fingerprint,
            },
            "versions": {
                **versions,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "captures": [chosen.to_dict() for chosen in self._net.captures],
            "notes": [],
        }

    # ------------------------------------------------------------------ for the user

    @property
    def run(self) -> Any:
        """The living run: what was committed so far, to be asked like any `Run`."""
        return self._read(self.id)

    def epoch(self, loader: Iterable[T]) -> Generator[T, None, None]:
        """Yield the batches of `loader` as the next training epoch, numbered.

        Draws a progress bar on a terminal where rich is installed.
        """
        with self._steps.next_epoch():
            description = f"epoch {self._steps.epoch}"
            for batch, item in enumerate(shown(loader, description)):
                self._steps.at_batch(batch)
                yield item

    def phase(self, name: str, loader: Iterable[Any] | None = None) -> Pass:
        """Return a named pass that trains nothing: `for x, y in recorder.phase("valid", loader)`.

        Without a loader it is a context: `with recorder.phase("probe"): net(x)`.
        """
        return Pass(self, name, loader)

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that makes one step of the forwards inside (micro-batches)."""
        return self._steps.group()

    def log(self, **values: float | torch.Tensor) -> None:
        """Record numbers of your own beside the step: `recorder.log(loss=loss, lr=0.1)`.

        Args:
            values: each a number or a tensor of one element.

        Raises:
            RecordError: a value is neither.
        """
        numbers = {name: number(name, value) for name, value in values.items()}
        if self._usable():
            with self._absorbing():
                self._log.write(self._steps.now("log"), numbers)

    def flush(self) -> None:
        """Make everything recorded so far readable, now."""
        with self._absorbing():
            self._commit()

    def close(self) -> None:
        """Write what is left and end the run.

        Names, in a warning and in the run's notes, every capture that kept nothing.

        Raises:
            StoreError: something could not be written; what was committed is readable.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        disconnect(self._net.handle)
        self._intake.close()
        self._optimizer_hook.remove()
        atexit.unregister(self.close)
        self._commits.stop()
        with self._absorbing():
            if self._error is None:
                for still_open in self._intake.streams():
                    still_open.seal()
        empty = self._tally.empty(self._intake.sites, named=5)
        with self._absorbing():
            if self._error is None:
                self._tell_graph()
                for stream in self._streams():
                    stream.close()
                notes = self._tally.notes(self._intake.sites)
                self._store.update_run(self.id, {"finished": _now_text(), "notes": notes})
        if self._error is not None:
            msg = f"run {self.id} could not be written to its end: {self._error}"
            raise StoreError(msg) from self._error
        if empty:
            text = f"{'; '.join(empty)}. The run's notes name them all"
            warnings.warn(text, FxrayWarning, stacklevel=2)

    def __enter__(self) -> Recorder:  # noqa: PYI034 - Self would hide the name in the docs
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except StoreError as own:
            if error is None:
                raise
            self._tally.say(str(own))  # the training's own error is the one to show

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"at step {self._steps.step}"
        return f"<Recorder of run {self.id}, {state}>"

    # ------------------------------------------------------------------ the store's side

    def _usable(self) -> bool:
        # A forked child (a DataLoader worker) that touches the store would be aborted.
        return not self._closed and self._error is None and os.getpid() == self._pid

    @contextlib.contextmanager
    def _absorbing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._absorb(error)

    def _absorb(self, error: Exception) -> None:
        """Keep an error of ours from reaching the training; remember the first, say it once."""
        if self._error is None:
            self._error = error
            disconnect(self._net.handle)
            self._tally.say(
                f"recording of run {self.id} stopped: {error}. Training goes on; what was "
                "committed is readable, and closing the recorder raises this again"
            )

    def _streams(self) -> list[Stream | LogStream]:
        return [*self._intake.streams(), self._log]

    def _tell_graph(self) -> None:
        """Write the graph anew, if the model ran ops meanwhile that it never ran before."""
        architecture = self._net.architecture
        if architecture is not self._told:
            self._told = architecture
            captures = [chosen.to_dict() for chosen in self._net.captures]
            self._store.update_run(self.id, {"captures": captures}, architecture.to_dict())

    def _commit(self) -> bool:
        """Commit every stream; return whether to go on doing so."""
        with self._absorbing():
            self._tell_graph()
            for stream in self._streams():
                if self._error is None:
                    stream.commit()
        return self._usable()


def _now_text() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
