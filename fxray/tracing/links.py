"""The objects of a model that a graph depends on, side by side, compared by identity."""

from __future__ import annotations

import operator
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn

from fxray.tracing.attributes import MISSING, Read, autocast_now
from fxray.tracing.grounds import HOOKS, Part, State
from fxray.tracing.snapshots import ABSENT, TENSOR, Contents, Identities, Kind

__all__ = ["COLUMNS", "Find", "Links"]

_TENSORS = ("_parameters", "_buffers")
COLUMNS = {"dtype": "dtypes", "device": "devices", "requires_grad": "frozen"}
"""The field of a State by the property of a tensor that it holds."""


class Find:
    """Looks objects up by path, each module once."""

    def __init__(self, model: nn.Module, local: dict[tuple[str, str], Identities]) -> None:
        self.model, self.local = model, local
        self._modules: dict[str, Any] = {"": model}

    def module(self, path: str) -> Any:
        """Return the module, None where there is none now."""
        if path not in self._modules:
            parent, _, name = path.rpartition(".")
            holder = self.module(parent)
            children = vars(holder).get("_modules", {}) if holder is not None else {}
            self._modules[path] = children.get(name)
        return self._modules[path]

    def holder(self, read: Read) -> tuple[Any, str]:
        """Return the module or object that holds an attribute, and its name there."""
        *names, last = read.name.split(".")
        found = self.module(read.path)
        for name in names:
            found = getattr(found, name, None)
        return found, last

    def value(self, read: Read) -> Any:
        """Return what the attribute is now."""
        holder, name = self.holder(read)
        return MISSING if holder is None else getattr(holder, name, MISSING)

    def first(self, read: Read) -> Identities | None:
        """Return the objects that an attribute held when the model was linked first."""
        return self.local.get((read.path, read.name))

    def note(self, read: Read) -> None:
        """Take the objects that an attribute holds now for those it is to hold."""
        value = self.value(read)
        if value is not MISSING:
            self.local[read.path, read.name] = Identities(value)

    def tensor(self, path: str) -> Any:
        """Return a parameter or buffer, None where there is none now."""
        fields, name = self.registry(path)
        return fields.get(name)

    def registry(self, path: str) -> tuple[dict[str, Any], str]:
        """Return the dict that holds a parameter or buffer, and its name there."""
        parent, _, name = path.rpartition(".")
        module = self.module(parent)
        if module is None:
            return {}, name
        fields = vars(module)
        held = next((fields[r] for r in _TENSORS if name in fields.get(r, ())), None)
        return (fields if held is None else held), name


