"""The living write side: takes what capture nodes hand over and records it."""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import os
import platform
import secrets
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxray.architecture import Architecture, within
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
    """Records what rewritten modules capture, until closed.

    Made by `fxray.record`; a context manager. Whatever goes wrong on its side is
    absorbed, told once and raised at `close`, never in the middle of training.

    Attributes:
        id: the run's unique id, which opens it: `fxray.open(place, id)`.
    """

    def __init__(  # noqa: PLR0913 - what a run is begun with, each by its name
        self,
        nets: Mapping[str, RewrittenModule],
        store: Store,
        *,
        name: str,
        tags: Mapping[str, Any],
        versions: Mapping[str, str],
        commit_every: float,
        read: Callable[[str], Any],
    ) -> None:
        for module, net in nets.items():
            if receiver_of(net.handle) is not None:
                which = repr(module) if module else "this module"
                msg = f"{which} is being recorded already; close that recorder first"
                raise RecordError(msg)
        self.id = secrets.token_hex(6)
        self._nets, self._store, self._read = dict(nets), store, read
        self._pid = os.getpid()
        self._error: Exception | None = None
        self._closed = False
        self._tally = Tally()
        self._steps = Steps()
        shared: dict[str, Any] = {
            "steps": self._steps,
            "tally": self._tally,
            "lock": threading.RLock(),
            "absorb": self._absorb,
        }
        self._intakes = {
            module: NumberedIntake(net, store, self.id, module=module, **shared)
            for module, net in nets.items()
        }
        self._log = LogStream(store, self.id)
        self._told = self._known()
        graph = self._graph()
        store.begin_run(self.id, self._attributes(name, tags, versions, graph), graph.to_dict())
        self._commits = CommitThread(self._commit, commit_every)
        with contextlib.ExitStack() as undone:
            self._connect(undone)
            self._connected = undone.pop_all()

    def _connect(self, undone: contextlib.ExitStack) -> None:
        """Begin to take what comes; `undone` ends it, half-way too."""
        undone.callback(self._disconnect)
        for module, net in self._nets.items():
            connect(net.handle, self._intakes[module])
        # These hold the recorder, so that one nobody kept still records until the process ends.
        for intake in self._intakes.values():
            undone.callback(register_optimizer_step_post_hook(_left_alone(intake.stepped)).remove)
        atexit.register(self.close)
        undone.callback(atexit.unregister, self.close)
        self._commits.start()

    def _disconnect(self) -> None:
        for module, net in self._nets.items():
            disconnect(net.handle)
            self._intakes[module].close()

    def _known(self) -> tuple[Architecture, ...]:
        return tuple(net.architecture for net in self._nets.values())

    def _graph(self) -> Architecture:
        """Return the graph of all that is recorded."""
        parts = dict(zip(self._nets, self._told, strict=True))
        return parts[""] if "" in parts else Architecture.of_several(parts)

    def _captures(self) -> list[dict[str, Any]]:
        return [
            {**chosen.to_dict(), "op": within(module, chosen.op)}
            for module, net in self._nets.items()
            for chosen in net.captures
        ]

    def _attributes(
        self,
        name: str,
        tags: Mapping[str, Any],
        versions: Mapping[str, str],
        graph: Architecture,
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": name,
            "started": _now_text(),
            "finished": None,
            "tags": dict(tags),
            "model": self._model(graph),
            "versions": {
                **versions,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "captures": self._captures(),
            "notes": [],
        }

    def _model(self, graph: Architecture) -> dict[str, Any]:
        models = {}
        for module, net in self._nets.items():
            model = type(net.original)
            models[module] = _described(
                f"{model.__module__}.{model.__qualname__}", net.architecture
            )
        if "" in models:
            return models[""]
        return {**_described(graph.model, graph), "modules": models}

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
        """Return a context that makes one step of the forwards inside.

        Those of micro-batches, or of several modules: `with recorder.step():`. Their rows
        differ in `call`, which counts the forwards of the step.
        """
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
        self._connected.close()
        self._commits.stop()
        with self._absorbing():
            if self._error is None:
                for intake in self._intakes.values():
                    for still_open in intake.streams():
                        still_open.seal()
        sites = [site for intake in self._intakes.values() for site in intake.sites]
        empty = self._tally.empty(sites, named=5)
        with self._absorbing():
            if self._error is None:
                self._tell_graph()
                for stream in self._streams():
                    stream.close()
                notes = self._tally.notes(sites)
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
            self._disconnect()
            self._tally.say(
                f"recording of run {self.id} stopped: {error}. Training goes on; what was "
                "committed is readable, and closing the recorder raises this again"
            )

    def _streams(self) -> list[Stream | LogStream]:
        streams = [stream for intake in self._intakes.values() for stream in intake.streams()]
        return [*streams, self._log]

    def _tell_graph(self) -> None:
        """Write the graph anew, if a model ran ops meanwhile that it never ran before."""
        known = self._known()
        if any(now is not told for now, told in zip(known, self._told, strict=True)):
            self._told = known
            captures = self._captures()
            self._store.update_run(self.id, {"captures": captures}, self._graph().to_dict())

    def _commit(self) -> bool:
        """Commit every stream; return whether to go on doing so."""
        with self._absorbing():
            self._tell_graph()
            for stream in self._streams():
                if self._error is None:
                    stream.commit()
        return self._usable()


def _described(model: str, architecture: Architecture) -> dict[str, Any]:
    """Return what a run says of a model of that class."""
    return {
        "class": model,
        "parameters": architecture.parameter_count,
        "fingerprint": architecture.fingerprint,
    }


def _left_alone(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that a compiled optimizer calls as it is; without a compiler, itself."""
    if "torch._dynamo" not in sys.modules:  # to say so would import it
        return hook
    alone: Callable[..., None] = torch.compiler.disable(hook, reason="fxray reads what was used")
    return alone


def _now_text() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
