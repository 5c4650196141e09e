"""The models that the benchmarks train, each with its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MODELS", "Encoder"]


class Encoder(nn.Module):
    """A transformer encoder in two blocks, written with the ops that people write."""

    class Block(nn.Module):
        """Attention and a feed-forward layer, each behind its norm, each added to its input."""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return what the block makes of `x` (batch, place, channel), of the same shape."""
            qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.transpose(1, 3).unbind(2)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.out(attended)
            mixed: torch.Tensor = self.down(F.gelu(self.up(self.before_mlp(x))))
            return x + mixed

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.Sequential(*(self.Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return 10 logits for each row of `tokens` (batch, place)."""
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.embed(tokens))).mean(1))
        return logits


def _small_ops() -> tuple[nn.Module, torch.Tensor]:
    layers = (op for _ in range(25) for op in (nn.Linear(16, 16), nn.Tanh()))
    return nn.Sequential(*layers), torch.randn(16, 16)


def _mlp() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 256)


def _cnn() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 10)),
    )
    return model, torch.randn(16, 3, 32, 32)


def _encoder() -> tuple[nn.Module, torch.Tensor]:
    return Encoder(), torch.randint(0, 100, (16, 32))


MODELS: Mapping[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "small ops": _small_ops,
    "mlp": _mlp,
    "cnn": _cnn,
    "encoder": _encoder,
}
"""Makers of a model and its input; the first dimension of the input is the batch.

All give ten logits or more. The ops of `small ops` take a few microseconds each, so that what
is done at every op shows; a step of the others takes at least 5 ms on one core.
"""
