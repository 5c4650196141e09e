"""A model and its Python state, remembered and put back as it was."""

from __future__ import annotations

import collections
import copy
import operator
import random
import types
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import nn

from fxray.torch_private import COMPILED_CALL
from fxray.tracing.snapshots import is_plain_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Held",
    "ModelState",
    "version_of",
]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, dict, set, collections.deque)
_SEQUENCES = (list, collections.deque)
_HOLDERS = (*_CONTAINERS, tuple, frozenset)
_ATOMS = frozenset([bool, int, float, complex, str, bytes, type(None), type, types.FunctionType])


@attrs.frozen(eq=False)
class Held:
    """A container or an object that a module holds.

    Attributes:
        owner: the object, or the container itself.
        content: the container, or the very dict of the object's attributes.
        before: what was in it.
    """

    owner: Any
    content: Any
    before: Any


class ModelState:
    """What a forward may change, remembered so that a trace leaves nothing behind.

    Buffers are copied at once. Parameters are as large as the model and hardly ever
    written in a forward, so one is copied only when `protect` says it is about to be.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A scripted module keeps its fields in C++, where its forward cannot add any.
        plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._fields = {module: _own_fields(module) for module in plain}
        self._registries = {
            module: {name: dict(getattr(module, name)) for name in _REGISTRIES} for module in plain
        }
        self._containers: list[Held] = []
        self._generators: list[Callable[[], None]] = []
        self._tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self._look_around()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._versions = {key: version_of(t) for key, (_, t) in self._tensors.items()}
        for _, tensor in self._tensors.values():
            if not isinstance(tensor, nn.Parameter):
                self._copy(tensor)
        self._parameters = {
            p.untyped_storage().data_ptr(): p for p in model.parameters() if _has_storage(p)
        }
        self._gradients = [(p, p.grad) for p in model.parameters() if p.is_leaf]
        self._protected: set[int] = set()

    def _look_around(self) -> None:
        """Find the tensors, containers and generators that the modules hold."""
        self._held = seen = {id(module) for module in self._fields}
        paths = {module: path for path, module in reversed([*self.model.named_modules()])}
        for module, fields in self._fields.items():
            path = paths[module]
            begin = f"{path}." if path else ""
            for registry in ("_parameters", "_buffers"):
                for name, tensor in fields[registry].items():
                    self._look_into(f"{begin}{name}", tensor, 0, seen)
            for name, value in fields.items():
                if name not in _REGISTRIES:
                    self._look_into(f"{begin}{name}", value, 0, seen)
        for path, tensor in self.model.named_buffers():  # those of scripted modules
            self._tensors.setdefault(id(tensor), (path, tensor))

    def _look_into(self, path: str, value: Any, depth: int, seen: set[int]) -> None:
        if type(value) in _ATOMS or id(value) in seen or depth > 2:
            return
        if isinstance(value, torch.Tensor):
            self._tensors.setdefault(id(value), (path, value))
            return
        if isinstance(value, nn.Module):  # hidden in a list, where nobody registers it
            seen.add(id(value))
            for name, tensor in (*value.named_buffers(), *value.named_parameters()):
                self._tensors.setdefault(id(tensor), (f"{path}.{name}", tensor))
            return
        put_back = _put_back(value)
        if put_back is not None:
            self._generators.append(put_back)
            return
        inner = value if isinstance(value, _HOLDERS) else _fields_of(value)
        if inner is None:
            return
        seen.add(id(value))
        if isinstance(inner, _CONTAINERS):
            self._containers.append(Held(value, inner, _shallow(inner)))
        for key, item in _pairs(inner):
            self._look_into(f"{path}.{key}", item, depth + 1, seen)

    def _copy(self, tensor: torch.Tensor) -> None:
        self._copies.append((tensor, tensor.detach().clone()))

    def protect(self, tensor: torch.Tensor) -> None:
        """Copy the parameter that `tensor` shares memory with, before it is written."""
        if not _has_storage(tensor):
            return
        pointer = tensor.untyped_storage().data_ptr()
        parameter = self._parameters.get(pointer)
        if parameter is not None and pointer not in self._protected:
            self._protected.add(pointer)
            self._copy(parameter)

    def protected(self) -> list[torch.Tensor]:
        """Return the parameters that `protect` copied: those the forward writes."""
        return [self._parameters[pointer] for pointer in self._protected]

    def assigned(self) -> Iterator[tuple[nn.Module, str, Any, Any]]:
        """Yield (module, attribute, old value, new value) for all that was set since.

        The old value of what was not there is the module's class.
        """
        for module, old in self._fields.items():
            missing = type(module)
            for name, value in _own_fields(module).items():
                if name not in _REGISTRIES and old.get(name, missing) is not value:
                    yield module, name, old.get(name, missing), value
            for registry, before in self._registries[module].items():
                for name, value in getattr(module, registry).items():
                    if before.get(name, missing) is not value:
                        yield module, name, before.get(name, missing), value

    def deleted(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield (module, attribute) for all that was taken off since."""
        for module, old in self._fields.items():
            yield from ((module, name) for name in old if name not in module.__dict__)
            for registry, before in self._registries[module].items():
                current = getattr(module, registry)
                yield from ((module, name) for name in before if name not in current)

    def swapped(self, module: nn.Module) -> bool:
        """Return whether other parameters stand in `module` than those that it had."""
        before = self._registries.get(module)
        if before is None:
            return False
        now = module._parameters  # noqa: SLF001 - as torch.func swaps them
        return any(now.get(name) is not p for name, p in before["_parameters"].items())

    def knows(self, tensor: torch.Tensor) -> bool:
        """Return whether a module held `tensor`, itself or in something it holds."""
        return id(tensor) in self._tensors

    @property
    def holds_generators(self) -> bool:
        """Whether a module holds a generator of random numbers of its own."""
        return bool(self._generators)

    def holds(self, value: object) -> bool:
        """Return whether a module held the object `value`, itself or in something it holds."""
        return id(value) in self._held

    def keeps_tensors(self) -> bool:
        """Return whether a container or object on a module holds a tensor it did not hold before.

        Such a tensor is one that the forward made, or was given: a loss to be read later.
        """
        for held in self._containers:
            old = {id(item) for item in _items(held.before)}
            new = (item for item in _items(held.content) if id(item) not in old)
            if any(_holds_tensor(item, self._tensors) for item in new):
                return True
        return False

    def filled(self) -> list[Held]:
        """Return the containers and objects on modules whose content changed since."""
        return [held for held in self._containers if _differs(held.content, held.before)]

    def changed_tensors(self) -> list[str]:
        """Return the paths of the parameters, buffers and other tensors written or set since.

        A parameter counts as written by its version, or if `protect` copied it and it differs.
        To be asked before `restore`.
        """
        copies = {id(tensor): before for tensor, before in self._copies}
        written = [
            path
            for key, (path, tensor) in self._tensors.items()
            if version_of(tensor) != self._versions[key]
            or (key in copies and not _equal(tensor, copies[key]))
        ]
        paths = {module: path for path, module in reversed([*self.model.named_modules()])}
        for module, name, _, value in self.assigned():
            fields = self._fields[module]
            held = [fields, *self._registries[module].values()]
            old = next((f[name] for f in held if name in f), None)
            if isinstance(value, torch.Tensor) or isinstance(old, torch.Tensor):
                written.append(f"{paths[module]}.{name}".removeprefix("."))
        return [*dict.fromkeys(written)]

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, fields in self._fields.items():
            self._restore_module(module, fields)
        for held in self.filled():
            held.content.clear()
            fill = held.content.extend if isinstance(held.content, _SEQUENCES) else None
            (fill or held.content.update)(held.before)
        for put_back in self._generators:
            put_back()
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        with torch.no_grad():
            for tensor, saved in self._copies:
                # Not by `_version`: batch_norm writes its running statistics without raising it.
                if not _equal(tensor, saved):
                    tensor.copy_(saved)

    def _restore_module(self, module: nn.Module, fields: dict[str, Any]) -> None:
        for name in [name for name in _own_fields(module) if name not in fields]:
            del module.__dict__[name]
        module.__dict__.update(fields)
        for registry, before in self._registries[module].items():
            current = getattr(module, registry)
            if list(current) != list(before) or any(current[k] is not before[k] for k in before):
                current.clear()
                current.update(before)


