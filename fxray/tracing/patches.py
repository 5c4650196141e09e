"""What of torch is replaced while a trace runs, and put back whatever happens."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointFunction, noop_context_fn

from fxray.errors import NoGraphError
from fxray.torch_private import (
    CHECKPOINT_GENERATOR,
    enter_autocast,
    exit_autocast,
    wrapped_functions,
)
from fxray.tracing import runtime
from fxray.tracing.regions import begin_checkpoint, end_checkpoint
from fxray.tracing.replaced import OfThread, Patch, Replaced, asked

if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = [
    "SKIPPED_FILES",
    "Writer",
    "interposing",
    "patched",
    "patched_contexts",
    "refused_change",
    "refused_randomness",
    "short_line",
    "user_line",
]


class Writer(Protocol):
    """What the patches that both front ends share ask of a writer."""

    @property
    def writing(self) -> bool:
        """Whether the trace takes nodes now."""
        ...

    def write(self, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Write a node that is no op."""
        ...

    def call_object(
        self, target: Any, name: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run something that is no plain function and write it as one node."""
        ...


SKIPPED_FILES = (
    torch.__path__[0] + os.sep,  # not torchvision's
    __file__.rpartition("/tracing/")[0],
    *("<fxray graph", "<eval_with_key", "<frozen ", "<attrs "),
)
"""How the files begin whose frames are not the user's; a notebook's cells are theirs."""


class ExecutionWriter(Writer, Protocol):
    """What tracing by execution is asked beside."""

    def call_module(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        """Run a module: a leaf as one node, another by tracing through it."""
        ...

    def call_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function and write it as one node."""
        ...


def user_line() -> tuple[str, int]:
    """Return the file and line of the innermost frame that is neither torch's nor ours."""
    # Not inspect.stack(), which reads source files; this is asked for every op.
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if not frame.f_code.co_filename.startswith(SKIPPED_FILES):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "", 0


def short_line() -> str:
    """Return the user's `file.py:line`, empty where there is none."""
    file, line = user_line()
    return f"{os.path.basename(file)}:{line}" if file else ""  # noqa: PTH119 - once for every op


def refused_change(module: nn.Module, where: str) -> NoGraphError:
    """Return the error that names the forward that changes a Python attribute."""
    code = getattr(type(module).forward, "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code else ("?", 0)
    return NoGraphError(
        f"{file}:{line}: the forward of {type(module).__name__} changes its attribute {where!r}, "
        "which a graph cannot follow; keep it in a buffer (a tensor), or change it outside "
        "the forward"
    )


def refused_randomness(model: nn.Module, apart: str) -> NoGraphError:
    """Return the error that says where two traces of one call differ."""
    return NoGraphError(
        f"{type(model).__name__} runs differently from one call to the next on the same input "
        f"({apart}): it draws random numbers in Python or numpy, or fills a cache of its own "
        "(lru_cache), which a graph cannot hold; numbers drawn with torch it can"
    )


@contextlib.contextmanager
def patched(writer: ExecutionWriter) -> Iterator[None]:
    """Replace, for the length of a trace, what does not reach a `TorchFunctionMode`."""
    with asked(writer, _BY_EXECUTION):
        yield


@contextlib.contextmanager
def patched_contexts(writer: Writer) -> Iterator[None]:
    """Replace what fx's symbolic tracer loses in silence: grad modes, autocast, Functions."""
    with asked(writer, _SYMBOLICALLY):
        yield


@contextlib.contextmanager
def interposing(writer: Any) -> Iterator[None]:
    """Replace what an interposed forward would not see: Functions, scripted and wrapped ones.

    Not `nn.Module.__call__`: to set a name of a class takes Python the longer the more
    sub-classes it has (0.7 ms with those of transformers), which a trace can bear and a
    training step cannot.
    """
    with asked(writer, _INTERPOSED):
        yield


def _modules(writer: ExecutionWriter) -> Iterator[Patch]:
    original = nn.Module.__call__

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not writer.writing:
            return original(module, *args, **kwargs)
        return writer.call_module(module, original, args, kwargs)

    yield nn.Module, "__call__", call


def _functions(writer: OfThread) -> Iterator[Patch]:
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, /, *args: Any, **kwargs: Any) -> Any:
        bound = original.__get__(None, cls)
        if not writer.writing:
            return bound(*args, **kwargs)
        if cls is CheckpointFunction:
            return _reentrant(writer, *args) if writer.unrolls else bound(*args, **kwargs)
        return writer.call_object(cls, cls.__name__, bound, args, kwargs)

    yield torch.autograd.Function, "apply", classmethod(apply)


def _reentrant(
    writer: Writer, function: Callable[..., Any], preserve_rng_state: bool, *inputs: Any
) -> Any:
    """Run a reentrant checkpoint's function here, between marks."""
    settings = {"use_reentrant": True, "preserve_rng_state": preserve_rng_state}
    begun = writer.write(begin_checkpoint, (_tensors(inputs),), settings)
    outputs: tuple[Any, ...] = ()
    try:
        out = function(*inputs)
        outputs = _tensors(out if isinstance(out, tuple) else (out,))
    finally:
        if writer.writing:
            writer.write(end_checkpoint, (begun, outputs))
    return out


_CHECKPOINT_SETTINGS = ("preserve_rng_state", "determinism_check", "debug", "early_stop")


def _checkpoints(writer: Writer) -> Iterator[Patch]:
    """Mark the regions of checkpoints that are not reentrant; they are no Function.

    Not `torch.utils.checkpoint.checkpoint`, which a model has imported by its name.
    """
    owner, name = torch.utils.checkpoint, CHECKPOINT_GENERATOR
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def traced(*args: Any, **kwargs: Any) -> Any:
        if not writer.writing:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return marked(dict(given.arguments))

    def marked(given: dict[str, Any]) -> Iterator[None]:
        # Inside, the function runs as any other: nothing is computed again while tracing.
        settings = {key: given[key] for key in _CHECKPOINT_SETTINGS if key in given}
        if given["context_fn"] is not noop_context_fn:
            settings["context_fn"] = given["context_fn"]
        begun = writer.write(
            begin_checkpoint, (_tensors(given["args"]),), {"use_reentrant": False, **settings}
        )
        try:
            yield
        finally:
            if writer.writing:
                writer.write(end_checkpoint, (begun,))

    yield owner, name, traced


def _tensors(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(value for value in values if isinstance(value, (torch.Tensor, fx.Proxy)))


def _scripted(writer: Writer) -> Iterator[Patch]:
    original = torch.jit.ScriptFunction.__call__

    def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        def run(*a: Any, **k: Any) -> Any:
            return original(function, *a, **k)

        if not writer.writing:
            return run(*args, **kwargs)
        return writer.call_object(function, function.name, run, args, kwargs)

    yield torch.jit.ScriptFunction, "__call__", call


def _len(writer: ExecutionWriter) -> Iterator[Patch]:
    original = builtins.len

    def traced_len(sized: Any) -> int:
        # len() hands its result through C, which makes a plain int of it.
        if isinstance(sized, torch.Tensor) and writer.writing and sized.dim():
            size: int = sized.size(0)
            return size
        return original(sized)

    yield builtins, "len", traced_len


class _Opened:
    """The contexts entered while a writer wrote, by thread: one may be entered on several."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._nodes: dict[tuple[int, int], tuple[Any, Any]] = {}

    def write(self, context: Any, target: Any, settings: tuple[Any, ...]) -> None:
        """Write that `context` is entered, if anyone writes."""
        if self._writer.writing:
            writer = self._writer.innermost
            key = threading.get_ident(), id(context)
            self._nodes[key] = writer, writer.write(target, settings)

    def close(self, context: Any, target: Any) -> None:
        """Write that `context` is left, if it was written that it was entered."""
        key = threading.get_ident(), id(context)
        if key in self._nodes:
            writer, node = self._nodes.pop(key)
            writer.write(target, (node,))


def _autocast(writer: Writer) -> Iterator[Patch]:
    cls: Any = torch.amp.autocast_mode.autocast
    enter, leave = cls.__enter__, cls.__exit__
    opened = _Opened(writer)

    def traced_enter(self: Any) -> Any:
        result = enter(self)
        settings = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
        opened.write(self, enter_autocast, settings)
        return result

    def traced_exit(self: Any, *error: Any) -> Any:
        opened.close(self, exit_autocast)
        return leave(self, *error)

    yield cls, "__enter__", traced_enter
    yield cls, "__exit__", traced_exit


def _grad_modes(writer: Writer) -> Iterator[Patch]:
    """Write what `no_grad` and its like switch; a mode writes these itself (execution)."""
    grad_mode = torch.autograd.grad_mode

    def patches(cls: type, mode_of: Callable[[Any], bool]) -> Iterator[Patch]:
        enter, leave = vars(cls)["__enter__"], vars(cls)["__exit__"]
        opened = _Opened(writer)

        def traced_enter(self: Any) -> Any:
            opened.write(self, runtime.enter_grad_mode, (mode_of(self),))
            return enter(self)

        def traced_exit(self: Any, *error: Any) -> Any:
            opened.close(self, runtime.exit_grad_mode)
            return leave(self, *error)

        yield cls, "__enter__", traced_enter
        yield cls, "__exit__", traced_exit

    yield from patches(grad_mode.no_grad, lambda _: False)
    yield from patches(grad_mode.enable_grad, lambda _: True)
    yield from patches(grad_mode.set_grad_enabled, lambda self: bool(self.mode))


def _refused(writer: Writer) -> Iterator[Patch]:
    def refuse(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if writer.writing:
                file, line = user_line()
                msg = (
                    f"{file}:{line}: the forward {what}, which a graph cannot hold. Do it "
                    "outside the forward, or trace the part of the model that does not"
                )
                raise NoGraphError(msg)
            return original(*args, **kwargs)

        return call

    reseeds = "reseeds the random numbers (torch.manual_seed)"
    yield torch, "manual_seed", refuse(torch.manual_seed, reseeds)
    inference = torch.autograd.grad_mode.inference_mode
    yield inference, "__enter__", refuse(inference.__enter__, "enters torch.inference_mode")


def _wrapped(writer: ExecutionWriter) -> Iterator[Patch]:
    """Make one node of each function registered with `torch.fx.wrap`."""

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not writer.writing:
                return function(*args, **kwargs)
            return writer.call_function(function, args, kwargs)

        return call

    for (_, name), namespace in list(wrapped_functions().items()):
        function = namespace.get(name)
        if isinstance(function, types.FunctionType):
            yield namespace, name, traced(function)


_PatchFunction = Callable[[Any], Iterator[Patch]]


def _each(*patches: _PatchFunction) -> tuple[Replaced, ...]:
    return tuple(_REPLACED[patch] for patch in patches)


_REPLACED: dict[_PatchFunction, Replaced] = {
    patch: Replaced(patch, grows=patch is _wrapped)
    for patch in (
        *(_modules, _functions, _checkpoints, _scripted, _wrapped),
        *(_len, _autocast, _grad_modes, _refused),
    )
}
"""By patch function; the ways of tracing share them, for a name has one replacement."""

_INTERPOSED = _each(_functions, _scripted, _wrapped)
_SYMBOLICALLY = _each(_functions, _checkpoints, _scripted, _autocast, _grad_modes, _refused)
_BY_EXECUTION = _each(
    *(_modules, _functions, _checkpoints, _scripted, _len, _autocast, _refused, _wrapped)
)
