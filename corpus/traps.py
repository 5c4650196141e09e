"""Small models, each with one thing in it that tracers of PyTorch get wrong.

Every class is a trap; its docstring says which, and its name is the name of the case.
"""

# To mypy a module's attribute is Tensor | Module, and models are written here as people write them.
# mypy: ignore-errors

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import random
import re
import warnings
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrizations, rnn, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from corpus.case import EVERYTHING, Case, Sizes

__all__ = ["CASES"]

_CASES: list[Case] = []


def trap(call, **words):
    """Make a case of a class: its name in snake case, its docstring's first line as why."""

    def add(cls):
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__)
        why = cls.__doc__.splitlines()[0]
        varies = frozenset(words.pop("varies", EVERYTHING))
        _CASES.append(Case(name.lower(), cls, call, varies, why=why, **words))
        return cls

    return add


# ---------------------------------------------------------------- what they are called with


def _randn(s: Sizes, *shape: int):
    """Return normal numbers whose mean is above 0.5 for even seeds, below -0.5 for odd ones."""
    noise = torch.randn(shape, generator=s.generator())
    return noise - noise.mean() + (0.6 if s.seed % 2 == 0 else -0.6)


def vectors(s: Sizes):
    """Shape (batch, 8)."""
    return (_randn(s, s.batch, 8),), {}


def sequence(s: Sizes):
    """Shape (batch, length, 8)."""
    return (_randn(s, s.batch, s.length, 8),), {}


def image(s: Sizes):
    """Shape (batch, 3, length, length)."""
    return (_randn(s, s.batch, 3, s.length, s.length),), {}


def _ids(s: Sizes):
    return torch.randint(0, 11, (s.batch, s.length), generator=s.generator())


def tokens(s: Sizes):
    """Shape (batch, length), int64 below 11."""
    return (_ids(s),), {}


NO_LENGTH = ("values", "batch")


# ---------------------------------------------------------------- activations, in place, modes


@trap(vectors, varies=NO_LENGTH)
class FunctionalReluTwice(nn.Module):
    """Two functional activations that no module hook sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return torch.relu(self.b(F.relu(self.a(x))))


@trap(vectors, varies=NO_LENGTH)
class ReluModuleUsedTwice(nn.Module):
    """One ReLU module called twice: two ops, not the last one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 4), nn.ReLU()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


@trap(image, varies=EVERYTHING)
class InplaceReluAfterConv(nn.Module):
    """An activation in place, after an op whose output is kept."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.relu(self.conv(x)))).mean((2, 3))


@trap(image)
class ResidualAddedInPlace(nn.Module):
    """`out += identity`, then an activation in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


@trap(sequence)
class InPlaceOnViews(nn.Module):
    """Writes through slices and transposes of one tensor."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x) * 1.0
        y[:, 0].mul_(2.0)
        y.transpose(1, 2)[:, :4].add_(1.0)
        y[..., -1] = x[..., 0]
        return torch.relu_(y)


@trap(sequence)
class ItemAssignment(nn.Module):
    """Shifts right by assigning to a slice, as T5 and BART do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        shifted = x.new_zeros(x.shape)
        shifted[:, 1:] = x[:, :-1].clone()
        shifted[:, 0] = 3.0
        return self.fc(shifted)


@trap(vectors, varies=NO_LENGTH, training=False)
class OutArgument(nn.Module):
    """Writes into a buffer through `out=`."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            room = torch.empty_like(x)
            torch.add(x, 1.0, out=room)
            torch.sigmoid(room, out=room)
        return self.fc(room)


@trap(sequence)
class FunctionalDropout(nn.Module):
    """`F.dropout` that hangs on `self.training`."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.dropout(F.gelu(self.fc(x)), 0.3, training=self.training)


class _Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return F.dropout(torch.tanh(self.bn(self.fc(x))), 0.5, self.training)


@trap(vectors, varies=NO_LENGTH)
class FrozenPartStaysInEval(nn.Module):
    """A part in eval and without gradients inside a training model; `train` sees to it."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = _Frozen(), nn.Linear(8, 3)
        self.frozen.requires_grad_(requires_grad=False)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.head(F.dropout(self.frozen(x), 0.2, self.training))


@trap(vectors, varies=NO_LENGTH, batches=(4, 2, 7))
class BatchNormManyBatches(nn.Module):
    """Running statistics must move as without a trace."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.net(x)