def _own_fields(module: nn.Module) -> dict[str, Any]:
    # Another thread may run the model interposed, and stand before its modules meanwhile.
    fields = dict(module.__dict__)
    fields.pop(COMPILED_CALL, None)
    return fields


def _has_storage(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # meta, sparse and wrapper tensors have none
        return False


def version_of(tensor: torch.Tensor) -> int | None:
    """Return how often `tensor` was written in place, None where that is not counted."""
    # A tensor made in inference mode has none.
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001


def _fields_of(value: Any) -> Any:
    """Return what a plain object holds, the very dict; None for any other object."""
    return getattr(value, "__dict__", None) if is_plain_object(value) else None


def _pairs(holder: Any) -> list[tuple[Any, Any]]:
    return [*(holder.items() if isinstance(holder, dict) else enumerate(holder))]


def _items(container: Any) -> list[Any]:
    return [item for _, item in _pairs(container)]


def _shallow(container: Any) -> Any:
    # Not copy.copy: a dict of the user's own class may do more when it is made.
    for exact in (dict, list, set):
        if isinstance(container, exact):
            return exact(container)
    return [*container]


def _put_back(value: Any) -> Callable[[], None] | None:
    """Return what gives a generator of random numbers its present state again."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: _none(value.set_state(state))
    if isinstance(value, np.random.Generator):
        bits = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, np.random.RandomState):
        drawn = value.get_state()
        return lambda: value.set_state(drawn)
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    return None


def _none(_: object) -> None:
    return None


def _holds_tensor(value: Any, known: dict[int, Any], depth: int = 2) -> bool:
    if isinstance(value, torch.Tensor):
        return id(value) not in known
    inner = value if isinstance(value, _HOLDERS) else _fields_of(value)
    if inner is None or not depth:
        return False
    return any(_holds_tensor(item, known, depth - 1) for item in _items(inner))


def _equal(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    try:
        return tensor.shape == copy.shape and torch.equal(tensor, copy)
    except (RuntimeError, NotImplementedError):  # no equality for this dtype or layout
        return False


def _differs(value: Any, before: Any) -> bool:
    if len(value) != len(before):
        return True
    if isinstance(value, set):
        return bool(value != before)
    if isinstance(value, dict) and any(map(operator.is_not, value.values(), before.values())):
        return True
    return any(map(operator.is_not, value, before))
