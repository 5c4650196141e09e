"""From a tensor on some device to the numbers a store takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["dtype_name", "to_numpy"]

_BITS = {
    dtype: torch.uint16 if dtype.itemsize == 2 else torch.uint8
    for name, dtype in vars(torch).items()
    if isinstance(dtype, torch.dtype) and name.startswith(("bfloat16", "float8_"))
}
"""The dtypes that numpy does not have, and the one whose bits they travel as."""


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the dtype as the store writes it, e.g. `"bfloat16"`."""
    return str(tensor.dtype).removeprefix("torch.")


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Return the numbers of `tensor` as a numpy array on the CPU.

    bfloat16 and float8, which numpy does not have, come as raw bits (uint16, uint8).
    """
    flat = tensor.detach()
    bits = _BITS.get(flat.dtype)
    if bits is not None:
        flat = flat.contiguous().view(bits)
    if flat.is_conj() or flat.is_neg():
        flat = flat.resolve_conj().resolve_neg()
    array: NDArray[Any] = flat.cpu().numpy()
    return array
