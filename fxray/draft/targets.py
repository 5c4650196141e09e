"""Which ops a mark means: whatever a user may give is found in the architecture."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.architecture import Architecture, Op
from fxray.errors import DraftError, UnknownNameError, nearest
from fxray.tracing.names import type_of_function

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


__all__ = ["Targets", "find_targets", "is_op_function"]

_BUILTIN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    torch.jit.ScriptFunction,
)


@attrs.frozen
class Targets:
    """The paths of the ops that something means.

    Attributes:
        values: whose output, gradient and input it means.
        weights: whose parameters and their gradients it means.
        called: how to name it to the user.
        composite: paths of modules among it that are made of several ops.
    """

    values: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    called: str = ""
    composite: tuple[str, ...] = ()

    def of(self, kind: str) -> tuple[str, ...]:
        """Return the paths that it means for `kind`."""
        return self.weights if kind in {"weight", "weight_grad"} else self.values

    def __bool__(self) -> bool:
        return bool(self.values or self.weights)


def find_targets(what: Any, architecture: Architecture, model: nn.Module | None) -> Targets:
    """Return which ops `what` means.

    `what` is a path, type, type key, fx name or shell pattern over paths; a module, a class
    of modules or a parameter of the model; a function or method that the graph calls; a
    predicate of an `Op`; an `Op`; or a list, tuple or set of such.

    Raises:
        UnknownNameError: nothing in the model is that; names the nearest.
        DraftError: it is none of these.
    """
    finder = _Finder(architecture, model)
    if isinstance(what, (list, tuple, set, frozenset)):
        if not what:
            msg = f"{what!r} holds nothing to mark"
            raise DraftError(msg)
        return _joined([find_targets(each, architecture, model) for each in what], architecture)
    return finder.find(what)


def _joined(found: Iterable[Targets], architecture: Architecture, called: str = "") -> Targets:
    found = list(found)
    values = {path for each in found for path in each.values}
    weights = {path for each in found for path in each.weights}
    return Targets(
        tuple(path for path in architecture if path in values),
        tuple(path for path in architecture if path in weights),
        called or ", ".join(each.called for each in found),
        tuple(path for each in found for path in each.composite),
    )


def is_op_function(function: Any, architecture: Architecture) -> bool:
    """Return whether a callable names an op, rather than being a predicate of ops.

    Named are: builtins and methods of tensors (`torch.relu`, `torch.Tensor.relu`,
    `operator.add`), functions of torch (`F.relu`) and whatever function the graph calls.
    """
    module = getattr(function, "__module__", None) or ""
    name = f"{module}.{getattr(function, '__qualname__', '')}"
    return (
        isinstance(function, _BUILTIN)
        or module.partition(".")[0] in {"torch", "math", "operator", "_operator"}
        or any(op.target == name for op in architecture.values())
    )


@attrs.frozen
class _Finder:
    """Where to look: an architecture and, for objects, the model it was traced from."""

    architecture: Architecture
    model: nn.Module | None

    def find(self, what: Any) -> Targets:
        if isinstance(what, str):
            return self.name(what)
        if isinstance(what, Op):
            return self.ops([self.architecture.resolve(what.path)], repr(what.path))
        if isinstance(what, nn.Module):
            return self.module_object(what)
        if isinstance(what, type) and issubclass(what, nn.Module):
            return self.module_class(what)
        if isinstance(what, torch.Tensor):
            return self.parameter(what)
        return self.function_or_predicate(what)

    def function_or_predicate(self, what: Any) -> Targets:
        if callable(what) and not isinstance(what, type):
            named = is_op_function(what, self.architecture)
            return self.function(what) if named else self.predicate(what)
        msg = (
            f"cannot mark {what!r} ({type(what).__name__}); give a path, a type, a pattern, a "
            "module, a class of modules, a parameter, a function such as F.relu, a predicate of "
            "an op, or a list of those"
        )
        raise DraftError(msg)

    def ops(self, paths: Iterable[str], called: str) -> Targets:
        paths = tuple(paths)
        return Targets(paths, paths, called)

    # ------------------------------------------------------------ by name

    def name(self, name: str) -> Targets:
        architecture = self.architecture
        both = name in architecture.modules and name in architecture.graph
        if both and architecture[name].role in ("function", "method"):
            # F.dropout beside a module called `dropout` that no forward calls.
            return self.ops([name], repr(name))
        if name and (name in architecture.modules or name in architecture.returns):
            return self._called_something(self.module(name), name)
        if of_type := self.of_type(name.lower()):
            return self.ops(of_type, repr(name))
        if name in architecture:
            return self.ops([architecture.resolve(name)], repr(name))
        # Torch spells some types otherwise: max_pool2d, log_softmax.
        if name and (of_type := self.of_type(type_of_function(name))):
            return self.ops(of_type, repr(name))
        if matched := architecture.match(name):
            return self.ops(matched, repr(name))
        raise self._unknown(name)

    def of_type(self, kind: str) -> tuple[str, ...]:
        return tuple(op.path for op in self.architecture.values() if op.type == kind)

    def _unknown(self, name: str) -> UnknownNameError:
        architecture = self.architecture
        if not any(sign in name for sign in "*?["):
            return architecture.unknown(name)
        stem = name.rstrip("*?.")
        close = nearest(stem, [*filter(None, architecture.modules), *architecture])
        hint = f"nearest: {', '.join(map(repr, close))}. " if close else ""
        msg = f"no op's path matches {name!r} in {architecture.model}; {hint}"
        return UnknownNameError(msg + f"it has {len(architecture)} ops: {architecture.listing()}")

    def _called_something(self, targets: Targets, name: str) -> Targets:
        if targets:
            return targets
        kind = self.architecture.modules.get(name, "module")
        inside = self.architecture.match(f"{name}.*") or self.architecture.beneath(name)
        owner = self._leaf_above(name)
        if owner:
            hint = f"it is part of {owner!r}, which is one op: mark that"
        elif inside:
            hint = f'it is never called itself: mark "{name}.*", the {len(inside)} ops inside'
        else:
            hint = "no forward of the trace called it"
        msg = f"{name!r} ({kind}) has no op; {hint}"
        raise UnknownNameError(msg)

    def _leaf_above(self, name: str) -> str:
        leaves = {op.module for op in self.architecture.values() if op.module}
        return next((leaf for leaf in leaves if name.startswith(f"{leaf}.")), "")

    # ------------------------------------------------------------ modules

    def module(self, path: str) -> Targets:
        """Return what the module or module call at `path` means; maybe nothing."""
        architecture = self.architecture
        called = repr(path) if path else f"the root ({architecture.model})"
        leaf = [op.path for op in architecture.values() if op.module == path and path]
        if leaf:
            return self.ops(leaf, called)
        returned = {
            op
            for call, ops in architecture.returns.items()
            if path in {call, call.partition("@")[0]}
            for op in ops
        }
        beneath = architecture.beneath(path.partition("@")[0])
        return Targets(
            tuple(op for op in architecture if op in returned),
            tuple(op for op in beneath if architecture[op].parameters),
            called,
            (path,),
        )

    def module_object(self, module: nn.Module) -> Targets:
        names = self._names_of(module)
        return self._called_something(
            _joined(map(self.module, names), self.architecture, repr(names[0] or "the model")),
            names[0],
        )

    def _names_of(self, module: nn.Module) -> list[str]:
        if self.model is None:
            msg = f"this draft has no model to find {type(module).__name__} in; mark it by its path"
            raise DraftError(msg)
        named = self.model.named_modules(remove_duplicate=False)  # a shared module has several
        names = [name for name, each in named if each is module]
        if not names:
            of_class = [
                n for n, c in self.architecture.modules.items() if c == type(module).__name__
            ]
            near = (
                f"; of its class there are {', '.join(map(repr, of_class[:3]))}" if of_class else ""
            )
            msg = f"this {type(module).__name__} is not a module of {self.architecture.model}{near}"
            raise UnknownNameError(msg)
        return names

    def module_class(self, cls: type[nn.Module]) -> Targets:
        if self.model is None:
            modules = self.architecture.modules.items()
            names = [name for name, kind in modules if kind == cls.__name__]
        else:
            named = self.model.named_modules(remove_duplicate=False)
            names = [name for name, module in named if isinstance(module, cls)]
        targets = _joined(map(self.module, names), self.architecture, cls.__name__)
        if not targets:
            kinds = sorted(set(self.architecture.modules.values()))
            close = nearest(cls.__name__, kinds) or kinds[:6]
            why = "none was called" if names else f"it has {', '.join(close)}"
            msg = f"no {cls.__name__} in {self.architecture.model}: {why}"
            raise UnknownNameError(msg)
        return targets

    def parameter(self, tensor: torch.Tensor) -> Targets:
        named = [] if self.model is None else self.model.named_parameters(remove_duplicate=False)
        names = {name for name, each in named if each is tensor}
        owners = [op.path for op in self.architecture.values() if names & set(self._owns(op))]
        if not owners:
            kind = f"{type(tensor).__name__} of shape {tuple(tensor.shape)}"
            why = f"is not a parameter of {self.architecture.model}; give one, or its path"
            if names:
                why = f"is {min(names)!r}, which no forward of the trace read"
            msg = f"this {kind} {why}"
            raise UnknownNameError(msg)
        return Targets((), tuple(owners), f"parameter {min(names)!r}")

    def _owns(self, op: Op) -> list[str]:
        return [op.parameter_path(name) for name in op.parameters]

    # ---------------------------------------------------------- functions

    def function(self, function: Any) -> Targets:
        kind = type_of_function(function)
        calls = [op for op in self.architecture.values() if op.role in {"function", "method"}]
        paths = [op.path for op in calls if op.type == kind]
        if not paths:
            modules = sum(op.type == kind for op in self.architecture.values())
            close = nearest(kind, {op.type for op in calls})
            hint = f"; nearest: {', '.join(map(repr, close))}" if close else ""
            if modules:
                hint = f"; {modules} of that type are modules: mark({kind!r}) takes those as well"
            msg = f"{self.architecture.model} calls no function or method {kind!r}{hint}"
            raise UnknownNameError(msg)
        return self.ops(paths, kind)

    def predicate(self, predicate: Callable[[Op], bool]) -> Targets:
        called = getattr(predicate, "__name__", repr(predicate))
        try:
            inspect.signature(predicate).bind(None)
        except (TypeError, ValueError):
            msg = (
                f"{called} is no function of this graph, and no predicate: it does not take one "
                f"argument, the op; functions called: {', '.join(self._functions()) or 'none'}"
            )
            raise DraftError(msg) from None
        paths = [op.path for op in self.architecture.values() if self._holds(predicate, called, op)]
        if not paths:
            msg = f"the predicate {called} holds for none of the {len(self.architecture)} ops"
            raise UnknownNameError(msg)
        return self.ops(paths, f"predicate {called}")

    def _functions(self) -> list[str]:
        ops = self.architecture.values()
        return sorted({op.type for op in ops if op.role in {"function", "method"}})

    def _holds(self, predicate: Callable[[Op], bool], called: str, op: Op) -> bool:
        try:
            answer: Any = predicate(op)
        except Exception as error:
            msg = f"the predicate {called} fails on {op.path!r}: {type(error).__name__}: {error}"
            raise DraftError(msg) from error
        if not isinstance(answer, bool):
            msg = f"the predicate {called} gave {answer!r} for {op.path!r}, not True or False"
            raise DraftError(msg)
        return answer