@trap(vectors, varies=NO_LENGTH, batches=(1, 3), training=False)
class BatchNormBatchOfOne(nn.Module):
    """Traced with a batch of one, where BatchNorm itself cannot train."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return torch.sigmoid(self.bn(self.fc(x)))


@trap(vectors, varies=NO_LENGTH)
class TrainAndEvalDiffer(nn.Module):
    """Returns a tuple in training and a tensor in eval, as Inception does."""

    def __init__(self):
        super().__init__()
        self.fc, self.aux = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x):
        if self.training:
            return self.fc(x), self.aux(x)
        return self.fc(x)


# ---------------------------------------------------------------- sizes


class _Sized(nn.Module):
    """A linear layer before what is done with the sizes."""

    def __init__(self, out=8):
        super().__init__()
        self.fc = nn.Linear(8, out)


@trap(sequence)
class ViewBySize(_Sized):
    """`view(x.size(0), -1)` and back."""

    def forward(self, x):
        y = self.fc(x).view(x.size(0), -1)
        return y.view(x.size(0), x.size(1), -1).relu()


@trap(sequence)
class ViewByLen(_Sized):
    """`len(x)` comes through C, where sizes forget where they are from."""

    def forward(self, x):
        return self.fc(x).reshape(len(x), -1).sum(1) / len(x)


@trap(sequence)
class ShapeUnpackedWithStar(_Sized):
    """`*lead, c = x.shape` and `view(*lead, 2, c // 2)`."""

    def forward(self, x):
        *lead, c = x.shape
        return self.fc(x).view(*lead, 2, c // 2).softmax(-1).reshape(*x.shape[:-1], -1)


@trap(sequence)
class ReshapeByProduct(_Sized):
    """`reshape(b * t, c)` and back by arithmetic."""

    def forward(self, x):
        b, t, c = x.shape
        y = self.fc(x.reshape(b * t, c))
        return y.view(b, (b * t) // b, c) / (t * 2 - 1)


@trap(sequence, lengths=(8, 12, 5))
class PartOfLengthByInt(_Sized):
    """`int(n * 0.25)` makes a plain number of a size."""

    def forward(self, x):
        keep = int(x.size(1) * 0.25)
        return self.fc(x)[:, :keep].mean(1) + max(1, int(x.shape[1] / 3))


@trap(sequence, lengths=(5, 8, 11))
class RoundedSizes(_Sized):
    """Sizes through round, ceil, floor, divmod, shifts and sqrt."""

    def forward(self, x):
        n = x.size(1)
        many, rest = divmod(n, 3)
        scale = math.ceil(n / 2) + math.floor(n * 0.7) + round(n / 4) + (n >> 1) + many - rest
        return self.fc(x) * scale / math.sqrt(n) ** (n % 2)


@trap(sequence)
class FloatOfLen(_Sized):
    """`float(len(x))` in arithmetic."""

    def forward(self, x):
        return self.fc(x).sum() / float(len(x)) / float(x.shape[1])


@trap(sequence)
class NumelInLoss(_Sized):
    """Divides by `numel()`, `nelement()` and `x.dim()`."""

    def forward(self, x):
        y = self.fc(x)
        return (y.pow(2).sum() / y.numel()) * x.nelement() / y.dim() / y[0].numel()


@trap(sequence)
class PositionsByArange(_Sized):
    """Positions made in the forward by `arange` of a size."""

    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(20, 8)

    def forward(self, x):
        at = torch.arange(x.size(1), device=x.device)
        return self.fc(x + self.position(at)[None])


@trap(sequence)
class ZerosAsState(_Sized):
    """`zeros(batch, …)` made in the forward."""

    def forward(self, x):
        state = torch.zeros(x.shape[0], 1, 8, dtype=x.dtype, device=x.device)
        return self.fc(torch.cat([state, x], 1)) + torch.full((x.size(1) + 1, 1), 0.5)


@trap(sequence)
class SizeInTensor(_Sized):
    """A size inside `torch.tensor([n])` and `torch.full((), n)`."""

    def forward(self, x):
        n = torch.tensor([x.size(1), x.size(0)], dtype=x.dtype)
        y = self.fc(x) / n[0] + torch.full((), x.size(1), dtype=x.dtype) * n[1]
        return y, torch.tensor([x.shape[1]])


@trap(sequence)
class CausalMaskFromSize(_Sized):
    """Attention with a mask made from the length."""

    def forward(self, x):
        t = x.size(1)
        mask = torch.triu(torch.ones(t, t, dtype=torch.bool), diagonal=1)
        scores = (self.fc(x) @ x.transpose(-2, -1)) / math.sqrt(x.size(-1))
        return F.softmax(scores.masked_fill(mask, torch.finfo(scores.dtype).min), -1) @ x


@trap(sequence, scratch=frozenset({"masks"}))
class CausalMaskCachedOnModule(_Sized):
    """A dict on the module, keyed by the length, filled by the first call."""

    def __init__(self):
        super().__init__()
        self.masks = {}

    def forward(self, x):
        t = x.size(1)
        if t not in self.masks:
            self.masks[t] = torch.full((t, t), -torch.inf).triu(1)
        return torch.softmax(self.fc(x) @ x.mT + self.masks[t], -1) @ x


@functools.lru_cache
def _table(length: int, width: int) -> torch.Tensor:
    return torch.arange(length * width, dtype=torch.float32).view(length, width).cos()


@trap(sequence, reset=_table.cache_clear)
class TableFromLruCache(_Sized):
    """A table that all models share, keyed by shape."""

    def forward(self, x):
        return self.fc(x) * _table(x.size(1), x.size(2))


@trap(sequence, scratch=frozenset({"rope", "length"}))
class RotaryTableGrows(_Sized):
    """A buffer made again when a longer sequence comes, as rotary embeddings are."""

    def __init__(self):
        super().__init__()
        self.rope, self.length = None, 0

    def forward(self, x):
        if self.rope is None or x.size(1) > self.length:
            self.length = x.size(1)
            self.rope = torch.outer(torch.arange(self.length), torch.ones(8)).sin()
        return self.fc(x) * self.rope[: x.size(1)]


@trap(vectors, varies=NO_LENGTH)
class LoopOverBatch(_Sized):
    """A Python loop over the samples."""

    def forward(self, x):
        return torch.stack([torch.tanh(self.fc(x[i])) * (i + 1) for i in range(x.size(0))])


@trap(sequence)
class LoopOverSequence(nn.Module):
    """A recurrent cell by hand, in a Python loop over time."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(8, 5)

    def forward(self, x):
        h, out = x.new_zeros(x.size(0), 5), []
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            out.append(h)
        return torch.stack(out, 1), h


@trap(sequence)
class IteratesOverTensor(_Sized):
    """`for row in x`, `zip`, `enumerate` and `unbind`."""

    def forward(self, x):
        y = [self.fc(row).relu() for row in x]
        total = sum(a * b for a, b in zip(y, x, strict=True))
        return total, [i * t.mean() for i, t in enumerate(x.unbind(1))]


@trap(sequence, lengths=(6, 10))
class BranchOnLength(_Sized):
    """Another way through for long sequences."""

    def forward(self, x):
        if x.size(1) > 8:
            return self.fc(x.flip(1)).tanh()
        return self.fc(x)


@trap(vectors, varies=NO_LENGTH, batches=(2, 4, 3))
class BranchOnBatch(_Sized):
    """Even batches are split, odd ones are not."""

    def forward(self, x):
        if x.shape[0] % 2 == 0:
            a, b = x.chunk(2)
            return torch.cat([self.fc(a), self.fc(b) * 2])
        return self.fc(x)


@trap(vectors, varies=NO_LENGTH, batches=(2, 3))
class SettingsByBatchSize(_Sized):
    """A plain dict on the module, looked up by the batch size."""

    def __init__(self):
        super().__init__()
        self.scale = {2: 0.5, 3: 4.0}

    def forward(self, x):
        return self.fc(x) * self.scale[x.size(0)]


@trap(sequence)
class ShapeAsText(_Sized):
    """An f-string of the shape is the key of a dict."""

    def forward(self, x):
        named = {f"{x.size(1)}x{x.size(2)}": 2.0, str(tuple(x.shape)): 3.0}
        return self.fc(x) * sum(named.values()) * len(f"{x.shape}")


@trap(sequence)
class AssertsOnShapes(_Sized):
    """Assertions and comparisons of shapes."""

    def forward(self, x):
        y = self.fc(x)
        assert y.shape == x.shape, f"{y.shape} is not {x.shape}"
        assert y.size(0) > 0
        assert x.dim() == 3
        if y.shape[:-1] != x.shape[:-1]:
            raise ValueError
        torch._assert(x.size(1) >= 1, "empty")
        return y + x