class Links:
    """The dicts, names and objects of a state that held, side by side."""

    def __init__(self, find: Find, state: State) -> None:
        self._state = state
        self._fields: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._inherited: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._held: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        self._live: list[Any] = []
        self._items: list[Any] = []
        self._long: list[tuple[Any, int]] = []
        self._arrays: list[tuple[Any, bytes]] = []
        for read in state.reads:
            self._link_read(find, read)
        parts = [(part, find.module(part.path)) for part in state.parts]
        plain = [(p, m) for p, m in parts if not isinstance(m, torch.jit.ScriptModule)]
        self._children = [vars(module)["_modules"].values() for _, module in plain]
        self._child_lists = [[*children] for children in self._children]
        everyone = [*dict.fromkeys(m for inner in self._child_lists for m in inner), find.model]
        self._modules, self._classes = everyone, [*map(type, everyone)]
        self._no_hooks: list[Any] = []
        self._hooks: list[Any] = []
        for part, module in plain:
            if part.called:
                self._link_called(part, module)
        self._item_ids = [*map(id, self._items)]
        self._hook_ids = [*map(list, self._hooks)]
        self._columns = _columns([*self._fields.values()], 3)
        self._inherited_columns = _columns([*self._inherited.values()], 3)
        self._held_columns = _columns([*self._held.values()], 2)
        self._ties = _columns(
            [
                (*find.registry(path), *find.registry(group[0]))
                for group in state.ties
                for path in group[1:]
            ],
            4,
        )
        self._tensors = [
            (operator.attrgetter(what), *_columns([find.registry(p) for p, _ in each], 2), expected)
            for what, field in COLUMNS.items()
            if (each := getattr(state, field))
            for expected in [[was for _, was in each]]
        ]
        ambient = (state.grad, state.inference, state.autocast)
        self._ambient = any(mode is not None for mode in ambient)

    def _link_read(self, find: Find, read: Read) -> None:
        holder, name = find.holder(read)
        fields = getattr(holder, "__dict__", {})
        registries = [fields.get(r, {}) for r in _TENSORS if isinstance(holder, nn.Module)]
        owner = next((d for d in (fields, *registries) if name in d), None)
        if read.value == TENSOR and owner is not None and find.first(read) is None:
            self._held[id(owner), name] = owner, name
            return
        value = find.value(read)
        if owner is not None:
            self._fields[id(owner), name] = owner, name, value
        elif read.value == ABSENT and isinstance(holder, nn.Module):
            for each in (fields, *registries, fields["_modules"]):
                self._fields[id(each), name] = each, name, MISSING
        else:
            self._inherited[id(holder), name] = holder, name, value
        if isinstance(read.value, (Contents, Kind)) and value is not MISSING:
            self._link_contents(Identities(value))

    def _link_contents(self, held: Identities) -> None:
        self._live += held.live
        self._items += held.objects[1:]
        self._long += [(parts, len(parts)) for parts in held.long]
        self._arrays += [(array, array.tobytes()) for array in held.arrays]

    def _link_called(self, part: Part, module: nn.Module) -> None:
        fields = vars(module)
        self._fields[id(fields), "forward"] = fields, "forward", fields.get("forward", MISSING)
        counts = dict(part.hooks)
        for name in HOOKS:
            if name in fields:
                (self._hooks if counts.get(name) else self._no_hooks).append(fields[name])

    def hold(self, *, modes: bool = True) -> bool:
        """Return whether every object is the very one that it was, and the modes, if asked."""
        fields, names, values = self._columns
        if not all(map(operator.is_, map(dict.get, fields, names, repeat(MISSING)), values)):
            return False
        if any(self._no_hooks) or [*map(list, self._children)] != self._child_lists:
            return False
        if [*map(type, self._modules)] != self._classes or not self._items_hold():
            return False
        if self._hooks and [*map(list, self._hooks)] != self._hook_ids:
            return False
        return (not modes or not self._ambient or self._modes_hold()) and self._rest_holds()

    def _items_hold(self) -> bool:
        items = chain.from_iterable(self._live)
        return [*map(id, items)] == self._item_ids and all(len(v) == n for v, n in self._long)

    def _rest_holds(self) -> bool:
        return (
            self._columns_hold()
            and self._tensors_hold()
            and all(array.tobytes() == was for array, was in self._arrays)
        )

    def _modes_hold(self) -> bool:
        state = self._state
        return (
            state.grad in (None, torch.is_grad_enabled())
            and state.inference in (None, torch.is_inference_mode_enabled())
            and (state.autocast is None or state.autocast == autocast_now())
        )

    def _columns_hold(self) -> bool:
        objects, names, values = self._inherited_columns
        if not all(map(operator.is_, map(getattr, objects, names, repeat(MISSING)), values)):
            return False
        held, names = self._held_columns
        if not all(map(isinstance, map(dict.get, held, names), repeat(torch.Tensor))):
            return False
        one, a, other, b = self._ties
        return all(map(operator.is_, map(dict.get, one, a), map(dict.get, other, b)))

    def _tensors_hold(self) -> bool:
        try:
            return all(
                [*map(get, map(dict.get, registries, paths))] == expected
                for get, registries, paths, expected in self._tensors
            )
        except AttributeError:  # one is None now
            return False


def _columns(rows: list[tuple[Any, ...]], width: int) -> Any:
    return [[row[k] for row in rows] for k in range(width)]
