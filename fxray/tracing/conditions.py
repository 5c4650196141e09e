"""Asking before each call whether everything is as it was when a graph was traced."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import torch

from fxray.tracing.attributes import MISSING, autocast_now, by_identity
from fxray.tracing.grounds import HOOKS, Change, Part, State
from fxray.tracing.links import COLUMNS, Find, Links
from fxray.tracing.snapshots import ABSENT, Identities, Kind, same, snapshot, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fxray.tracing.attributes import Read

__all__ = ["Change", "State", "Watch"]


class Watch:
    """A state and the model it was of, linked once, so that asking is cheap enough for each call.

    What the links compare is identity, by loops that run in C. Where something is another
    object the state itself decides, item by item: a float set anew to the number it had,
    or a module replaced by its equal, is no change.
    """

    def __init__(self, model: nn.Module, state: State) -> None:
        self.model, self.state = model, state
        self._checks = [*_checks(state)]
        # What is known by identity alone is to be what it is now, right after the trace.
        self._local: dict[tuple[str, str], Identities] = {}
        find = Find(model, self._local)
        for read in state.reads:
            if by_identity(read):
                find.note(read)
        self._last = 0
        self._links: Links | None = None

    def changed(self, *, modes: bool = True) -> Change | None:
        """Return None if everything is as it was when the graph was traced, else what is not.

        Args:
            modes: whether to ask for autograd, inference mode and autocast as well.
        """
        links = self._links
        if links is not None and links.hold(modes=modes):
            return None
        # What differed last time most likely still does: a graph of other training flags.
        find = Find(self.model, self._local)
        checks = self._checks
        for index in (self._last, *range(len(checks))):
            if not (modes or index):
                continue
            change: Change | None = checks[index](find)
            if change is not None:
                self._last = index
                return change
        self._links = Links(find, self.state)
        return None


def _checks(state: State) -> Iterator[Any]:
    yield lambda _: _modes_changed(state)
    for part in state.parts:
        yield lambda find, part=part: _part_changed(part, find)
    for read in state.reads:
        yield lambda find, read=read: _read_changed(read, find)
    for group in state.ties:
        yield lambda find, group=group: _untied(group, find)
    for what in ("dtype", "device", "requires_grad"):
        for path, was in getattr(state, COLUMNS[what]) or ():
            yield lambda find, path=path, was=was, what=what: _tensor_changed(path, what, was, find)


def _modes_changed(state: State) -> Change | None:
    """Compare the modes that belong to no module."""
    for name, was, is_on in (
        ("autograd", state.grad, torch.is_grad_enabled),
        ("inference mode", state.inference, torch.is_inference_mode_enabled),
    ):
        if was is not None and is_on() != was:
            return _was(name, "on" if was else "off", "off" if was else "on")
    casts = autocast_now()
    if state.autocast is not None and casts != state.autocast:
        return _was("autocast", _autocast_text(state.autocast), _autocast_text(casts))
    return None


def _autocast_text(modes: Any) -> str:
    on = [f"{str(dtype).removeprefix('torch.')} on {dev}" for dev, dtype in modes if dtype]
    return f"on ({', '.join(on)})" if on else "off"


def _was(what: str, then: str, now: str, *, root: bool = False) -> Change:
    return Change(f"{what} was {then} when the model was traced and is {now} now", root)


def _name(path: str) -> str:
    return f"module {path!r}" if path else "the model"


def _part_changed(part: Part, find: Find) -> Change | None:
    module = find.module(part.path)
    if module is None:
        return Change(f"{_name(part.path)} was there when the model was traced and is gone now")
    now = Part.of(part.path, module, called=part.called)
    if now == part:
        return None
    name, root = _name(part.path), not part.path
    if now.cls != part.cls:
        was, is_now = _short_names(part.cls, now.cls)
        return _class_changed(name, was, is_now, root=root)
    if now.forward != part.forward:
        what = "was set on" if now.forward else "is no longer set on"
        return Change(f"a forward of its own {what} {name} after the trace", root)
    if now.hooks != part.hooks:
        before, after = collections.Counter(dict(part.hooks)), collections.Counter(dict(now.hooks))
        more = [f"a {HOOKS[hook]} was added to" for hook in HOOKS if after[hook] > before[hook]]
        less = [f"a {HOOKS[hook]} was taken off" for hook in HOOKS if after[hook] < before[hook]]
        where = repr(part.path) if part.path else name
        return Change(f"{(more + less)[0]} {where} after the trace", root)
    return _children_changed(part, now)


def _children_changed(part: Part, now: Part) -> Change | None:
    before, after = dict(part.children), dict(now.children)
    for child, was in before.items():
        path = f"{part.path}.{child}" if part.path else child
        if child not in after:
            return Change(f"module {path!r} was there when the model was traced and is gone now")
        if after[child] != was:
            return _class_changed(f"module {path!r}", *_short_names(was, after[child]))
    for child in after:
        if child not in before:
            path = f"{part.path}.{child}" if part.path else child
            return Change(f"module {path!r} was added after the trace")
    return Change(f"the parts of {_name(part.path)} stand in another order now")


def _class_changed(name: str, was: str, now: str, *, root: bool = False) -> Change:
    return Change(f"{name} is a {now} now and was a {was} when the model was traced", root)


def _short_names(one: str, other: str) -> tuple[str, str]:
    short = one.rpartition(".")[2], other.rpartition(".")[2]
    return short if short[0] != short[1] else (one, other)


def _read_changed(read: Read, find: Find) -> Change | None:
    value = find.value(read)
    now = ABSENT if value is MISSING else snapshot(value)
    if same(read.value, now):
        first = find.first(read)
        if first is None or first.are(Identities(value)):
            return None
    if read.name == "training" and isinstance(value, bool):
        mode = {True: "in train mode", False: "in eval mode"}
        what = f"module {read.path!r}" if read.path else "the model"
        words = f"{what} was {mode[not value]} when traced and is {mode[value]} now"
    else:
        where = f"{read.path}.{read.name}" if read.path else read.name
        text = text_of(now) if now != Kind("") else text_of(Kind(f"a {type(value).__qualname__}"))
        was = text_of(read.value)
        is_now = f"another {text}" if text == was else text
        words = f"attribute {where!r} was {was} when the model was traced and is {is_now} now"
    return Change(f"{words}, and the forward reads that")


def _untied(group: tuple[str, ...], find: Find) -> Change | None:
    first = find.tensor(group[0])
    for path in group[1:]:
        if find.tensor(path) is not first:
            return Change(f"{path!r} was tied to {group[0]!r} when the model was traced, not now")
    return None


def _tensor_changed(path: str, what: str, was: Any, find: Find) -> Change | None:
    tensor = find.tensor(path)
    if tensor is None:
        return Change(f"{path!r} was there when the model was traced and is gone now")
    now = getattr(tensor, what)
    if now == was:
        return None
    change = _was(f"{what} of {path!r}", str(was), str(now))
    return Change(f"{change}, and the forward looks at the {what} of a tensor")
