"""Which plain attributes of the model's modules a forward reads, and what they were."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.errors import SpecialisationError
from fxray.tracing.torch_calls import is_leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Expected", "Read", "noted_reads"]

_PLAIN = (bool, int, float, str, type(None))
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that nn.Module keeps for itself; of those only `training` steers a forward."""


@attrs.frozen
class Read:
    """One attribute that a forward read: `self.training`, an annealed `self.tau`.

    Attributes:
        path: of the module, the root as `""`.
        name: of the attribute.
        value: what it was.
    """

    path: str
    name: str
    value: bool | float | str | None


@contextlib.contextmanager
def noted_reads(model: nn.Module, writer: Any) -> Iterator[dict[tuple[str, str], Read]]:
    """Fill a dict with the reads of plain attributes while `writer` writes.

    A graph holds such a value as it was; a leaf module reads its own at every call.
    """
    paths = {module: path for path, module in reversed([*model.named_modules()])}
    found: dict[tuple[str, str], Read] = {}
    inlined: dict[Any, Any] = {
        type(module): type(module).__getattribute__
        for module in paths
        if module is model or not is_leaf(module)
        if not isinstance(module, torch.jit.ScriptModule)
    }

    def noting(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def read(self: Any, name: str) -> Any:
            value = original(self, name)
            if type(value) in _PLAIN and name not in _OF_TORCH and writer.writing:
                path = paths.get(self)
                if path is not None and name in original(self, "__dict__"):
                    found.setdefault((path, name), Read(path, name, value))
            return value

        return read

    with contextlib.ExitStack() as undo:
        for cls, original in inlined.items():
            if "__getattribute__" in vars(cls):
                undo.callback(setattr, cls, "__getattribute__", original)
            else:
                undo.callback(delattr, cls, "__getattribute__")
            cls.__getattribute__ = noting(original)
        yield found


class Expected:
    """The attributes that one graph depends on, to be compared before each call."""

    def __init__(self, model: nn.Module, reads: Iterable[Read]) -> None:
        # The modules' own dicts, looked up once: this runs before every call.
        self._reads = [(vars(model.get_submodule(read.path)), read) for read in reads]

    def check(self) -> None:
        """Raise SpecialisationError if one is not what it was when the model was traced."""
        for fields, read in self._reads:
            now = fields.get(read.name)
            if now is not read.value and now != read.value and now == now:  # noqa: PLR0124 - NaN
                raise SpecialisationError(_changed(read, now))


def _changed(read: Read, now: Any) -> str:
    if read.name == "training":
        was, is_now = ("train", "eval") if read.value else ("eval", "train")
        what = f"module {read.path!r} was in {was} mode when traced and is in {is_now} mode now"
    else:
        where = f"{read.path}.{read.name}" if read.path else read.name
        what = (
            f"attribute {where!r} was {read.value!r} when the model was traced and is {now!r} now"
        )
    return (
        f"{what}, and its forward reads that. Set it first, then trace again "
        "(xray.model = model) and take xray.rewrite() anew"
    )