@trap(image, lengths=(8, 6))
class InterpolateToOther(nn.Module):
    """Resizes to the size of another tensor, and by a factor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=2, padding=1)

    def forward(self, x):
        small = self.conv(x)
        up = F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)
        half = F.interpolate(up, scale_factor=0.5, mode="nearest")
        return up + x, F.adaptive_avg_pool2d(half, (x.shape[2] // 4, 2))


@trap(image, lengths=(6, 9))
class PadToMultiple(nn.Module):
    """Pads to a multiple of 4 by `-n % 4`, cuts windows, undoes both, as Swin does."""

    def forward(self, x):
        b, c, h, w = x.shape
        x = F.pad(x, (0, -w % 4, 0, -h % 4))
        hp, wp = x.shape[2:]
        y = x.view(b, c, hp // 4, 4, wp // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        y = y.softmax(-1).view(b, hp // 4, wp // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(b, c, hp, wp)
        return y[:, :, :h, :w] if hp > h or wp > w else y


def rearrange(x: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """Return x by a pattern such as "b t (h d) -> b h t d", as einops does."""
    left, right = pattern.split("->")
    outer = re.findall(r"\([^)]*\)|\S+", left)
    names, shape = [], []
    for part, size in zip(outer, x.shape, strict=True):
        inner = part.strip("()").split()
        known = math.prod(sizes[name] for name in inner if name in sizes)
        for name in inner:
            names.append(name)
            shape.append(sizes.get(name) or size // known)
    x = x.reshape(shape)
    groups = [g.strip("()").split() for g in re.findall(r"\([^)]*\)|\S+", right)]
    x = x.permute([names.index(n) for group in groups for n in group])
    return x.reshape([math.prod(shape[names.index(n)] for n in group) for group in groups])


@trap(sequence)
class RearrangedByPattern(_Sized):
    """Reshapes by a pattern in words, as einops does."""

    def forward(self, x):
        q = rearrange(self.fc(x), "b t (h d) -> b h t d", h=2)
        y = F.scaled_dot_product_attention(q, q, q)
        return rearrange(y, "b h t d -> b t (h d)") + torch.einsum("btc,bsc->bts", x, x).sum()


@trap(sequence)
class ExpandedAndStrided(_Sized):
    """`expand(-1)`, `as_strided`, `unfold` and `repeat_interleave` by sizes."""

    def forward(self, x):
        b, t, c = x.shape
        y = self.fc(x).contiguous()
        windows = y.as_strided((b, t - 1, 2, c), (t * c, c, c, 1)).mean(2)
        cls = y[:, :1].expand(b, t - 1, -1)
        return windows + cls + y.unfold(1, 2, 1).sum(-1), y.repeat_interleave(b, 0)


@trap(image)
class UnfoldAndFold(nn.Module):
    """Patches by `F.unfold` and back, with `output_size` from the shape."""

    def forward(self, x):
        patches = F.unfold(x, 3, padding=1)
        return F.fold(patches * 2, x.shape[2:], 3, padding=1) / patches.shape[1]


@trap(image)
class SpectralConv(nn.Module):
    """A convolution in Fourier space: complex numbers and `irfft2(s=…)`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 2, 2, dtype=torch.cfloat))

    def forward(self, x):
        ft = torch.fft.rfft2(x)
        out = torch.zeros(x.size(0), 4, *ft.shape[-2:], dtype=torch.cfloat)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", ft[:, :, :2, :2], self.weight)
        return torch.fft.irfft2(out, s=x.shape[-2:])


@trap(sequence)
class ComplexRotary(_Sized):
    """Rotates through `view_as_complex`, `polar` and returns a complex tensor."""

    def forward(self, x):
        y = torch.view_as_complex(self.fc(x).float().reshape(*x.shape[:-1], -1, 2))
        angles = torch.outer(torch.arange(x.size(1)), torch.arange(4) / 4.0)
        turned = y * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2), turned


@trap(image)
class ChannelsLast(nn.Module):
    """Memory formats, and a branch on contiguity."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = x.to(memory_format=torch.channels_last)
        y = F.relu(self.conv(x))
        if not y.is_contiguous():
            y = y.permute(0, 2, 3, 1)
        return y.contiguous() if y.stride(-1) == 1 else y


# ---------------------------------------------------------------- grad modes, autocast, functions


@trap(vectors, varies=NO_LENGTH)
class NoGradRegion(_Sized):
    """A teacher under `no_grad`."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            target = torch.sigmoid(self.teacher(x))
        return (self.fc(x) - target).pow(2)


@trap(vectors, varies=NO_LENGTH)
class EnableGradInsideNoGrad(_Sized):
    """`enable_grad` within `no_grad`, and `set_grad_enabled` by a flag."""

    def forward(self, x):
        with torch.no_grad():
            a = self.fc(x)
            with torch.enable_grad():
                b = self.fc(a).tanh()
            c = self.fc(b)
        with torch.set_grad_enabled(self.training):
            d = self.fc(x).relu()
        return a, b, c, d


@trap(vectors, varies=NO_LENGTH)
class NoGradMethod(_Sized):
    """A method decorated with `torch.no_grad()`."""

    @torch.no_grad()
    def normaliser(self, x):
        return self.fc(x).abs().amax(1, keepdim=True) + 1

    def forward(self, x):
        return self.fc(x) / self.normaliser(x)


@trap(vectors, varies=NO_LENGTH)
class DetachedTarget(_Sized):
    """Stop-gradient by `detach` and `.data`."""

    def forward(self, x):
        y = self.fc(x)
        return y * y.detach() + x.data.mean() + y.detach_().sum()


@trap(vectors, varies=NO_LENGTH)
class StraightThrough(_Sized):
    """A straight-through estimator: forward rounds, backward does not."""

    def forward(self, x):
        y = torch.sigmoid(self.fc(x))
        return y + (y.round() - y).detach()


@trap(vectors, varies=NO_LENGTH)
class AutocastRegion(_Sized):
    """A bf16 region with a float32 island, as attention has."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.relu(self.fc(x))
            with torch.autocast("cpu", enabled=False):
                z = self.fc(y.float()).softmax(-1)
            w = self.fc(z)
        return y, z, w


@trap(vectors, varies=NO_LENGTH)
class BranchOnAutocast(_Sized):
    """Asks whether autocast is on, and what its dtype is."""

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        y = self.fc(x)
        return y.float() if y.dtype != torch.float32 else y * 2


@trap(vectors, varies=NO_LENGTH)
class BranchOnGradMode(_Sized):
    """Another way through without gradients, as fused kernels take."""

    def forward(self, x):
        if torch.is_grad_enabled():
            return self.fc(x).exp()
        return self.fc(x).expm1() + 1.5


@trap(vectors, varies=NO_LENGTH)
class BranchOnRequiresGrad(_Sized):
    """Asks a tensor and a parameter whether they require a gradient."""

    def forward(self, x):
        y = self.fc(x)
        if y.requires_grad and self.fc.weight.requires_grad:
            y = y * 2
        return y if x.requires_grad else y + 1


@trap(vectors, varies=NO_LENGTH)
class BranchOnDtype(_Sized):
    """Branches on dtype and device, `finfo` for a mask."""

    def forward(self, x):
        y = self.fc(x)
        if y.dtype in (torch.float16, torch.bfloat16):
            y = y.float()
        low = torch.finfo(y.dtype).min
        y = y.clamp(min=low / 2) if y.device.type == "cuda" else y
        return torch.where(y > 0, y, torch.full([], low, dtype=y.dtype)).softmax(-1)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


@trap(vectors, varies=NO_LENGTH)
class CustomBackward(_Sized):
    """An `autograd.Function` whose backward is not that of its forward."""

    def forward(self, x):
        return _ScaleGradient.apply(self.fc(x).relu(), -0.5)


class _TanhFunction(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(x, scale):
        return torch.tanh(x) * scale, x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad, _):
        (x,) = ctx.saved_tensors
        return grad * ctx.scale * x, None


@trap(sequence)
class CustomFunctionTwoOutputs(_Sized):
    """An `autograd.Function` with `setup_context`, a size as argument, two outputs."""

    def forward(self, x):
        y, sign = _TanhFunction.apply(self.fc(x), x.size(1))
        return y * sign


@trap(vectors, varies=NO_LENGTH, graph=False)
class GradientScaledByHook(_Sized):
    """`register_hook` on an activation: the backward is another one."""

    def forward(self, x):
        y = self.fc(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 0.1)
        return y.relu()


@trap(vectors, varies=NO_LENGTH)
class RequiresGradOnInput(_Sized):
    """Makes its input require a gradient, and asks for it within the forward."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = torch.tanh(self.fc(x)).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=self.training)
        return energy, force


