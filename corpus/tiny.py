"""Tiny models of transformers: their own configs at sizes that run in milliseconds."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from corpus.calls import CLASSES, END, VOCABULARY
from corpus.case import Case
from corpus.torchvision_models import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from corpus.case import Call

__all__ = ["GROUPED", "SEQUENCE", "TEXT", "TWO_SIDED", "WORDS", "Parts", "tiny"]

_LAZY = frozenset({"_output_capturing_hooks_installed"})
"""What transformers notes when it hangs the hooks that collect hidden states, at a first call."""

Parts = dict[str, tuple[str, dict[str, Any]]]


def _build(head: str, settings: Mapping[str, Any], parts: Parts) -> nn.Module:
    """Return the class `head` of transformers over its own config with `settings`.

    `parts` are configs inside it: the name of their class and their settings.
    """
    import_torchvision()  # transformers imports it, where it is installed
    transformers = importlib.import_module("transformers")
    inner = {name: getattr(transformers, kind)(**own) for name, (kind, own) in parts.items()}
    kind = getattr(transformers, head)
    model: nn.Module = kind(kind.config_class(**settings, **inner))
    return model


def tiny(
    name: str,
    head: str,
    call: Call,
    settings: Mapping[str, Any],
    parts: Parts | None = None,
    **words: Any,
) -> Case:
    """Return a case of the class `head` of transformers; `words` are `Case`'s own."""
    build = functools.partial(_build, head, settings, parts or {})
    return Case(name, build, call, **({"batches": (2, 3, 5), "scratch": _LAZY} | words))


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
WORDS = {"vocab_size": VOCABULARY, "num_labels": CLASSES, **_SPECIAL}
TEXT = WORDS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
SEQUENCE: dict[str, Any] = {"lengths": (12, 9, 16)}
TWO_SIDED = WORDS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": END,
}
