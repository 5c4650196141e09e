"""What compiled code hands over: its forwards go by number, for no Python of ours frames them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxray.capture.intake import Intake, Now
from fxray.torch_private import backward_is_running

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from fxray.capture.spots import Kept, Spot

__all__ = ["NumberedIntake"]

_REMEMBERED = 64
"""Numbered forwards that stay known when their rows are written, so that what comes late counts."""


class NumberedIntake(Intake):
    """An intake that also takes what the ops in a compiled graph hand over.

    Nothing that they call raises into the training.
    """

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        self._numbered: dict[int, Now] = {}
        self._numbers = 0

    def due_next(self, *, training: bool) -> str:
        """Return the name of what nodes are to hand over in a forward that begins now.

        `""` for nothing. Nothing is counted.

        Args:
            training: the mode of the module.
        """
        name = ""
        if not self.rests():
            with self._alone():
                self._follow_draft()
                name = self._sites.name_due(self._steps.peek(training=training))
        return name

    def captures_due(self, name: str) -> frozenset[tuple[str, str]]:
        """Return path and kind of the captures that `due_next` calls so."""
        with self.lock:
            self._follow_draft()
            return self._sites.named(name)

    def begin_numbered(self, *, training: bool, due: str, weights: bool = True) -> int:
        """Count a forward that begins; return its number, -1 where nobody takes anything.

        Args:
            training: the mode of the module.
            due: the name of what it hands over.
            weights: whether the module's parameters are those of the forward.
        """
        if self.rests():
            return -1
        before = self._of_thread.numbered
        if before is not None and not all(row.all_expected for row in before.rows.values()):
            self._finish(before)  # it ended half-way, by an error, and nobody said so
        now = self._of_thread.numbered = self._begin(training=training, weights=weights)
        if self._closed:
            return -1
        with self._alone():
            self._numbers += 1
            number = self._numbers - 1
            if now is not None and not now.due.at:
                self._finish(now)
            elif now is not None:
                self._numbered[number] = now
                self._forget_old()
                if not self._sites.covers(due, now.due):
                    self._tally.count(
                        "forwards that ran compiled for other captures than were due in them",
                        "a compiled function ran forwards that it was not compiled for, such as "
                        "a second call of the module; what was due in them alone is not kept",
                    )
        return -1 if self._closed else number

    def _forget_old(self) -> None:
        for number in [*self._numbered][:-_REMEMBERED]:
            if not all(row.sealed for row in self._numbered[number].rows.values()):
                return
            del self._numbered[number]

    def take(  # noqa: PLR0913 - what a record is
        self,
        number: int,
        path: str,
        kind: str,
        *,
        item: str,
        fields: Mapping[str, torch.Tensor],
        size: tuple[int, ...],
    ) -> None:
        """Take what a selection kept of a tensor in the forward of that number.

        Args:
            number: of the forward.
            path: of the op.
            kind: of the capture.
            item: which of the tensors that the op gave.
            fields: tensors that nobody else writes to.
            size: of the tensor that they were selected of.
        """
        self._take(number, path, kind, item, lambda spot, kept: spot.put(kept, fields, size))

    def take_whole(
        self, number: int, path: str, kind: str, *, item: str, tensor: torch.Tensor
    ) -> None:
        """Take a tensor in the forward of that number; the selection runs here.

        Args:
            number: of the forward.
            path: of the op.
            kind: of the capture.
            item: which of the tensors that the op gave.
            tensor: it may be written to afterwards.
        """
        self._take(number, path, kind, item, lambda spot, kept: spot.take(kept, tensor))

    def _take(
        self,
        number: int,
        path: str,
        kind: str,
        item: str,
        put: Callable[[Spot, Kept], None],
    ) -> None:
        if self._closed:
            return
        try:
            with self.lock:
                now = self._numbered.get(number)
                site = now.due.at.get((path, kind)) if now is not None else None
                if now is None or site is None:
                    return
                spot, row = site.spot(item), now.rows[site.lane]
                is_gradient = kind == "grad"
                if not (self._is_expected(spot, row) if is_gradient else not backward_is_running()):
                    return
                try:
                    put(spot, row.kept)
                except Exception as error:  # noqa: BLE001 - a user's selection may raise anything
                    self._tally.failed(site, error)
                if is_gradient:
                    self._came(row)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.fail(error)

    def await_gradients(self, number: int, awaited: Sequence[tuple[str, str]]) -> None:
        """Note (path, item) of gradients that may come for the forward of that number."""
        now = self._numbered.get(number)
        if now is not None and not self.rests():
            with self._alone():
                for path, item in awaited:
                    site = now.due.at.get((path, "grad"))
                    if site is not None:
                        now.rows[site.lane].expected.add(site.spot(item))

    def returned(self, number: int) -> None:
        """Note that the forward of that number has handed over all but its gradients."""
        now = self._numbered.get(number)
        if now is not None and not self.rests():
            self._finish(now)