class _Part(nn.Module):
    def __init__(self, act=nn.GELU):
        super().__init__()
        self.fc, self.act, self.drop = nn.Linear(8, 8), act(), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.act(self.fc(x)))


@trap(sequence)
class Checkpointed(nn.Module):
    """Non-reentrant checkpoints with dropout inside."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([_Part(), _Part()])

    def forward(self, x):
        for part in self.parts:
            if self.training:
                x = checkpoint(part, x, use_reentrant=False)
            else:
                x = part(x)
        return x


@trap(sequence)
class CheckpointedReentrant(_Sized):
    """A reentrant checkpoint of a method, with dropout inside."""

    def __init__(self):
        super().__init__()
        self.part = _Part()

    def inner(self, x, y):
        return self.part(x) + y

    def forward(self, x):
        return checkpoint(self.inner, self.fc(x), x, use_reentrant=True)


@trap(sequence)
class NestedCheckpoints(_Sized):
    """A checkpoint in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.a, self.b = _Part(), _Part()

    def both(self, x):
        return checkpoint(self.b, self.a(x), use_reentrant=False) * 2

    def forward(self, x):
        return checkpoint(self.both, self.fc(x), use_reentrant=False)


@trap(sequence)
class CheckpointedSequential(nn.Module):
    """`checkpoint_sequential`, with a closure over a size."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(_Part(), _Part(nn.SiLU), _Part(nn.Tanh))

    def forward(self, x):
        n = x.size(1)
        x = torch.utils.checkpoint.checkpoint_sequential(self.parts, 2, x, use_reentrant=False)
        return checkpoint(lambda y: y / n, x, use_reentrant=False)


@trap(sequence, graph=False)
class VmapInside(_Sized):
    """`torch.vmap` over the batch in the forward."""

    def forward(self, x):
        return torch.vmap(lambda row: torch.outer(row.mean(0), row[0]).softmax(-1))(self.fc(x))


@trap(vectors, varies=NO_LENGTH, graph=False)
class FuncGradInside(_Sized):
    """`torch.func.grad` in the forward, as an energy model does."""

    def forward(self, x):
        force = torch.func.grad(lambda y: torch.tanh(y @ self.fc.weight).sum())(x)
        return self.fc(x) + force


@trap(vectors, varies=NO_LENGTH)
class FunctionalCall(_Sized):
    """Runs a module with other weights by `torch.func.functional_call`."""

    def forward(self, x):
        weights = {"weight": self.fc.weight * 0.5, "bias": self.fc.bias + 1}
        return torch.func.functional_call(self.fc, weights, (x,)).relu()


# ---------------------------------------------------------------- scripts, wraps, foreign functions


def _scripted(code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, and in many models
        return torch.jit.script(code)


@_scripted
def _scripted_branch(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # Nothing whose gradient a second run, optimised, sums in another order.
    y = torch.relu(x) - bias
    if y.sum() > 0:
        return y * 2.0
    return y * 0.5


@trap(sequence)
class ScriptedFunction(_Sized):
    """A `torch.jit.script` function with a branch on values."""

    def forward(self, x):
        return _scripted_branch(self.fc(x), self.fc.bias)


class _ToScript(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(x.size(0)):
            x = torch.relu(self.fc(x))
        return x


@trap(vectors, varies=NO_LENGTH)
class ScriptedChild(_Sized):
    """A ScriptModule as a child, its loop inside."""

    def __init__(self):
        super().__init__()
        self.child = _scripted(_ToScript())

    def forward(self, x):
        return self.fc(self.child(x)).sigmoid()


@torch.fx.wrap
def wrapped_norm(x, eps):
    """Normalise over the last axis."""
    return x / (x.norm(dim=-1, keepdim=True) + eps)


@trap(sequence)
class WrappedFunction(_Sized):
    """A function registered with `torch.fx.wrap`."""

    def forward(self, x):
        return wrapped_norm(self.fc(x), 1e-3)


@trap(image, lengths=(8, 10))
class OpsOfTorchvision(nn.Module):
    """Functions of torchvision, one of them registered with `torch.fx.wrap`."""

    def __init__(self):
        super().__init__()
        # Imported when it is built: the other traps do without it.
        from corpus.torchvision_models import import_torchvision

        self.ops = import_torchvision().ops
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "ops"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.ops = importlib.import_module("torchvision.ops")

    def forward(self, x):
        y = self.ops.stochastic_depth(self.conv(x), 0.3, "row", self.training)
        boxes = torch.cumsum(y.mean((2, 3)).sigmoid(), 1)
        return self.ops.box_iou(boxes, boxes + 0.1), self.ops.sigmoid_focal_loss(y, (y > 0).float())


@trap(sequence)
class PartialAndClosure(nn.Module):
    """`functools.partial` of a function, a closure and a lambda called in the forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), functools.partial(F.leaky_relu, negative_slope=0.3)
        self.acts = {"gelu": F.gelu, "silu": F.silu}

    def forward(self, x):
        scale = x.size(-1)

        def scaled(y):
            return y / scale

        return scaled(self.act(self.fc(x))) + self.acts["gelu"](x) * self.acts["silu"](x)


# ---------------------------------------------------------------- what goes in


@trap(lambda s: ((), {"x": sequence(s)[0][0], "scale": 2.0}))
class KeywordsOnly(_Sized):
    """Called by keywords alone, arguments left at their defaults."""

    def forward(self, *, x, mask=None, scale=1.0, bias=None):
        y = self.fc(x) * scale
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        return y if bias is None else y + bias


@trap(lambda s: ((sequence(s)[0][0], None, sequence(s)[0][0] > 0), {"past": None}))
class NoneArguments(_Sized):
    """None between tensors, in arguments that steer."""

    def forward(self, x, embeds=None, mask=None, past=None):
        x = x if embeds is None else embeds
        y = self.fc(x)
        return (y if mask is None else torch.where(mask, y, 0.0)), past


@trap(lambda s: ((sequence(s)[0][0],), {"return_hidden": True, "mode": "tanh"}))
class FlagArguments(_Sized):
    """A bool and a text steer what is done and returned."""

    def forward(self, x, return_hidden=False, mode="relu"):
        y = getattr(torch, mode)(self.fc(x))
        return (y.mean(1), y) if return_hidden else y.mean(1)


class Pooling(Enum):
    """How a sequence becomes a vector."""

    MEAN = "mean"
    MAX = "max"


@trap(lambda s: ((sequence(s)[0][0], Pooling.MAX), {}))
class EnumArgument(_Sized):
    """An enum steers the pooling."""

    def forward(self, x, pooling=Pooling.MEAN):
        y = self.fc(x)
        return y.amax(1) if pooling is Pooling.MAX else y.mean(1)


