"""Which Python state a forward reads, and what it was: attributes, settings, autograd's mode."""

from __future__ import annotations

import collections
import contextlib
import inspect
import os
import sys
import types
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.torch_private import COMPILED_CALL
from fxray.tracing.snapshots import (
    ABSENT,
    TENSOR,
    UNKNOWN,
    Contents,
    Identities,
    Kind,
    is_complete,
    is_plain_object,
    same,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MISSING", "Read", "Reads", "autocast_now", "by_identity", "noted_reads"]

_OF_TORCH = (frozenset(vars(nn.Module())) | {COMPILED_CALL}) - {"training"}
"""Attributes that nn.Module keeps for itself; of those only `training` steers a forward."""

_QUERIES = (
    ("grad", "is_grad_enabled"),
    ("inference", "is_inference_mode_enabled"),
    *(
        ("autocast", name)
        for name in (
            *("is_autocast_enabled", "get_autocast_dtype", "is_autocast_cpu_enabled"),
            *("get_autocast_cpu_dtype", "get_autocast_gpu_dtype", "is_autocast_cache_enabled"),
        )
        if hasattr(torch, name)
    ),
)
_TORCH_FILES = torch.__path__[0] + os.sep
_DEVICES = ("cpu", "cuda")
_DEEPEST = 3
_CONTAINERS = (list, tuple, set, frozenset, dict, collections.OrderedDict, collections.deque)
MISSING: Any = object()
"""What stands for an attribute that is not there."""


@attrs.frozen
class Read:
    """One attribute that a forward read: `self.training`, `self.tau`, `self.config.scale`.

    Attributes:
        path: of the module, the root as `""`.
        name: of the attribute; that of an object on the module as `"config.scale"`.
        value: what it was: a plain value, else what `snapshot` gives for it.
    """

    path: str
    name: str
    value: Any


def by_identity(read: Read) -> bool:
    """Return whether a read's value is plain data only in part: the rest is known by identity."""
    seen = read.value
    if seen == TENSOR:  # on a module, a graph finds it by its name
        return "." in read.name
    if isinstance(seen, Kind):
        return seen.itself or seen.is_local
    return isinstance(seen, Contents) and not is_complete(seen)


def autocast_now() -> tuple[tuple[str, torch.dtype | None], ...]:
    """Return the dtype that autocast casts to, None where it is off, by device type."""
    return tuple(
        (device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
        for device in _DEVICES
    )


class Reads:
    """What one forward read of Python's state.

    Attributes:
        asked: which of `"grad"`, `"inference"`, `"autocast"` and `"compiler"` it asked for.
        grad: whether autograd was on when it began.
        inference: whether inference mode was.
        autocast: `autocast_now()` when it began.
    """

    def __init__(self, model: nn.Module) -> None:
        self.asked: set[str] = set()
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.autocast = autocast_now()
        modules = reversed([*model.named_modules()])
        self._paths = {id(module): (module, path) for path, module in modules}
        # As it was before the forward: what the forward sets first and then reads is its own.
        self._before = {
            key: dict(vars(module))
            for key, (module, _) in self._paths.items()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        self._found: dict[tuple[int, str], Any] = {}
        self._objects: dict[int, tuple[Any, dict[tuple[int, str], None]]] = {}
        self._on_objects: dict[tuple[int, str], Any] = {}
        self._fragile: list[tuple[Any, tuple[int, str], Any, Any, Identities]] = []

    @property
    def classes(self) -> set[type[nn.Module]]:
        """The classes of the modules, leaves included: a parent reads their settings too."""
        return {type(module) for key, (module, _) in self._paths.items() if key in self._before}

    def all(self) -> tuple[Read, ...]:
        """Return every attribute read, one on a shared object once for each place it was read."""
        found = [
            Read(self._paths[key][1], name, value)
            for (key, name), value in self._found.items()
            if value is not UNKNOWN
        ]
        for (key, name), value in self._on_objects.items():
            if value is not UNKNOWN:
                places = self._objects[key][1]
                found += [Read(self._paths[m][1], f"{at}.{name}", value) for m, at in places]
        return tuple(found)

    # ------------------------------------------------------------------ noting

    def on_module(self, module: Any, name: str, value: Any) -> Any:
        """Note that `module.name` was read; return the object to look into next, if any."""
        key = id(module), name
        if key[0] not in self._before:
            return None
        before = self._before[key[0]].get(name, MISSING)
        if key not in self._found:
            inherited = before is MISSING and _of_class(module, name, value)
            mine = inherited or (before is not MISSING and before is value)
            self._found[key] = snapshot(value) if mine else UNKNOWN
            self._watch_over(self._found, key, module, value)
        if before is value and is_plain_object(value):
            return self._object_at(value, key)
        return None

    def not_on_module(self, module: Any, name: str) -> None:
        """Note that `module.name` was looked for and is no plain attribute."""
        key = id(module), name
        if key[0] not in self._before or key in self._found:
            return
        for registry in ("_parameters", "_buffers", "_modules"):
            held = self._before[key[0]].get(registry, {})
            if name in held:
                value = held[name]
                known = UNKNOWN if isinstance(value, nn.Module) else TENSOR
                self._found[key] = None if value is None else known
                return
        inside = inspect.getattr_static(type(module), name, MISSING)
        self._found[key] = ABSENT if inside is MISSING else UNKNOWN

    def _watch_over(self, noted: Any, key: tuple[int, str], holder: Any, value: Any) -> None:
        """Remember what only holds if the forward leaves it alone, for `settle`."""
        seen = noted[key]
        by_name = seen == TENSOR and noted is self._found
        if seen is UNKNOWN or by_name or _is_sturdy(value):
            return
        if _held(holder, key[1]) is not value:  # computed
            noted[key] = UNKNOWN
        else:
            self._fragile.append((noted, key, holder, seen, Identities(value)))

    def settle(self) -> None:
        """Forget what the forward set anew or changed: the graph would not fit a second time."""
        for noted, key, holder, seen, first in self._fragile:
            now = _held(holder, key[1])
            held = now is first.objects[0] and first.are(Identities(now))
            if not held or not same(seen, snapshot(now)):
                noted[key] = UNKNOWN
        self._fragile.clear()

    def _object_at(self, value: Any, place: tuple[int, str]) -> Any:
        known, places = self._objects.setdefault(id(value), (value, {}))
        places[place] = None
        return known if len(places) == 1 else None

    def on_object(self, holder: Any, name: str, value: Any) -> Any:
        """Note that an attribute of a noted object was read; return the one to look into next."""
        key = id(holder), name
        if key[0] not in self._objects:
            return None
        fields = object.__getattribute__(holder, "__dict__") if _has_dict(holder) else {}
        if key not in self._on_objects:
            computed = isinstance(inspect.getattr_static(type(holder), name, None), property)
            method = callable(value) and name not in fields
            seen = ABSENT if value is MISSING else snapshot(value)
            self._on_objects[key] = UNKNOWN if computed or method else seen
            self._watch_over(self._on_objects, key, holder, value)
        if name not in fields or not is_plain_object(value):
            return None
        first = None
        for module, at in [*self._objects[key[0]][1]]:
            if at.count(".") + 2 <= _DEEPEST:
                first = self._object_at(value, (module, f"{at}.{name}")) or first
        return first


def _held(holder: Any, name: str) -> Any:
    """Return the attribute that lies on an object or its class; nothing is computed."""
    fields = object.__getattribute__(holder, "__dict__") if _has_dict(holder) else {}
    if name in fields:
        return fields[name]
    found = inspect.getattr_static(type(holder), name, MISSING)
    is_slot = isinstance(found, types.MemberDescriptorType)
    return found.__get__(holder) if is_slot else found


def _is_sturdy(value: Any, depth: int = 3) -> bool:
    """Return whether `value` is plain data throughout, which a trace reads as it was."""
    cls = type(value)
    if cls in _CONTAINERS:
        items = value.values() if isinstance(value, dict) else value
        return depth > 0 and len(items) <= 1000 and all(_is_sturdy(i, depth - 1) for i in items)
    seen = snapshot(value, 0)
    return seen != TENSOR and not isinstance(seen, Contents) and not getattr(seen, "itself", False)


def _has_dict(value: Any) -> bool:
    return type(value).__dictoffset__ != 0


def _of_class(module: nn.Module, name: str, value: Any) -> bool:
    """Return whether `value` is a plain attribute of the module's class, not a method of it."""
    for cls in type(module).__mro__:
        if name in vars(cls):
            ours = cls is not nn.Module and not cls.__module__.startswith("torch.")
            return ours and vars(cls)[name] is value and not callable(value)
    return False


@contextlib.contextmanager
def noted_reads(model: nn.Module, writer: Any) -> Iterator[Reads]:
    """Fill a `Reads` while `writer` writes, that is on its own thread and outside of ops.

    A graph holds such a value as it was; a leaf module reads its own at every call.
    """
    reads = Reads(model)
    with contextlib.ExitStack() as undo:
        patches = _Patches(undo)

        def look_into(found: Any) -> None:
            if found is not None:
                patches.getattribute(type(found), lambda get: _reading(get, writer, note_object))

        def note_module(module: Any, name: str, value: Any) -> None:
            if name in _OF_TORCH:
                return
            if value is MISSING:
                reads.not_on_module(module, name)
            else:
                look_into(reads.on_module(module, name, value))

        def note_object(holder: Any, name: str, value: Any) -> None:
            look_into(reads.on_object(holder, name, value))

        for cls in reads.classes:
            patches.getattribute(cls, lambda get: _reading(get, writer, note_module))
        for what, name in _QUERIES:
            patches.query(torch, name, _asking(getattr(torch, name), what, reads, writer))
        compiling = _asking(torch.compiler.is_compiling, "compiler", reads, writer)
        patches.query(torch.compiler, "is_compiling", compiling)
        try:
            yield reads
        finally:
            reads.settle()


def _reading(
    original: Callable[[Any, str], Any], writer: Any, note: Callable[[Any, str, Any], None]
) -> Callable[[Any, str], Any]:
    """Return a `__getattribute__` that notes what it gives, `MISSING` where it finds nothing."""

    def read(self: Any, name: str) -> Any:
        try:
            value = original(self, name)
        except AttributeError:
            if name[:2] == "__" or not writer.writing:
                raise
            find = getattr(type(self), "__getattr__", None)
            if isinstance(self, nn.Module) and find is not nn.Module.__getattr__:
                raise  # a __getattr__ of the user's own looks further, and tells by what it reads
            if find is None or isinstance(self, nn.Module):
                note(self, name, MISSING)
                raise
            value = find(self, name)
        if name[:2] != "__" and writer.writing:
            if live and (traced := writer.read(self, name, value)) is not None:
                return traced
            note(self, name, value)
        return value

    live = bool(getattr(writer, "live", ()))
    return read


def _asking(original: Any, what: str, reads: Reads, writer: Any) -> Callable[..., Any]:
    def ask(*args: Any, **kwargs: Any) -> Any:
        # torch asks too, to put a mode back as it was; that steers nothing.
        asker = sys._getframe(1).f_code.co_filename  # noqa: SLF001
        if writer.writing and not asker.startswith(_TORCH_FILES):
            reads.asked.add(what)
        return original(*args, **kwargs)

    return ask


class _Patches:
    """What was replaced for the length of a trace, each put back by `undo`."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo
        self._originals: dict[type, Any] = {}

    def query(self, owner: Any, name: str, replacement: Any) -> None:
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, replacement)

    def getattribute(self, cls: type, reading: Callable[[Any], Any]) -> None:
        if cls in self._originals:
            return
        # A base that was replaced before must not note a second time.
        original = next(
            self._originals.get(base) or vars(base)["__getattribute__"]
            for base in cls.__mro__
            if base in self._originals or "__getattribute__" in vars(base)
        )
        mine = "__getattribute__" in vars(cls)
        self._originals[cls] = original
        try:
            cls.__getattribute__ = reading(original)  # type: ignore[method-assign]
        except (AttributeError, TypeError):  # a class that lets nobody set anything
            return
        if mine:
            self._undo.callback(setattr, cls, "__getattribute__", original)
        else:
            self._undo.callback(delattr, cls, "__getattribute__")
