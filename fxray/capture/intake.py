"""From what capture nodes hand over, and what optimizers used, to rows."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.capture.parameters import Awaited, parameters
from fxray.capture.rows import OpenRow, Stream, StreamKey
from fxray.capture.sites import Due, Sites
from fxray.capture.steps import Forward
from fxray.torch_private import backward_is_running, function_level, hook_gradient
from fxray.tracing.regions import recomputed_later
from fxray.tracing.results import tensor_items

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxray.capture.rewrite import RewrittenModule
    from fxray.capture.spots import Site, Spot
    from fxray.capture.steps import Steps
    from fxray.capture.tally import Tally
    from fxray.draft import Schedule
    from fxray.store import Row, Store

__all__ = ["Intake", "Now"]


@attrs.frozen(eq=False)
class Now:
    """One forward, what is due in it, and the rows it fills by lane."""

    forward: Forward
    due: Due
    rows: dict[int, OpenRow]


class _OfThread(threading.local):
    """Each thread that runs forwards is in one of its own.

    Attributes:
        now: the one begun last.
        numbered: the one of compiled code begun last.
    """

    now: Now | None = None
    numbered: Now | None = None


class Intake:
    """Takes tensors while a step runs; the `Receiver` of one module's capture nodes.

    An error of its own goes to `absorb` and never to the training.
    """

    # Every capture of every step passes here. What follows has few calls inside calls, and no
    # context manager or decorator but the lock: each costs as much as a capture may.

    def __init__(  # noqa: PLR0913 - what a recorder shares with it
        self,
        net: RewrittenModule,
        store: Store,
        run_id: str,
        *,
        steps: Steps,
        tally: Tally,
        lock: threading.RLock,
        absorb: Callable[[Exception], None],
        module: str = "",
    ) -> None:
        self._net, self._store, self._run_id = net, store, run_id
        self._steps, self._tally, self._absorb = steps, tally, absorb
        self._module = module
        # Gradients of tensors on other devices come on threads of autograd's own.
        self.lock = lock
        self._pid = os.getpid()
        self._closed = False
        self._sites = Sites(net, net.captures, module)
        self._every_site = {site.key: site for site in self._sites.all}
        self._streams: dict[StreamKey, Stream] = {}
        self._before: dict[str, int] = {}
        self._of_thread = _OfThread()
        self._awaited = Awaited()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every capture there was since the run began."""
        return tuple(self._every_site.values())

    def streams(self) -> tuple[Stream, ...]:
        """Return the streams begun so far."""
        return tuple(self._streams.values())

    def fail(self, error: Exception) -> None:
        """Take nothing more, because of `error`."""
        self._closed = True
        self._absorb(error)

    def close(self) -> None:
        """Take nothing more."""
        self._closed = True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let what is inside run alone, and keep its errors from the training."""
        try:
            with self.lock:
                yield
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.fail(error)

    def rests(self) -> bool:
        """Return whether nothing that runs now is recorded."""
        # A forward inside a backward is a recomputation, counted when it ran first. A forked
        # child (a DataLoader worker) that touched the store would be aborted.
        return self._closed or backward_is_running() or os.getpid() != self._pid

    # ------------------------------------------------------------------ forwards

    def begin(self, *, training: bool) -> bool:
        """Count a forward that begins; return whether its capture nodes have work to do."""
        now = self._of_thread.now = None if self.rests() else self._begin(training=training)
        if now is None:
            return False
        if not now.due.at:
            self._finish(now)
            return False
        return True

    def group(self) -> contextlib.AbstractContextManager[None]:
        """Return a context whose forwards are one step; one that is open already goes on."""
        return contextlib.nullcontext() if self._steps.grouped else self._steps.group()

    def _begin(self, *, training: bool, weights: bool = True) -> Now | None:
        now: Now | None = None
        with self._alone():
            self._follow_draft()
            forward = self._steps.begin(training=training)
            self._tally.called.add(self._module)
            if not forward.row.call:
                self._tally.steps[forward.row.phase] += 1
            transformed = function_level() is not None
            if not transformed:  # there no tensor has numbers to write
                self._seal_old(forward)
            due = self._sites.due(forward.count)
            if due is not None and transformed:
                self.transformed()
            elif due is not None:
                now = Now(forward, due, self._open_rows(forward, due))
                self._note_due(due, forward.row)
                if weights:
                    self._put_weights(now)
                elif due.weights:
                    self._tally.count(
                        "forwards compiled with parameters of somebody else's, whose weights were "
                        "not kept (torch.func.functional_call)"
                    )
        return None if self._closed else now

    def transformed(self) -> None:
        """Note that forwards run inside a torch.func transform, and are not captured."""
        with self._alone():
            self._tally.count(
                "forwards inside torch.func transforms, not captured",
                "captures inside torch.func transforms (grad, vmap) are not taken; "
                "the numbers of the transform itself are right",
            )

    def _follow_draft(self) -> None:
        captures = self._net.captures
        if captures is not self._sites.captures:
            self._sites = Sites(self._net, captures, self._module)
            self._every_site.update((site.key, site) for site in self._sites.all)

    def _note_due(self, due: Due, row: Row) -> None:
        trains = row.phase == "train"
        if trains not in due.told:
            due.told.add(trains)
            self._tally.due(s for s in due.sites if trains or s.capture.kind != "weight_grad")
        if trains:
            for site in due.weight_grads:
                self._awaited.add(site, row.step)

    def _put_weights(self, now: Now) -> None:
        for site in now.due.weights:
            for name, parameter in parameters(self._net, site):
                self._put(site.spot(name), now.rows[site.lane], parameter)

    def begin_again(self) -> None:
        """Forget what the forward begun last has handed over: it ended half-way, begins anew."""
        now = self._of_thread.now
        if now is not None and not self._closed:
            with self._alone():
                for row in now.rows.values():
                    row.clear()
                self._put_weights(now)

    def _seal_old(self, forward: Forward) -> None:
        """Write the rows whose second next forward begins, whatever they still miss."""
        # The next one counts of this module alone: others of the run have forwards between.
        before = self._before.get(forward.row.phase, 0)
        self._before[forward.row.phase] = forward.index
        for key, stream in self._streams.items():
            if key.phase == forward.row.phase and key.moment != "optimizer":
                # The rows of a step that is still open wait for its one backward.
                step = forward.row.step if self._steps.grouped else None
                stream.seal_before(before, open_step=step)

    def _open_rows(self, forward: Forward, due: Due) -> dict[int, OpenRow]:
        rows = {}
        for index, lane in due.lanes.items():
            if lane.moment != "optimizer":
                key = self._stream_key(forward.row.phase, lane.moment, lane.schedule)
                rows[index] = self._stream(key).open(forward)
        return rows

    def _stream_key(self, phase: str, moment: str, schedule: Schedule) -> StreamKey:
        return StreamKey(phase, moment, schedule, module=self._module)

    def _stream(self, key: StreamKey) -> Stream:
        stream = self._streams.get(key)
        if stream is None:
            stream = Stream(key, self._store, self._run_id, self._tally)
            self._streams[key] = stream
        return stream

    def receive(self, path: str, kinds: tuple[str, ...], value: Any) -> None:
        """Take what the op at `path` was given or gave."""
        now = self._of_thread.now
        if self._closed:
            return
        if backward_is_running():
            self._receive_again(path, kinds, value)
        elif now is not None:
            try:
                with self.lock:
                    for site, spot in now.due.handed(path, kinds):
                        row = now.rows[site.lane]
                        take = self._await_gradient if site.is_gradient else self._put
                        if type(value) is torch.Tensor:
                            take(spot, row, value)
                        else:
                            for item, tensor in tensor_items(value):
                                take(site.spot(item), row, tensor)
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self.fail(error)

    def _receive_again(self, path: str, kinds: tuple[str, ...], value: Any) -> None:
        region = recomputed_later()
        if region is not None and region.later and "grad" in kinds:
            for item, tensor in tensor_items(value):
                hook = region.later.get((id(self), path, item))
                if hook is not None and tensor.requires_grad:
                    hook(tensor)

    def finish(self) -> None:
        """Note that the forward begun last has returned: all its outputs have come."""
        now = self._of_thread.now
        if now is not None and not self._closed and not backward_is_running():
            self._finish(now)

    def _finish(self, now: Now) -> None:
        with self._alone():
            for row in now.rows.values():
                row.all_expected = True
            self._seal_complete()

    def _seal_complete(self) -> None:
        for stream in self._streams.values():
            stream.seal_complete()

    def _put(self, spot: Spot, row: OpenRow, tensor: torch.Tensor) -> None:
        try:
            spot.take(row.kept, tensor)
        except Exception as error:  # noqa: BLE001 - a user's selection may raise anything
            self._tally.failed(spot.site, error)

    # ------------------------------------------------------------------ gradients

    def _await_gradient(self, spot: Spot, row: OpenRow, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            row.expected.add(spot)
            self._hook(spot, row, tensor)
            return
        region = recomputed_later()
        if region is not None and region.runs_again:
            # A reentrant checkpoint runs without autograd first; the tensor that has the
            # gradient is the one that its backward computes again.
            row.expected.add(spot)
            later = functools.partial(self._hook, spot, row)
            region.later[id(self), spot.site.key[0], spot.item] = later

    def _hook(self, spot: Spot, row: OpenRow, tensor: torch.Tensor) -> None:
        hook = hook_gradient(tensor, functools.partial(self._take_gradient, spot, row))
        if hook is not None and tensor.is_leaf:
            row.hooks.append(hook)  # it outlives its backward, and the hook would come again

    def _take_gradient(self, spot: Spot, row: OpenRow, gradient: torch.Tensor | None) -> None:
        if self._closed:
            return
        try:
            with self.lock:
                if gradient is None:  # of `chunk`, say, another part had one: this one has none
                    row.expected.discard(spot)
                    self._came(row)
                elif self._is_expected(spot, row):
                    self._put(spot, row, gradient)
                    self._came(row)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.fail(error)

    def _is_expected(self, spot: Spot, row: OpenRow) -> bool:
        """Return whether a gradient is the one that its row waits for, from now on no more."""
        if spot not in row.expected:
            self._tally.count(
                "further gradients through a forward that had its own already",
                "a second backward went through one forward; the first gradients are kept",
            )
            return False
        if row.sealed:
            self._tally.count(
                "gradients that came after their row was written",
                "gradients came after the second next forward, when their row was written already; "
                "run each backward before that, or see run.notes for how many were lost",
            )
            return False
        row.expected.discard(spot)
        return True

    def _came(self, row: OpenRow) -> None:
        if not row.expected and row.all_expected:
            self._seal_complete()

    # ------------------------------------------------------------------ optimizers

    def stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Take the gradients that an optimizer has just used, as it used them.

        After the step, not before: a fused optimizer under GradScaler unscales inside
        it, and a closure recomputes them inside it.
        """
        ours = not self._closed and self._awaited and os.getpid() == self._pid
        if ours and not _skipped(optimizer):
            with self._alone():
                self._take_used(optimizer)

    def _take_used(self, optimizer: torch.optim.Optimizer) -> None:
        rows: dict[int, OpenRow] = {}
        place: Row | None = None
        step = max(self._steps.step - 1, 0)
        for site, name, gradient in self._awaited.used(self._net, optimizer, step):
            place = place or self._steps.now("optimizer")
            row = rows.get(site.lane)
            if row is None:
                row = rows[site.lane] = OpenRow(place)
            self._put(site.spot(name), row, gradient)
        for index, row in rows.items():
            schedule = self._sites.lanes[index].schedule
            self._stream(self._stream_key("train", "optimizer", schedule)).write(row)


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer found an Inf and left the parameters as they were."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
