"""From tensors on some device to the numbers a store takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

__all__ = ["all_to_numpy", "dtype_name", "to_numpy"]

T = TypeVar("T")

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


def all_to_numpy(
    tensors: Sequence[torch.Tensor], together: Iterable[Sequence[int]]
) -> tuple[list[NDArray[Any]], dict[int, Exception]]:
    """Return `to_numpy` of each tensor, and by their place the errors that some raised.

    Args:
        tensors: what somebody's selections kept.
        together: places of single numbers of one dtype. They come over together, for one by
            one each would cost a copy from its device, and on a CPU more than the number.
    """
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        # They may have been made on another stream than the one they are read on.
        torch.cuda.synchronize(device)
    found: list[Any] = [None] * len(tensors)
    for places in together:
        for same in _by_device(tensors, places):
            stacked = _attempted(_stacked, [tensors[at] for at in same])
            if not isinstance(stacked, Exception):
                for row, at in enumerate(same):
                    found[at] = stacked[row, ...]
    errors: dict[int, Exception] = {}
    for at, array in enumerate(found):
        if array is None:
            found[at] = alone = _attempted(_alone, tensors[at])
            if isinstance(alone, Exception):
                errors[at] = alone
    return found, errors


def _by_device(tensors: Sequence[torch.Tensor], places: Sequence[int]) -> Iterable[Sequence[int]]:
    if all([tensors[at].is_cpu for at in places]):  # noqa: C419 - a list takes half the time
        return [places]
    of_device: dict[torch.device, list[int]] = {}
    for at in places:
        of_device.setdefault(tensors[at].device, []).append(at)
    return of_device.values()


def _attempted(convert: Callable[[T], NDArray[Any]], tensors: T) -> NDArray[Any] | Exception:
    try:
        return convert(tensors)
    except Exception as error:  # noqa: BLE001 - of a tensor that a stranger made
        return error


def _stacked(tensors: list[torch.Tensor]) -> NDArray[Any]:
    return to_numpy(torch.stack(tensors))


def _alone(tensor: torch.Tensor) -> NDArray[Any]:
    # `to_numpy` costs three times as much; what it resolves is rare.
    if tensor.is_cpu and tensor.dtype not in _BITS and not (tensor.is_conj() or tensor.is_neg()):
        return tensor.numpy()
    return to_numpy(tensor)
