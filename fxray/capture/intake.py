"""From what capture nodes hand over, and what optimizers used, to rows."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import attrs

from fxray.capture.rows import OpenRow, Stream, StreamKey
from fxray.capture.sites import Due, Site, Sites, array_name
from fxray.capture.steps import Forward
from fxray.torch_private import backward_is_running, function_level
from fxray.tracing.regions import recomputed_later
from fxray.tracing.results import tensor_items

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fxray.capture.rewrite import RewrittenModule
    from fxray.capture.steps import Steps
    from fxray.capture.tally import Tally
    from fxray.store import Row, Store

__all__ = ["Intake"]


P = ParamSpec("P")
T = TypeVar("T")


def _absorbed(
    method: Callable[Concatenate[Intake, P], T],
) -> Callable[Concatenate[Intake, P], T | None]:
    """Let a method run alone, and keep its errors from the training."""

    @functools.wraps(method)
    def run(self: Intake, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            with self.lock:
                return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.fail(error)
            return None

    return run


@attrs.frozen(eq=False)
class _Now:
    """The forward that runs now, what is due in it, and the rows it fills by lane."""

    forward: Forward
    due: Due
    rows: dict[int, OpenRow]


class Intake:
    """Takes tensors while a step runs; the `Receiver` of one module's capture nodes.

    An error of its own goes to `absorb` and never to the training.
    """

    def __init__(  # noqa: PLR0913 - what a recorder shares with it
        self,
        net: RewrittenModule,
        store: Store,
        run_id: str,
        *,
        steps: Steps,
        tally: Tally,
        absorb: Callable[[Exception], None],
    ) -> None:
        self._net, self._store, self._run_id = net, store, run_id
        self._steps, self._tally, self._absorb = steps, tally, absorb
        # Gradients of tensors on other devices come on threads of autograd's own.
        self.lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._sites = Sites(net, net.captures)
        self._every_site = {site.key: site for site in self._sites.all}
        self._streams: dict[StreamKey, Stream] = {}
        # Each thread that runs forwards is in one of its own.
        self._of_thread = threading.local()
        self._awaited: dict[tuple[tuple[str, str], str], Site] = {}

    @property
    def _now(self) -> _Now | None:
        now: _Now | None = getattr(self._of_thread, "now", None)
        return now

    @_now.setter
    def _now(self, now: _Now | None) -> None:
        self._of_thread.now = now

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

    # ------------------------------------------------------------------ forwards

    def begin(self, *, training: bool) -> bool:
        """Count a forward that begins; return whether its capture nodes have work to do."""
        # A forward inside a backward is a recomputation, counted when it ran first. A forked
        # child (a DataLoader worker) that touched the store would be aborted.
        self._now = None
        if self._closed or backward_is_running() or os.getpid() != self._pid:
            return False
        self._now = self._begin(training=training)
        if self._now is None:
            return False
        if not self._now.due.at:
            self.finish()
            return False
        return True

    def group(self) -> contextlib.AbstractContextManager[None]:
        """Return a context whose forwards are one step; one that is open already goes on."""
        return contextlib.nullcontext() if self._steps.grouped else self._steps.group()

    @_absorbed
    def _begin(self, *, training: bool) -> _Now | None:
        if self._net.captures is not self._sites.captures:
            self._sites = Sites(self._net, self._net.captures)
            self._every_site.update((site.key, site) for site in self._sites.all)
        forward = self._steps.begin(training=training)
        if not forward.row.call:
            self._tally.steps[forward.row.phase] += 1
        self._seal_old(forward)
        due = self._sites.due(forward.count)
        if due is None or self._transformed():
            return None
        now = _Now(forward, due, self._open_rows(forward, due))
        trains = forward.row.phase == "train"
        for site in due.sites:
            if site.capture.kind != "weight_grad" or trains:
                self._tally.due(site)
            if site.capture.kind == "weight_grad" and trains:
                self._awaited.update(((site.key, name), site) for name in site.op.parameters)
        self._put_weights(now)
        return now

    def _put_weights(self, now: _Now) -> None:
        for site in now.due.sites:
            if site.capture.kind == "weight":
                for name, parameter in site.parameters(self._net):
                    self._put(site, now.rows[site.lane], parameter, parameter=name)

    def begin_again(self) -> None:
        """Forget what the forward begun last has handed over: it ended half-way, begins anew."""
        if self._now is not None and not self._closed:
            self._begin_again(self._now)

    @_absorbed
    def _begin_again(self, now: _Now) -> None:
        for row in now.rows.values():
            row.clear()
        self._put_weights(now)

    def _seal_old(self, forward: Forward) -> None:
        """Write the rows whose second next forward begins, whatever they still miss."""
        for key, stream in self._streams.items():
            if key.phase == forward.row.phase and key.moment != "optimizer":
                # The rows of a step that is still open wait for its one backward.
                step = forward.row.step if self._steps.grouped else None
                stream.seal_before(forward.index - 1, open_step=step)

    def _transformed(self) -> bool:
        inside = function_level() is not None
        if inside:
            self._tally.count(
                "forwards inside torch.func transforms, not captured",
                "captures inside torch.func transforms (grad, vmap) are not taken; "
                "the numbers of the transform itself are right",
            )
        return inside

    def _open_rows(self, forward: Forward, due: Due) -> dict[int, OpenRow]:
        rows = {}
        for index, lane in due.lanes.items():
            if lane.moment != "optimizer":
                key = StreamKey(forward.row.phase, lane.moment, lane.schedule)
                rows[index] = self._stream(key).open(forward)
        return rows

    def _stream(self, key: StreamKey) -> Stream:
        if key not in self._streams:
            self._streams[key] = Stream(key, self._store, self._run_id)
        return self._streams[key]

    def receive(self, path: str, kinds: tuple[str, ...], value: Any) -> None:
        """Take what the op at `path` was given or gave."""
        if self._closed:
            return
        if backward_is_running():
            region = recomputed_later()
            if region is not None and region.later and "grad" in kinds:
                for item, tensor in tensor_items(value):
                    take = region.later.get((id(self), path, item))
                    if take is not None and tensor.requires_grad:
                        take(tensor)
        elif self._now is not None:
            self._receive(self._now, path, kinds, value)

    @_absorbed
    def _receive(self, now: _Now, path: str, kinds: tuple[str, ...], value: Any) -> None:
        for kind in kinds:
            site = now.due.at.get((path, kind))
            if site is None:
                continue
            for item, tensor in tensor_items(value):
                if kind == "grad":
                    self._await_gradient(site, now.rows[site.lane], tensor, item)
                else:
                    self._put(site, now.rows[site.lane], tensor, item=item)

    def finish(self) -> None:
        """Note that the forward begun last has returned: all its outputs have come."""
        if self._now is not None and not self._closed and not backward_is_running():
            self._finish(self._now)

    @_absorbed
    def _finish(self, now: _Now) -> None:
        for row in now.rows.values():
            row.all_expected = True
        self._seal_complete()

    def _seal_complete(self) -> None:
        for stream in self._streams.values():
            stream.seal_complete()

    def _put(self, site: Site, row: OpenRow, tensor: torch.Tensor, **where: str) -> None:
        self._tally.reached(site)
        try:
            for info, record in site.records(tensor, **where):
                row.put(info, record)
        except Exception as error:  # noqa: BLE001 - a user's selection may raise anything
            self._tally.failed(site, error)
        else:
            self._tally.kept(site)

    # ------------------------------------------------------------------ gradients

    def _await_gradient(self, site: Site, row: OpenRow, tensor: torch.Tensor, item: str) -> None:
        self._tally.reached(site)
        name = array_name(*site.key, item)
        if tensor.requires_grad:
            row.expected.add(name)
            self._hook(site, row, name, item, tensor)
            return
        region = recomputed_later()
        if region is not None and region.runs_again:
            # A reentrant checkpoint runs without autograd first; the tensor that has the
            # gradient is the one that its backward computes again.
            row.expected.add(name)
            later = functools.partial(self._hook, site, row, name, item)
            region.later[id(self), site.key[0], item] = later

    def _hook(self, site: Site, row: OpenRow, name: str, item: str, tensor: torch.Tensor) -> None:
        def take(gradient: torch.Tensor) -> None:
            if not self._closed:
                self._take_gradient(site, row, gradient, name=name, item=item)

        hook = tensor.register_hook(take)
        if tensor.is_leaf:  # it outlives its backward, and the hook would come again
            row.hooks.append(hook)

    @_absorbed
    def _take_gradient(
        self, site: Site, row: OpenRow, gradient: torch.Tensor, *, name: str, item: str
    ) -> None:
        if name not in row.expected:
            self._tally.count(
                "further gradients through a forward that had its own already",
                "a second backward went through one forward; the first gradients are kept",
            )
        elif row.sealed:
            self._tally.count(
                "gradients that came after their row was written",
                "gradients came after the second next forward, when their row was written already; "
                "run each backward before that, or see run.notes for how many were lost",
            )
        else:
            row.expected.discard(name)
            self._put(site, row, gradient, item=item)
            if row.complete:
                self._seal_complete()

    # ------------------------------------------------------------------ optimizers

    def stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Take the gradients that an optimizer has just used, as it used them.

        After the step, not before: a fused optimizer under GradScaler unscales inside
        it, and a closure recomputes them inside it.
        """
        ours = not self._closed and self._awaited and os.getpid() == self._pid
        if ours and not _skipped(optimizer):
            self._take_used(optimizer)

    @_absorbed
    def _take_used(self, optimizer: torch.optim.Optimizer) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        rows: dict[int, OpenRow] = {}
        place: Row | None = None
        # Parameter by parameter: weights and biases may have optimizers of their own.
        for (key, name), site in [*self._awaited.items()]:
            p = dict(site.parameters(self._net)).get(name)
            if p is not None and id(p) in owned and p.grad is not None:
                del self._awaited[key, name]
                place = place or self._steps.now("optimizer")
                row = rows.setdefault(site.lane, OpenRow(place))
                self._put(site, row, p.grad, parameter=name)
        for index, row in rows.items():
            schedule = self._sites.lanes[index].schedule
            self._stream(StreamKey("train", "optimizer", schedule)).write(row)

    def close(self) -> None:
        """Take nothing more."""
        self._closed = True


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer found an Inf and left the parameters as they were."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
