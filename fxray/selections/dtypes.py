"""What dtype the numbers of a tensor are reckoned in."""

from __future__ import annotations

import torch

from fxray.architecture import TensorSpec

__all__ = ["as_real", "scalar", "wide_dtype"]

WIDE = {torch.float64, torch.complex128, torch.int32, torch.int64, torch.uint32, torch.uint64}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what numbers of `dtype` are summed in: at least float32, complex as such."""
    if dtype.is_complex:
        return torch.complex128 if dtype in WIDE else torch.complex64
    return torch.float64 if dtype in WIDE else torch.float32


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as float32 or float64; a complex one as its magnitude."""
    dtype = wide_dtype(tensor.dtype)
    # Even a `to` that changes nothing costs as much as the sum of a small tensor.
    wide = tensor if tensor.dtype is dtype else tensor.to(dtype)
    return wide.abs() if dtype.is_complex else wide


def scalar(dtype: torch.dtype) -> TensorSpec:
    """Return the spec of a 0-dim tensor of `dtype`."""
    return TensorSpec((), str(dtype).removeprefix("torch."))
