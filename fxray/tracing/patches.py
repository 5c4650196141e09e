"""What of torch is replaced while a trace runs, and put back whatever happens."""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fxray.errors import TraceError
from fxray.torch_private import enter_autocast, exit_autocast, wrapped_functions
from fxray.tracing import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = [
    "SKIPPED_FILES",
    "Writer",
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

    def write(self, target: Any, args: tuple[Any, ...] = ()) -> Any:
        """Write a node that is no op."""
        ...

    def call_object(
        self, target: Any, name: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run something that is no plain function and write it as one node."""
        ...


SKIPPED_FILES = (
    torch.__path__[0],
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


def refused_change(module: nn.Module, where: str) -> TraceError:
    """Return the error that names the forward that changes a Python attribute."""
    code = getattr(type(module).forward, "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code else ("?", 0)
    return TraceError(
        f"{file}:{line}: the forward of {type(module).__name__} changes its attribute {where!r}, "
        "which a graph cannot follow yet; keep it in a buffer (a tensor), or change it outside "
        "the forward"
    )


def refused_randomness(model: nn.Module, apart: str) -> TraceError:
    """Return the error that says where two traces of one call differ."""
    return TraceError(
        f"{type(model).__name__} runs differently from one call to the next on the same input "
        f"({apart}): it draws random numbers in Python or numpy, or fills a cache of its own "
        "(lru_cache), which a graph cannot hold yet. Draw them with torch, run the model once "
        "before, or switch this off while tracing"
    )


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def patched(writer: ExecutionWriter) -> Iterator[None]:
    """Replace, for the length of a trace, what does not reach a `TorchFunctionMode`."""
    with contextlib.ExitStack() as stack:
        for patch in (_modules, _functions, _scripted, _len, _autocast, _refused):
            for owner, name, value in patch(writer):
                stack.enter_context(_set(owner, name, value))
        stack.enter_context(_wrapped(writer))
        yield


@contextlib.contextmanager
def patched_contexts(writer: Writer) -> Iterator[None]:
    """Replace what fx's symbolic tracer loses in silence: grad modes, autocast, Functions."""
    with contextlib.ExitStack() as stack:
        for patch in (_functions, _scripted, _autocast, _grad_modes, _refused):
            for owner, name, value in patch(writer):
                stack.enter_context(_set(owner, name, value))
        yield


_Patch = tuple[Any, str, Any]


def _modules(writer: ExecutionWriter) -> Iterator[_Patch]:
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not writer.writing:
            return original(module, *args, **kwargs)
        return writer.call_module(module, original, args, kwargs)

    yield nn.Module, "__call__", call


def _functions(writer: Writer) -> Iterator[_Patch]:
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        bound = original.__get__(None, cls)
        if not writer.writing:
            return bound(*args, **kwargs)
        if cls.__name__ == "CheckpointFunction":
            run, _, *inputs = args
            return run(*inputs)
        return writer.call_object(cls, cls.__name__, bound, args, kwargs)

    yield torch.autograd.Function, "apply", classmethod(apply)


def _scripted(writer: Writer) -> Iterator[_Patch]:
    original = torch.jit.ScriptFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*a: Any, **k: Any) -> Any:
            return original(function, *a, **k)

        if not writer.writing:
            return run(*args, **kwargs)
        return writer.call_object(function, function.name, run, args, kwargs)

    yield torch.jit.ScriptFunction, "__call__", call


def _len(writer: ExecutionWriter) -> Iterator[_Patch]:
    original = builtins.len

    def traced_len(sized: Any) -> int:
        # len() hands its result through C, which makes a plain int of it.
        if isinstance(sized, torch.Tensor) and writer.writing and sized.dim():
            size: int = sized.size(0)
            return size
        return original(sized)

    yield builtins, "len", traced_len


def _autocast(writer: Writer) -> Iterator[_Patch]:
    cls: Any = torch.amp.autocast_mode.autocast
    enter, leave = cls.__enter__, cls.__exit__
    open_nodes: dict[int, Any] = {}

    def traced_enter(self: Any) -> Any:
        result = enter(self)
        if writer.writing:
            settings = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
            open_nodes[id(self)] = writer.write(enter_autocast, settings)
        return result

    def traced_exit(self: Any, *error: Any) -> Any:
        if id(self) in open_nodes:
            writer.write(exit_autocast, (open_nodes.pop(id(self)),))
        return leave(self, *error)

    yield cls, "__enter__", traced_enter
    yield cls, "__exit__", traced_exit


def _grad_modes(writer: Writer) -> Iterator[_Patch]:
    """Write what `no_grad` and its like switch; a mode writes these itself (execution)."""
    grad_mode = torch.autograd.grad_mode

    def patches(cls: type, mode_of: Callable[[Any], bool]) -> Iterator[_Patch]:
        enter, leave = vars(cls)["__enter__"], vars(cls)["__exit__"]
        open_nodes: dict[int, Any] = {}

        def traced_enter(self: Any) -> Any:
            if writer.writing:
                open_nodes[id(self)] = writer.write(runtime.enter_grad_mode, (mode_of(self),))
            return enter(self)

        def traced_exit(self: Any, *error: Any) -> Any:
            if id(self) in open_nodes:
                writer.write(runtime.exit_grad_mode, (open_nodes.pop(id(self)),))
            return leave(self, *error)

        yield cls, "__enter__", traced_enter
        yield cls, "__exit__", traced_exit

    yield from patches(grad_mode.no_grad, lambda _: False)
    yield from patches(grad_mode.enable_grad, lambda _: True)
    yield from patches(grad_mode.set_grad_enabled, lambda self: bool(self.mode))


def _refused(writer: Writer) -> Iterator[_Patch]:
    def refuse(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if writer.writing:
                file, line = user_line()
                msg = (
                    f"{file}:{line}: the forward {what}, which a graph cannot hold yet. Do it "
                    "outside the forward, or trace the part of the model that does not"
                )
                raise TraceError(msg)
            return original(*args, **kwargs)

        return call

    reseeds = "reseeds the random numbers (torch.manual_seed)"
    yield torch, "manual_seed", refuse(torch.manual_seed, reseeds)
    inference = torch.autograd.grad_mode.inference_mode
    yield inference, "__enter__", refuse(inference.__enter__, "enters torch.inference_mode")


@contextlib.contextmanager
def _wrapped(writer: ExecutionWriter) -> Iterator[None]:
    """Make one node of each function registered with `torch.fx.wrap`."""

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not writer.writing:
                return function(*args, **kwargs)
            return writer.call_function(function, args, kwargs)

        return call

    with contextlib.ExitStack() as undo:
        for (_, name), namespace in list(wrapped_functions().items()):
            function = namespace.get(name)
            if isinstance(function, types.FunctionType):
                namespace[name] = traced(function)
                undo.callback(namespace.__setitem__, name, function)
        yield
