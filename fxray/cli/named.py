"""The model, and the example call, that a user names on a command line."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import torch
from torch import nn

from fxray.errors import FxrayError, first_line, nearest

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Named", "make", "shortened", "user_place"]

_FORMS = "model, (model, x), (model, args), (model, kwargs) or (model, args, kwargs)"


@attrs.frozen
class Named:
    """What the user named, made.

    Attributes:
        model: the model.
        args: positional arguments of the example call that came with it.
        kwargs: keyword arguments of it.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = attrs.field(factory=dict)


def make(words: str) -> Named:
    """Return what `words`, MODULE:CALLABLE, make; nothing else of the user's is run.

    Raises:
        FxrayError: there is no such thing, it fails, or it gives no model; says where.
    """
    source, _, name = words.rpartition(":")
    if not source or not name:
        defined = f" {words} defines {', '.join(_defined(words))}." if _defined(words) else ""
        msg = f"which of its functions or classes makes the model?{defined} Write {words}:NAME"
        raise FxrayError(msg)
    with _told(f"importing {source}"):
        module = _imported(source)
    made = _attribute(module, source, name)
    if isinstance(made, nn.Module):
        return Named(made)
    if not callable(made):
        msg = f"{words} is of type {_kind(made)}; name a function that returns {_FORMS}, or a class"
        raise FxrayError(msg)
    _check_takes_nothing(made, words)
    # So that the same words give the same model: nothing else of this process draws numbers.
    torch.manual_seed(0)
    with _told(f"calling {words}"):
        given = made()
    return _named(given, words)


def _named(given: Any, words: str) -> Named:
    """Return what a factory gave, read as one of `_FORMS`."""
    model, *rest = given if isinstance(given, tuple) and given else (given,)
    if not isinstance(model, nn.Module):
        msg = f"{words} returned {_kinds(given)}; it is to return {_FORMS}"
        raise FxrayError(msg)
    if not rest or (len(rest) == 1 and rest[0] is None):
        return Named(model)
    if len(rest) == 1:
        return _with_call(model, rest[0])
    args, kwargs = rest if len(rest) == 2 else (None, None)
    if not isinstance(kwargs, Mapping):
        msg = f"{words} returned {_kinds(given)}; several arguments go in a tuple: (model, (x, y))"
        raise FxrayError(msg)
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    return Named(model, args, dict(kwargs))


def _with_call(model: nn.Module, call: Any) -> Named:
    if isinstance(call, Mapping):
        return Named(model, (), dict(call))
    if not isinstance(call, tuple):
        return Named(model, (call,))
    pair = len(call) == 2 and isinstance(call[0], tuple) and isinstance(call[1], dict)
    return Named(model, call[0], call[1]) if pair else Named(model, call)


def _kind(value: Any) -> str:
    return type(value).__qualname__


def _kinds(given: Any) -> str:
    if isinstance(given, type):
        return f"the class {given.__qualname__}"
    return f"({', '.join(map(_kind, given))})" if isinstance(given, tuple) else _kind(given)


# ---------------------------------------------------------------------- finding it


def _imported(source: str) -> ModuleType:
    """Return the module at a path or of a name; what lies in this folder is importable."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    path = Path(source)
    if path.suffix != ".py" and not (os.sep in source or "/" in source):
        return importlib.import_module(source)
    if not path.is_file():
        hint = f"; there is {path}.py" if path.with_suffix(".py").is_file() else ""
        msg = f"there is no file {source}{hint}"
        raise FxrayError(msg)
    # As `python model.py` does: what lies beside the file is importable too.
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.insert(0, beside)
    name = path.stem if path.stem not in sys.modules else f"fxray_traced_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None  # noqa: S101 - it ends in .py
    assert spec.loader is not None  # noqa: S101 - the same
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, source: str, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [known for known in vars(found) if not known.startswith("_")]
            close = nearest(part, known)
            hint = f"; nearest: {', '.join(close)}" if close else ""
            msg = f"{source} has no {name!r}{hint}"
            raise FxrayError(msg)
        found = getattr(found, part)
    return found


def _defined(source: str) -> list[str]:
    """Return the functions and classes at the top of a file, which is read, not run."""
    path = Path(source)
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        if path.suffix == ".py":
            top = ast.parse(path.read_text(encoding="utf-8")).body
            return [n.name for n in top if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return []


def _check_takes_nothing(made: Any, words: str) -> None:
    with contextlib.suppress(TypeError, ValueError):  # a built-in that says no signature
        needed = [
            name
            for name, parameter in inspect.signature(made).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if needed:
            msg = (
                f"{_place_of(made)}{words} takes {', '.join(needed)} and is called with nothing; "
                "give them defaults, or name a function that passes them"
            )
            raise FxrayError(msg)


def _place_of(made: Any) -> str:
    with contextlib.suppress(TypeError, OSError):
        file = inspect.getsourcefile(made)
        return f"{shortened(file)}:{inspect.getsourcelines(made)[1]}: " if file else ""
    return ""


# ---------------------------------------------------------------------- what went wrong in it


@contextlib.contextmanager
def _told(doing: str) -> Iterator[None]:
    """Tell what the user's code raises in one line, with their own file and line."""
    try:
        yield
    except (FxrayError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        msg = f"{doing} ended the program (sys.exit({error.code!r})); keep that below `if __name__`"
        raise FxrayError(msg) from error
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        _raise_told(doing, error)


def _raise_told(doing: str, error: Exception) -> NoReturn:
    place = user_place(error)
    said = _said(error)
    if (deepest := _chain(error)[-1]) is not error:
        said += f" (because of {_said(deepest)})"
    if isinstance(error, SyntaxError) and error.filename:
        place, said = f"{shortened(error.filename)}:{error.lineno}", f"SyntaxError: {error.msg}"
    hint = ""
    missing = isinstance(error, ModuleNotFoundError) and error.name
    if missing and f"{doing}.".startswith(f"importing {missing}."):
        place, hint = "", f"; is it installed here, or in this folder? A file is named {missing}.py"
    elif isinstance(error, ImportError) and "no known parent package" in str(error):
        hint = "; it is part of a package: name it as one, package.module:CALLABLE"
    at = f"{place}: " if place else ""
    msg = f"{at}{doing} failed: {said}{hint}"
    raise FxrayError(msg) from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def user_place(error: BaseException) -> str:
    """Return `file.py:line` of the user's own code where `error`, or its cause, was raised.

    Own is what is neither installed nor Python's; where nothing is, a library's line but
    torch's, which says nothing about the mistake. Empty where there is none.
    """
    rest: list[traceback.FrameSummary] = []
    for one in reversed(_chain(error)):
        frames = [
            frame
            for frame in traceback.extract_tb(one.__traceback__)
            if not frame.filename.startswith(_NEVER)
        ]
        own = [frame for frame in frames if not _INSTALLED.search(frame.filename)]
        if own:
            return f"{shortened(own[-1].filename)}:{own[-1].lineno}"
        rest = rest or frames
    return f"{rest[-1].filename}:{rest[-1].lineno}" if rest else ""


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, the deepest last."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_NEVER = (
    __file__.rpartition("/cli/")[0],
    torch.__path__[0],
    # Python's own; what is installed lies below it, where there is no virtual environment.
    *(str(path) for path in Path(os.__file__).parent.iterdir() if "-packages" not in path.name),
    "<",
)


def shortened(filename: str) -> str:
    """Return a path as one types it from here."""
    with contextlib.suppress(ValueError):
        return str(Path(filename).resolve().relative_to(Path.cwd()))
    return filename
