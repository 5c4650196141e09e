"""Names of torch, replaced as long as any writer on any thread asks for it."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

__all__ = ["OfThread", "Patch", "Replaced", "asked"]

Patch = tuple[Any, str, Any]
"""Whose name is replaced (a class, a module, or the globals of one), the name, by what."""

_LOCK = threading.RLock()


class OfThread:
    """The writers that asked for a patch on the thread that runs now, as one writer.

    Where one works inside another (a rewritten module in a model that is traced), the
    innermost is asked first, and what it runs asks the next.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def present(self) -> tuple[Any, ...]:
        """The writers of this thread, innermost first."""
        found: tuple[Any, ...] = getattr(self._local, "writers", ())
        return found

    @present.setter
    def present(self, writers: tuple[Any, ...]) -> None:
        self._local.writers = writers

    @property
    def writing(self) -> bool:
        """Whether one of them takes nodes now."""
        return any(writer.writing for writer in self.present)

    @property
    def unrolls(self) -> bool:
        """Whether a checkpoint's function is to run here; else the checkpoint itself runs."""
        return bool(getattr(self.innermost, "unrolls", True))

    @property
    def innermost(self) -> Any:
        """The first of them that takes nodes now."""
        return next(writer for writer in self.present if writer.writing)

    def call_module(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        """Run a module, each of them around the next."""
        run = original
        for writer in reversed([w for w in self.present if w.writing]):
            run = functools.partial(_call_module, writer, run)
        return run(module, *args, **kwargs)

    def call_object(
        self, target: Any, name: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run something that is no plain function, each of them around the next."""
        for writer in reversed([w for w in self.present if w.writing]):
            run = functools.partial(_call_object, writer, target, name, run)
        return run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.innermost, name)


def _call_module(writer: Any, run: Any, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return writer.call_module(module, run, args, kwargs)


def _call_object(
    writer: Any, target: Any, name: str, run: Any, /, *args: Any, **kwargs: Any
) -> Any:
    return writer.call_object(target, name, run, args, kwargs)


class Replaced:
    """Names of torch that one patch function replaces as long as any writer asks for it.

    Threads come and go in any order, so nothing is put back before the last writer has
    left, and what stands in a name's place asks which writers its own thread has.

    Args:
        patches: yields what to replace by what; is given the writers to ask.
        grows: whether it may yield more names from one time to the next.
    """

    def __init__(self, patches: Callable[[Any], Iterator[Patch]], *, grows: bool = False) -> None:
        self._patches, self._grows = patches, grows
        self._writers = OfThread()
        self._users = 0
        self._names: dict[tuple[int, str], tuple[Any, str, Any, Any]] = {}

    def enter(self, writer: Any) -> None:
        """Replace the names, and let `writer` be asked on this thread."""
        with _LOCK:
            if not self._users or self._grows:
                self._put_in_place()
            self._users += 1
        self._writers.present = (writer, *self._writers.present)

    def leave(self, writer: Any) -> None:
        """Ask `writer` no more; put the names back if it was the last."""
        self._writers.present = tuple(w for w in self._writers.present if w is not writer)
        with _LOCK:
            self._users -= 1
            if not self._users:
                self._put_back()

    def _put_in_place(self) -> None:
        for owner, name, before, ours in self._names.values():
            if _named(owner)[name] is before:
                _set(owner, name, ours)
        for owner, name, ours in self._patches(self._writers):
            if (id(owner), name) not in self._names:
                before = _named(owner)[name]
                self._names[id(owner), name] = owner, name, before, ours
                _set(owner, name, ours)

    def _put_back(self) -> None:
        for key, (owner, name, before, ours) in [*self._names.items()]:
            # Else another library patched over us. When it takes its own away, ours, which does
            # nothing without a writer, is there again, and the next to leave takes it away.
            if _named(owner)[name] is ours:
                _set(owner, name, before)
                del self._names[key]


def _named(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, dict) else vars(owner)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


@contextlib.contextmanager
def asked(writer: Any, patches: tuple[Replaced, ...]) -> Iterator[None]:
    """Let `writer` be asked by these patches, on this thread, inside the context."""
    entered: list[Replaced] = []
    try:
        for patch in patches:
            patch.enter(writer)
            entered.append(patch)
        yield
    finally:
        for patch in reversed(entered):
            patch.leave(writer)
