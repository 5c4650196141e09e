"""A model, its random numbers and its Python state, put back as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ModelState", "preserved_rng", "training_flags"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Put torch's, Python's and numpy's random state back on leaving.

    Args:
        seed: if given, seeds all of them on entering.
    """
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    with torch.random.fork_rng(devices=_cuda_devices()):
        try:
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                if numpy_random:
                    numpy_random.seed(seed)
            yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)


def _cuda_devices() -> list[int]:
    # An uninitialised CUDA has no random state of ours to keep, and asking would start it.
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextlib.contextmanager
def training_flags(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run with the model in one mode, every sub-module's own flag put back on leaving.

    A model already in that mode keeps its pattern of flags: a frozen sub-module in
    eval inside a training model stays so.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        if model.training != training:
            # Not by model.train(): one of the user's may do more (merge weights, freeze parts).
            for module in model.modules():
                module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class ModelState:
    """What a forward may change, remembered so that a trace leaves nothing behind.

    Buffers are copied at once. Parameters are as large as the model and hardly ever
    written in a forward, so one is copied only when `protect` says it is about to be.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A scripted module keeps its fields in C++, where its forward cannot add any.
        plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._fields = {module: dict(module.__dict__) for module in plain}
        self._registries = {
            module: {name: dict(getattr(module, name)) for name in _REGISTRIES} for module in plain
        }
        self._containers = [
            (value, value.copy())
            for fields in self._fields.values()
            for name, value in fields.items()
            if type(value) in (dict, list, set) and name not in _REGISTRIES
        ]
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in self._loose_tensors():
            self._copy(tensor)
        self._parameters = {
            p.untyped_storage().data_ptr(): p for p in model.parameters() if _has_storage(p)
        }
        self._protected: set[int] = set()

    def _loose_tensors(self) -> Iterator[torch.Tensor]:
        yield from self.model.buffers()
        for fields in self._fields.values():
            yield from (v for v in fields.values() if isinstance(v, torch.Tensor))

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

    def assigned(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """Yield (module, attribute, new value) for all that was set since."""
        for module, old in self._fields.items():
            for name, value in module.__dict__.items():
                if name not in _REGISTRIES and (name not in old or old[name] is not value):
                    yield module, name, value
            for registry, before in self._registries[module].items():
                for name, value in getattr(module, registry).items():
                    if name not in before or before[name] is not value:
                        yield module, name, value

    def keeps_tensors(self) -> bool:
        """Return whether a container on a module holds a tensor that it did not hold before."""
        return any(
            isinstance(item, torch.Tensor) and not any(item is b for b in _items(before))
            for value, before in self._containers
            for item in _items(value)
        )

    def filled(self) -> bool:
        """Return whether a dict, list or set on a module changed its content since."""
        return any(_differs(value, before) for value, before in self._containers)

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, fields in self._fields.items():
            for name in [name for name in module.__dict__ if name not in fields]:
                del module.__dict__[name]
            module.__dict__.update(fields)
            for registry, before in self._registries[module].items():
                current = getattr(module, registry)
                if list(current) != list(before) or any(
                    current[k] is not before[k] for k in before
                ):
                    current.clear()
                    current.update(before)
        for value, before in self._containers:
            if _differs(value, before):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before)
        with torch.no_grad():
            for tensor, copy in self._copies:
                # Not by `_version`: batch_norm writes its running statistics without raising it.
                if not _equal(tensor, copy):
                    tensor.copy_(copy)


def _has_storage(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # meta, sparse and wrapper tensors have none
        return False


def _items(container: Any) -> list[Any]:
    return [*(container.values() if isinstance(container, dict) else container)]


def _equal(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    try:
        return tensor.shape == copy.shape and torch.equal(tensor, copy)
    except (RuntimeError, NotImplementedError):  # no equality for this dtype or layout
        return False


def _differs(value: Any, before: Any) -> bool:
    if len(value) != len(before):
        return True
    if isinstance(value, dict):
        return any(k not in before or before[k] is not v for k, v in value.items())
    if isinstance(value, set):
        return bool(value != before)
    return any(a is not b for a, b in zip(value, before, strict=True))