def _same_twice(s):
    ids = _ids(s)
    return (ids,), {"labels": ids}


@trap(_same_twice)
class SameTensorTwice(nn.Module):
    """One tensor object given as two arguments: two inputs, not one."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids, labels=None):
        logits = self.head(self.embed(ids))
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
        return {"loss": loss, "logits": logits}


def _nested(s):
    x = sequence(s)[0][0]
    return ({"image": x, "meta": {"lengths": torch.full((s.batch,), s.length), "name": "a"}},), {}


@trap(_nested)
class NestedDictInput(_Sized):
    """A dict of dicts goes in, of tensors and texts."""

    def forward(self, batch):
        x, meta = batch["image"], batch["meta"]
        keep = torch.arange(x.size(1))[None] < meta["lengths"][:, None]
        return {**{k: v for k, v in meta.items() if k != "name"}, "y": self.fc(x) * keep[..., None]}


def _images(s):
    g = s.generator()
    return ([torch.randn(3, s.length + i, s.length + 2 * i, generator=g) for i in range(2)],), {}


@trap(_images, varies=("values", "length"))
class ListOfImages(nn.Module):
    """A list of images of different sizes, padded to one batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        height = max(image.shape[-2] for image in images)
        width = max(image.shape[-1] for image in images)
        batch = images[0].new_zeros((len(images), 3, height, width))
        for image, room in zip(images, batch, strict=True):
            room[:, : image.shape[1], : image.shape[2]].copy_(image)
        return F.relu(self.conv(batch)), [tuple(image.shape[-2:]) for image in images]


def _images_by_batch(s):
    return (list(_randn(s, s.batch, 3, s.length, s.length)),), {}


@trap(_images_by_batch)
class AsManyImagesAsBatch(nn.Module):
    """A list with as many tensors as the batch has samples."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return [self.conv(image[None]).mean((2, 3)) for image in images], torch.stack(images).sum()


Graph = namedtuple("Graph", ["nodes", "edges"])


def _graph(s):
    edges = torch.randint(0, s.batch, (2, s.length), generator=s.generator())
    return (Graph(vectors(s)[0][0], edges),), {}


@trap(_graph)
class MessagePassing(_Sized):
    """A namedtuple in, `index_add_` and `scatter` by edges."""

    def forward(self, graph):
        source, target = graph.edges
        y = self.fc(graph.nodes)
        out = torch.zeros_like(y).index_add_(0, target, y[source])
        degree = torch.zeros(len(y)).scatter_add_(0, target, torch.ones(target.numel()))
        return Graph(out / degree.clamp(min=1)[:, None], graph.edges)


@trap(lambda s: ((*(sequence(s)[0] * 2),), {}))
class VariadicForward(_Sized):
    """`*args` and `**kwargs` passed on."""

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def inner(self, x, y, scale=2):
        return self.fc(x) * scale + y


# ---------------------------------------------------------------- what comes out


@dataclass
class Answer:
    """A dataclass that no library knows."""

    logits: torch.Tensor
    hidden: tuple = ()
    loss: torch.Tensor | None = None


@trap(sequence)
class DataclassOutput(_Sized):
    """A dataclass comes out, with a tuple and a None inside."""

    def forward(self, x):
        y = self.fc(x)
        return Answer(y.mean(1), hidden=(x, y))


class Output(OrderedDict):
    """An OrderedDict whose keys are attributes too, as transformers' ModelOutput."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            super().__setattr__(key, value)

    def __reduce__(self):
        return Output, (dict(self),)


@trap(sequence)
class ModelOutputLike(_Sized):
    """A subclass of OrderedDict, read by attribute before it is returned."""

    def forward(self, x):
        inner = Output(hidden=self.fc(x), extra=None)
        return Output(logits=inner.hidden.relu(), hidden=inner["hidden"], sizes=len(inner))


Pair = namedtuple("Pair", ["first", "second"])


@trap(sequence)
class NestedOutput(_Sized):
    """Dicts, lists, namedtuples, numbers, None and texts, nested."""

    def forward(self, x):
        y = self.fc(x)
        pair = Pair(y, {"a": [y * 2, None], "n": x.size(1)})
        return {"pair": pair, "t": (1.5, "text", y.shape), "empty": [], 3: y.dtype}


@trap(vectors, varies=NO_LENGTH)
class ScalarOutput(_Sized):
    """A 0-dim output, by `.mean()` and by adding losses."""

    def forward(self, x):
        return self.fc(x).pow(2).mean() + sum(p.abs().sum() for p in self.parameters())


@trap(vectors, varies=NO_LENGTH)
class ReturnsItsInput(_Sized):
    """The input, a parameter and a buffer are returned as they are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return x, self.fc.weight, self.table, self.fc(x)


@trap(vectors, varies=NO_LENGTH)
class ReturnsOneTensorTwice(_Sized):
    """One tensor under two names, and a view of it."""

    def forward(self, x):
        y = self.fc(x)
        return {"a": y, "b": y, "view": y[:1]}


# ---------------------------------------------------------------- modules and parameters


@trap(tokens)
class TiedWeights(nn.Module):
    """The embedding is the head's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh()) + F.linear(self.embed(ids), self.embed.weight)


@trap(sequence)
class ListsAndDictsOfModules(nn.Module):
    """ModuleList sliced and reversed, ModuleDict by key, ParameterList and ParameterDict."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "silu": nn.SiLU()})
        self.scales = nn.ParameterList([torch.ones(8), torch.zeros(8)])
        self.biases = nn.ParameterDict({"a": torch.ones(1)})

    def forward(self, x):
        for layer, act in zip(reversed(self.layers[1:]), self.acts.values(), strict=True):
            x = act(layer(x))
        for i, scale in enumerate(self.scales):
            x = x * (i + 1) + scale
        return sum(layer(x) for layer in self.layers) + self.biases["a"]


@trap(sequence)
class AliasedModule(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_Part(), _Part()])
        self.first = self.blocks[0]

    def forward(self, x):
        return self.first(self.blocks[1](self.blocks[0](x)))


@trap(sequence)
class ModuleMadeInForward(_Sized):
    """`nn.ReLU()(x)` and a loss module made in the forward."""

    def forward(self, x):
        y = nn.Sequential(nn.ReLU(), nn.Dropout(0.0))(self.fc(x))
        return nn.MSELoss()(y, x), nn.LayerNorm(8)(y)


@trap(vectors, varies=NO_LENGTH)
class LazyNorm(nn.Module):
    """A lazy module, whose size the first call settles."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc = nn.LazyBatchNorm1d(), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.bn(x).relu())


@trap(vectors, varies=NO_LENGTH)
class Parametrized(nn.Module):
    """New-style weight_norm, spectral_norm and orthogonal."""

    def __init__(self):
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(8, 8))
        self.b = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.c = parametrizations.orthogonal(nn.Linear(8, 4))

    def forward(self, x):
        return self.c(F.relu(self.b(self.a(x))))


