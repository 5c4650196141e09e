"""The example inputs that `--input` describes."""

from __future__ import annotations

import argparse
import re

import attrs
import torch

from fxray.errors import nearest

__all__ = ["InputWords", "input_words", "inputs_of"]

_WORDS = re.compile(r"(?:(\w+)=)?([\dx]+)(?::(\w+))?(?:<(\d+))?")
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float32", "float64", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint8"),
    )
}
_SMALL = 2
"""Whole numbers are drawn below it unless the user says more: it fits any embedding."""


@attrs.frozen
class InputWords:
    """One tensor of an example call, as the user describes it.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        below: what its whole numbers are drawn below.
        name: keyword that it is passed by; empty for a positional one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    below: int = _SMALL
    name: str = ""

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Return such a tensor: normal, or whole from 0 to but without `below`."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            wide = self.dtype if self.dtype.is_complex else torch.float32
            return torch.randn(self.shape, generator=generator, dtype=wide).to(self.dtype)
        return torch.randint(self.below, self.shape, generator=generator).to(self.dtype)


def input_words(text: str) -> InputWords:
    """Return what `[NAME=]SHAPE[:DTYPE][<N]` says.

    >>> input_words("ids=2x12:int64<100")
    InputWords(shape=(2, 12), dtype=torch.int64, below=100, name='ids')
    >>> input_words("2x3x32x32").dtype
    torch.float32

    Raises:
        ArgumentTypeError: it says nothing of the kind.
    """
    found = _WORDS.fullmatch(text)
    sizes = found[2].split("x") if found else [""]
    if not found or not all(sizes):
        msg = f"{text!r} describes no tensor; write 2x3x32x32, 2x12:int64 or 'ids=2x12:int64<100'"
        raise argparse.ArgumentTypeError(msg)
    name, dtype, below = found[1] or "", found[3] or "float32", found[4]
    if dtype not in _DTYPES:
        close = nearest(dtype, _DTYPES, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(_DTYPES)}"
        msg = f"{text!r}: no dtype {dtype!r} can be drawn; {hint}"
        raise argparse.ArgumentTypeError(msg)
    kind = _DTYPES[dtype]
    whole = not (kind.is_floating_point or kind.is_complex or kind is torch.bool)
    if below is not None and (not whole or not int(below)):
        msg = f"{text!r}: <N bounds whole numbers; write a dtype of them, as in '2x12:int64<100'"
        raise argparse.ArgumentTypeError(msg)
    return InputWords(tuple(map(int, sizes)), kind, int(below or _SMALL), name)


def inputs_of(
    described: list[InputWords],
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Return the positional and the keyword arguments described; the same every time."""
    generator = torch.Generator().manual_seed(0)
    drawn = [(words.name, words.draw(generator)) for words in described]
    return tuple(t for name, t in drawn if not name), {name: t for name, t in drawn if name}