@trap(image)
class NormsByHooks(nn.Module):
    """Old-style weight_norm and spectral_norm: pre-hooks that set `weight`."""

    def __init__(self):
        super().__init__()
        self.a = weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.b = spectral_norm(nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, x):
        return self.b(F.leaky_relu(self.a(x), 0.1))


@trap(vectors, varies=NO_LENGTH)
class UnusedAndFrozen(_Sized):
    """A part never used, parameters without gradients, an empty Sequential."""

    def __init__(self):
        super().__init__()
        self.unused, self.nothing = nn.Linear(3, 3), nn.Sequential()
        self.fc.weight.requires_grad_(requires_grad=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.nothing(self.fc(x)))


class Tower(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x):
        outs = []
        for layer in self:
            x = layer(x)
            outs.append(x)
        return outs


@trap(sequence)
class SequentialSubclass(nn.Module):
    """A subclass of Sequential that returns every stage."""

    def __init__(self):
        super().__init__()
        self.tower = Tower(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Identity())

    def forward(self, x):
        return torch.cat(self.tower(x), -1)


class _Tree(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.children_ = nn.ModuleList([_Tree(depth - 1) for _ in range(2)] if depth else [])

    def forward(self, x):
        y = self.fc(x).relu()
        return y + sum((child(y) for child in self.children_), start=0)


@trap(sequence)
class DeepRecursion(_Tree):
    """Modules within modules, gathered by a generator expression."""

    def __init__(self):
        super().__init__(3)


@trap(sequence)
class FeatureHooks(nn.Module):
    """Forward hooks and pre-hooks that change what goes in and comes out."""

    def __init__(self):
        super().__init__()
        self.a, self.part = nn.Linear(8, 8), _Part()
        self.a.register_forward_hook(double_output)
        self.part.register_forward_pre_hook(shift_input)
        self.part.register_forward_hook(double_output)

    def forward(self, x):
        return self.part(self.a(x))


def double_output(_module, _args, out):
    """Give twice the output."""
    return out * 2


def shift_input(_module, args):
    """Give the input shifted."""
    return (args[0] + 1,)


def flip_gradient(_module, grads, _given):
    """Give the gradient the other way round."""
    return tuple(None if grad is None else -grad for grad in grads)


@trap(sequence, graph=False)
class BackwardHookOnPart(nn.Module):
    """A full backward hook on a sub-module: the gradient is another one."""

    def __init__(self):
        super().__init__()
        self.a, self.part = nn.Linear(8, 8), _Part()
        self.part.register_full_backward_hook(flip_gradient)

    def forward(self, x):
        return self.part(self.a(x))


@trap(sequence)
class CallOverridden(_Sized):
    """The root has a `__call__` of its own around the forward."""

    def __call__(self, x):
        return super().__call__(x * 2) + 1

    def forward(self, x):
        return self.fc(x).relu()


class _Delegates(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = _Part()
        self.settings = {"scale": 3.0}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__.get("settings", ()):
                return self.settings[name]
            raise

    @property
    def half(self):
        return self.inner.fc.weight.shape[0] / 2

    def forward(self, x):
        return self.inner(x) * self.scale / self.half


@trap(sequence)
class GetattrOverridden(nn.Module):
    """`__getattr__` that finds settings elsewhere, and a property that computes."""

    def __init__(self):
        super().__init__()
        self.child = _Delegates()

    def forward(self, x):
        return self.child(x) if hasattr(self.child, "scale") else x


@trap(sequence)
class AsksForTypes(_Sized):
    """`isinstance`, `type`, `hasattr` and `torch.is_tensor` of what is traced."""

    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        assert torch.is_tensor(x)
        y = self.fc(x)
        if type(x.size(0)) is not int and not isinstance(x.size(0), int):
            y = y * 100
        if not isinstance(x.shape, tuple) or hasattr(y, "nodes"):
            y = y * 10
        return y + isinstance(self.fc, nn.Linear)


@trap(sequence)
class TriesAndExcepts(_Sized):
    """An operation that fails is part of the forward."""

    def forward(self, x):
        try:
            y = self.fc(x.transpose(1, 2))
        except RuntimeError:
            y = self.fc(x)
        try:
            return y.view(-1, 1000003)
        except RuntimeError:
            return y.relu()


@contextlib.contextmanager
def scaled_by(scale):
    """Give a scale while inside."""
    _SCALES.append(scale)
    try:
        yield scale
    finally:
        _SCALES.pop()


_SCALES: list[float] = []
_GLOBAL = torch.linspace(-1, 1, 8)


@trap(sequence)
class GlobalsAndContexts(_Sized):
    """A global tensor, a class-level constant, a context manager of one's own."""

    SCALE = 0.25
    OFFSETS = torch.tensor([1.0, 2.0])

    def forward(self, x):
        with scaled_by(3.0):
            y = self.fc(x) * _SCALES[-1]
        return y * self.SCALE + _GLOBAL + self.OFFSETS.sum()


# ---------------------------------------------------------------- state that a forward changes


@trap(vectors, varies=NO_LENGTH)
class BufferReassigned(_Sized):
    """A running mean assigned anew in the forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.ema = 0.9 * self.ema + 0.1 * x.detach().mean(0)
        return self.fc(x - self.ema)


@trap(vectors, varies=NO_LENGTH)
class BufferUpdatedInPlace(_Sized):
    """A queue of keys and a pointer, written in place, as MoCo does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(8, 8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = F.normalize(self.fc(x), dim=1)
        logits = y @ self.queue.clone()
        if self.training:
            with torch.no_grad():
                self.queue.mul_(0.5).add_(y.T @ y)
                self.steps += 1
        return logits


@trap(vectors, varies=NO_LENGTH, graph=False)
class PointerInBuffer(_Sized):
    """A buffer read by `int()` says where to write."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(5, 8))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        y = self.fc(x)
        at = int(self.at)
        self.queue[at] = y.detach().mean(0)
        self.at[0] = (at + 1) % 5
        return y @ self.queue.clone().T


@trap(vectors, varies=NO_LENGTH)
class CounterInForward(_Sized):
    """A Python counter that scales by how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * min(1.0, self.calls / 7)


@trap(vectors, varies=NO_LENGTH)
class CounterThatNothingReads(_Sized):
    """A Python counter that only the user reads."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x)


@trap(vectors, varies=NO_LENGTH, graph=False)
class CachedOnFirstCall(_Sized):
    """An attribute that the first call fills and all others use."""

    def __init__(self):
        super().__init__()
        self.mean = None

    def forward(self, x):
        if self.mean is None:
            self.mean = x.detach().mean(0)
        return self.fc(x - self.mean)


@trap(vectors, varies=NO_LENGTH)
class AuxiliaryLossKept(_Sized):
    """A loss left on the module for the training loop to find."""

    def __init__(self):
        super().__init__()
        self.aux, self.last = None, {}

    def forward(self, x):
        y = self.fc(x).softmax(-1)
        self.aux = (y * y.log()).sum()
        self.last["entropy"] = self.aux.detach()
        return y


@trap(vectors, varies=NO_LENGTH)
class ListOfAuxiliaryLosses(nn.Module):
    """Children append to a list of losses that the root empties and adds up."""

    def __init__(self):
        super().__init__()
        self.losses = []
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def noted(self, y):
        self.losses.append(y.pow(2).mean())
        return y.relu()

    def forward(self, x):
        self.losses.clear()
        x = self.noted(self.b(self.noted(self.a(x))))
        return x, sum(self.losses)


@trap(vectors, varies=NO_LENGTH, graph=False)
class HistoryInDeque(_Sized):
    """A deque of the last means steers the output."""

    def __init__(self):
        super().__init__()
        self.past = deque(maxlen=3)

    def forward(self, x):
        self.past.append(float(x.mean()))
        return self.fc(x) - sum(self.past) / len(self.past)


class Memory:
    """A plain object that holds a tensor."""

    def __init__(self):
        self.state = torch.zeros(8)

    def update(self, x):
        """Mix x in and give what is held."""
        self.state = 0.5 * self.state + 0.5 * x.detach().mean(0)
        return self.state


@trap(vectors, varies=NO_LENGTH, graph=False)
class HelperHoldsTensor(_Sized):
    """A plain object on the module holds a tensor from call to call."""

    def __init__(self):
        super().__init__()
        self.memory = Memory()

    def forward(self, x):
        return self.fc(x) + self.memory.update(x)


@trap(sequence, graph=False)
class KeyValueCache(_Sized):
    """A list that grows by a tensor at every call, as a decoder's cache."""

    def __init__(self):
        super().__init__()
        self.keys = []

    def forward(self, x):
        self.keys.append(x.detach().mean((0, 1)))
        self.keys = self.keys[-4:]
        return self.fc(x) @ torch.stack(self.keys).T


# ---------------------------------------------------------------- values decide


@trap(vectors, varies=NO_LENGTH)
class BranchOnMean(_Sized):
    """`if x.mean() > 0`, and new values take the other side."""

    def forward(self, x):
        if x.mean() > 0:
            return self.fc(x).relu()
        return self.fc(-x).tanh() * 2


@trap(sequence)
class MaskAllBranch(_Sized):
    """`if mask.all()` skips the mask, as attention does."""

    def forward(self, x):
        mask = (x > -0.5).all(-1)
        y = self.fc(x)
        if not mask.all():
            y = y.masked_fill(~mask[..., None], 0.0)
        return y.sigmoid()


@trap(vectors, varies=NO_LENGTH, graph=False)
class WhileUntilConverged(_Sized):
    """A fixed point: as many rounds as the values take."""

    def forward(self, x):
        y = x * 8 if x.sum() < 0 else x
        while y.abs().max() > 0.5:
            y = torch.tanh(y) * 0.7
        return self.fc(y)


@trap(sequence, graph=False)
class EarlyExit(nn.Module):
    """Leaves when the confidence is high enough."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for depth, layer in enumerate(self.layers):
            x = layer(x).relu()
            logits = self.head(x)
            if logits.softmax(-1).max() > 0.6 + 0.02 * depth or x.sum().item() < 20:
                break
        return logits, depth


@trap(vectors, varies=NO_LENGTH, graph=False)
class ItemInArithmetic(_Sized):
    """`.item()` in Python arithmetic, and a float that becomes an argument."""

    def forward(self, x):
        scale = x.abs().max().item()
        return F.leaky_relu(self.fc(x) / (scale + 1), negative_slope=min(0.5, scale / 10))


@trap(tokens, graph=False)
class ToListLoop(nn.Module):
    """A loop over `.tolist()` that indexes by the values."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, ids):
        ends = (ids > 5).sum(1).tolist()
        y = self.embed(ids)
        return torch.stack([row[: end + 1].mean(0) for row, end in zip(y, ends, strict=True)])


@trap(vectors, varies=NO_LENGTH, graph=False)
class NumpyDetour(_Sized):
    """Values go through numpy and come back."""

    def forward(self, x):
        order = np.argsort(x.detach().numpy().sum(1))
        return self.fc(x)[torch.from_numpy(order.copy())]


@trap(sequence)
class NumpyConstant(_Sized):
    """A constant built by numpy from a size."""

    def forward(self, x):
        table = np.tri(x.size(1), dtype=np.float32) / np.arange(1, x.size(1) + 1)[:, None]
        return torch.from_numpy(table.astype(np.float32)) @ self.fc(x)


@trap(vectors, varies=NO_LENGTH)
class WeightDependentBranch(_Sized):
    """A branch on the weights and their shape."""

    def forward(self, x):
        if self.fc.weight.shape[0] == 8 and self.fc.weight.abs().sum() > 1e-3:
            return self.fc(x)
        return x


@trap(sequence)
class MixtureByNonzero(nn.Module):
    """Experts over `nonzero` tokens, added back by `index_add_`."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = (chosen == i).nonzero().squeeze(1)
            out.index_add_(0, at, expert(flat[at]).relu() * weight[at, None])
        return out.view_as(x)


@trap(sequence, graph=False)
class MixtureSkipsIdleExperts(MixtureByNonzero):
    """Experts without a token are skipped, by `bincount` and `.tolist()`."""

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        weight, chosen = torch.topk(self.gate(flat).softmax(-1), 2)
        out = torch.zeros_like(flat)
        for i, count in enumerate(torch.bincount(chosen.flatten(), minlength=3).tolist()):
            if count:
                at, slot = torch.where(chosen == i)
                out.index_add_(0, at, self.experts[i](flat[at]) * weight[at, slot, None])
        return out.view_as(x)


@trap(sequence)
class BooleanSelect(_Sized):
    """`y[mask]`, `masked_select` and a scatter back: sizes that values decide."""

    def forward(self, x):
        mask = x.mean(-1) > 0
        y = self.fc(x)
        chosen = y[mask]
        back = torch.zeros_like(y)
        back[mask] = chosen.tanh()
        return back, chosen.sum() / (chosen.shape[0] + 1), torch.masked_select(y, y > 0).sum()


@trap(sequence)
class TopkRouting(_Sized):
    """`topk`, `gather`, `scatter`, `argsort` and `one_hot`."""

    def forward(self, x):
        score = self.fc(x).mean(-1)
        at = score.topk(min(3, x.size(1)), dim=1).indices
        picked = x.gather(1, at[..., None].expand(-1, -1, x.size(-1)))
        hot = F.one_hot(score.argmax(1), x.size(1)).to(x.dtype)
        return picked * score.gather(1, at)[..., None], hot @ x.new_ones(x.size(1), 2)


# ---------------------------------------------------------------- randomness


@trap(sequence, graph=False)
class SpecAugment(_Sized):
    """Masks spans drawn by numpy, in training."""

    def forward(self, x):
        y = self.fc(x)
        if self.training:
            mask = np.zeros(x.shape[:2], dtype=bool)
            for row in mask:
                start = np.random.randint(0, x.shape[1] - 1)
                row[start : start + 2] = True
            y[torch.tensor(mask)] = 0.0
        return y.relu()


@trap(sequence, graph=False)
class LayerDropByPython(nn.Module):
    """Layers left out by `random.random()`, in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([_Part(nn.ReLU) for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            if self.training and random.random() < 0.5:
                continue
            x = layer(x)
        return x


@trap(sequence, graph=False)
class LayerDropByTorch(nn.Module):
    """Layers left out by `torch.rand`, in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([_Part(nn.ReLU) for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.5:
                x = layer(x)
        return x


@trap(image)
class StochasticDepth(nn.Module):
    """A residual branch dropped by sample, with torch's random numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x).relu()
        if self.training:
            keep = torch.empty((x.shape[0], 1, 1, 1)).bernoulli_(0.6)
            y = y.div(0.6) * keep
        return x + y + torch.randn_like(x) * 0.1 + torch.rand(x.size(2), 1)


@trap(vectors, varies=NO_LENGTH)
class GumbelSoftmax(_Sized):
    """Discrete samples with a gradient, from noise drawn in the forward."""

    def forward(self, x):
        y = self.fc(x)
        noise = -torch.empty_like(y).exponential_().log()
        soft = ((y + noise) / 0.5).softmax(-1)
        index = soft.max(-1, keepdim=True).indices
        hard = torch.zeros_like(y).scatter_(-1, index, 1.0)
        return hard - soft.detach() + soft, F.gumbel_softmax(y, hard=True)


@trap(vectors, varies=NO_LENGTH)
class Reparametrised(_Sized):
    """A variational code by `torch.distributions`."""

    def __init__(self):
        super().__init__(16)

    def forward(self, x):
        mean, log = self.fc(x).chunk(2, dim=-1)
        normal = torch.distributions.Normal(mean, log.exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        return normal.rsample(), torch.distributions.kl_divergence(normal, prior).sum(-1)


@trap(vectors, varies=NO_LENGTH, graph=False)
class SeedsInForward(_Sized):
    """`torch.manual_seed` in the forward."""

    def forward(self, x):
        torch.manual_seed(7)
        return self.fc(x) * torch.rand(8) + F.dropout(x, 0.5, self.training)


@trap(vectors, varies=NO_LENGTH, graph=False)
class GeneratorOfItsOwn(_Sized):
    """A `torch.Generator` made in the forward, and one kept on the module."""

    def __init__(self):
        super().__init__()
        self.source = torch.Generator().manual_seed(3)

    def forward(self, x):
        fresh = torch.Generator().manual_seed(5)
        return self.fc(x) + torch.rand(8, generator=fresh) + torch.rand(8, generator=self.source)


@trap(vectors, varies=NO_LENGTH, graph=False)
class MixupByNumpy(_Sized):
    """`np.random.beta` and `randperm` mix the batch in training."""

    def forward(self, x):
        if self.training:
            part = np.random.beta(0.4, 0.4)
            x = part * x + (1 - part) * x[torch.randperm(x.size(0))]
        return self.fc(x)


# ---------------------------------------------------------------- torch's own larger parts


@trap(sequence)
class RecurrentTuples(nn.Module):
    """LSTM and GRU: tuples of tensors, dropout between layers."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 5, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)
        self.gru = nn.GRU(10, 4, batch_first=True)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        z, last = self.gru(y, x.new_zeros(1, x.size(0), 4))
        return z, h[-1] + c[0], last


def _with_lengths(s):
    lengths = torch.tensor([max(1, s.length - 2 * i) for i in range(s.batch)])
    return (sequence(s)[0][0], lengths), {}


@trap(_with_lengths, graph=False)
class PackedSequence(nn.Module):
    """Packs by lengths that values decide, and pads again."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 5, batch_first=True)

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, (h, _) = self.lstm(packed)
        padded, sizes = rnn.pad_packed_sequence(out, batch_first=True)
        return padded, sizes, h


@trap(sequence)
class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` with a mask, weights returned."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.attention(x, x, x, attn_mask=mask)


@trap(sequence)
class TransformerEncoder(nn.Module):
    """`nn.TransformerEncoder`, which takes a fused path without gradients."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x).mean(1)


@trap(sequence)
class EncoderDecoder(nn.Module):
    """`nn.Transformer` with a causal target mask."""

    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(8, 2, 1, 1, 16, 0.1, batch_first=True)

    def forward(self, x):
        mask = self.net.generate_square_subsequent_mask(x.size(1))
        return self.net(x, x.flip(1), tgt_mask=mask)


@trap(sequence)
class SparseMultiply(_Sized):
    """A sparse adjacency made in the forward."""

    def forward(self, x):
        n = x.size(1)
        at = torch.arange(n)
        edges = torch.stack([at, (at + 1) % n])
        ring = torch.sparse_coo_tensor(edges, torch.ones(n), (n, n))
        return torch.stack([torch.sparse.mm(ring, self.fc(row)) for row in x])


def _bags(s):
    ids = _ids(s).flatten()
    return (ids, torch.arange(0, len(ids), s.length)), {}


@trap(_bags)
class BagOfEmbeddings(nn.Module):
    """`nn.EmbeddingBag` with offsets."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 8, mode="mean")

    def forward(self, ids, offsets):
        return F.elu(self.bag(ids, offsets)), F.embedding_bag(ids, self.bag.weight, offsets)


@trap(lambda s: ((sequence(s)[0][0], _ids(s)[:, :3] % 5 + 1), {}))
class CtcLoss(_Sized):
    """CTC loss with lengths made in the forward."""

    def forward(self, x, target):
        log = self.fc(x).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((x.size(0),), x.size(1), dtype=torch.long)
        goal = torch.full((x.size(0),), target.size(1), dtype=torch.long)
        return F.ctc_loss(log, target, lengths, goal, zero_infinity=True)


@trap(lambda s: ((image(s)[0][0], _ids(s)[:, 0] % 3), {"want": ("class", "box")}))
class MultiTaskLosses(nn.Module):
    """A dict of losses in training, of predictions in eval, by a list of tasks."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
        self.heads = nn.ModuleDict({"class": nn.Linear(4, 3), "box": nn.Linear(4, 4)})
        self.weights = {"class": 1.0, "box": 0.1}

    def forward(self, x, labels, want=("class",)):
        y = self.trunk(x).mean((2, 3))
        out = {name: self.heads[name](y) for name in want}
        if not self.training:
            return out
        losses = {"class": F.cross_entropy(out["class"], labels)}
        losses["box"] = F.smooth_l1_loss(out["box"], torch.ones_like(out["box"]))
        return sum(self.weights[name] * loss for name, loss in losses.items()), losses


@trap(sequence, scratch=frozenset({"_torchdynamo_wrapper_id"}))
class CompiledChild(_Sized):
    """A child wrapped by `torch.compile`, without a backend that changes it."""

    def __init__(self):
        super().__init__()
        self.child = torch.compile(_Part(), backend="eager")

    def forward(self, x):
        return self.fc(self.child(x))


@trap(vectors, varies=NO_LENGTH)
class QuantisedWeights(_Sized):
    """Fake quantisation of the weights, scale from the data."""

    def forward(self, x):
        scale = self.fc.weight.detach().abs().amax() / 127
        steps = torch.clamp(torch.round(self.fc.weight / scale), -128, 127)
        weight = self.fc.weight + (steps * scale - self.fc.weight).detach()
        return F.linear(x, weight, self.fc.bias).to(torch.float64)


CASES: tuple[Case, ...] = tuple(_CASES)
