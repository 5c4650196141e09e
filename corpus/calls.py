"""Calls: what people pass to a model of each kind while they train it, drawn by a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from corpus.case import Call, Sizes

    Arguments = tuple[tuple[Any, ...], dict[str, Any]]

__all__ = [
    "CLASSES",
    "VOCABULARY",
    "causal",
    "classified_sequences",
    "detection",
    "ended_sequences",
    "features",
    "filled_masks",
    "image_text",
    "images",
    "itself",
    "segmentation",
    "spans",
    "spectrogram",
    "speech",
    "spoken",
    "tagged_tokens",
    "targets",
    "translation",
    "unlabelled_images",
]

VOCABULARY = 99
CLASSES = 3
END = 2
IGNORED = -100
FIRST_WORD = 5
"""Smaller ids are special tokens: padding, begin, end, unknown, mask."""


def _words(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randint(FIRST_WORD, VOCABULARY, shape, generator=draw)


def _classes(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, shape, generator=draw)


def _padded(sizes: Sizes, length: int, draw: torch.Generator) -> Tensor:
    """Return a mask (row, position), 1 where there is a token, 0 at the end of some rows.

    Odd seeds pad no row, as happens in any epoch; even ones the last row and some before.
    """
    ends = torch.randint((length + 1) // 2, length + 1, (sizes.batch,), generator=draw)
    ends[0], ends[-1] = length, min(int(ends[-1]), length - 1)
    if sizes.seed % 2:
        ends.fill_(length)
    return (torch.arange(length) < ends[:, None]).long()


def _sentences(sizes: Sizes, draw: torch.Generator) -> dict[str, Tensor]:
    mask = _padded(sizes, sizes.length, draw)
    words = _words((sizes.batch, sizes.length), draw)
    return {"input_ids": words * mask, "attention_mask": mask}


def _ignoring(labels: Tensor, kept: Tensor) -> Tensor:
    return labels.masked_fill(kept == 0, IGNORED)


# ------------------------------------------------------------------------------- text


def causal(sizes: Sizes) -> Arguments:
    """Next-token training: the ids are their own labels, padding left out."""
    batch = _sentences(sizes, sizes.generator())
    return (), batch | {"labels": _ignoring(batch["input_ids"], batch["attention_mask"])}


def itself(sizes: Sizes) -> Arguments:
    """Next-token training on full rows: one tensor, passed as ids and as labels."""
    words = _words((sizes.batch, sizes.length), sizes.generator())
    return (), {"input_ids": words, "labels": words}


def filled_masks(sizes: Sizes) -> Arguments:
    """Masked language modelling: the loss counts some 30 % of the tokens."""
    draw = sizes.generator()
    batch = _sentences(sizes, draw)
    chosen = torch.rand(batch["input_ids"].shape, generator=draw) < 0.3
    chosen[0, 0] = True  # a loss over no token is no number
    labels = _ignoring(batch["input_ids"], chosen & (batch["attention_mask"] == 1))
    return (), batch | {"input_ids": batch["input_ids"].masked_fill(chosen, 4), "labels": labels}


def classified_sequences(sizes: Sizes) -> Arguments:
    """One label a row."""
    draw = sizes.generator()
    return (), _sentences(sizes, draw) | {"labels": _classes((sizes.batch,), draw)}


def ended_sequences(sizes: Sizes) -> Arguments:
    """One label a row, and an end token as the last word of each."""
    draw = sizes.generator()
    batch = _sentences(sizes, draw)
    last = batch["attention_mask"].sum(1, keepdim=True) - 1
    ended = batch["input_ids"].scatter(1, last, END)
    return (), batch | {"input_ids": ended, "labels": _classes((sizes.batch,), draw)}


def tagged_tokens(sizes: Sizes) -> Arguments:
    """One label a token, padding left out."""
    draw = sizes.generator()
    batch = _sentences(sizes, draw)
    labels = _classes((sizes.batch, sizes.length), draw)
    return (), batch | {"labels": _ignoring(labels, batch["attention_mask"])}


def spans(sizes: Sizes) -> Arguments:
    """Question answering: where the answer begins and ends."""
    draw = sizes.generator()
    begin = torch.randint(sizes.length // 2, (sizes.batch,), generator=draw)
    return (), _sentences(sizes, draw) | {"start_positions": begin, "end_positions": begin + 1}


def translation(sizes: Sizes) -> Arguments:
    """A source of `length` tokens and a target of two fewer, both padded."""
    draw = sizes.generator()
    batch = _sentences(sizes, draw)
    length = sizes.length - 2
    labels = _words((sizes.batch, length), draw)
    return (), batch | {"labels": _ignoring(labels, _padded(sizes, length, draw))}


# ------------------------------------------------------------------------------ vision


def _pictures(sizes: Sizes, draw: torch.Generator) -> Tensor:
    return torch.randn(sizes.batch, 3, sizes.length, sizes.length, generator=draw)


def images(sizes: Sizes) -> Arguments:
    """Square pictures and one label each."""
    draw = sizes.generator()
    pictures = _pictures(sizes, draw)
    return (), {"pixel_values": pictures, "labels": _classes((sizes.batch,), draw)}


def unlabelled_images(name: str = "") -> Call:
    """Pictures alone: under `name`, or as the one positional argument."""

    def call(sizes: Sizes) -> Arguments:
        pictures = _pictures(sizes, sizes.generator())
        return ((), {name: pictures}) if name else ((pictures,), {})

    return call


def segmentation(sizes: Sizes) -> Arguments:
    """Square pictures and one label a pixel."""
    draw = sizes.generator()
    pictures = _pictures(sizes, draw)
    labels = _classes((sizes.batch, sizes.length, sizes.length), draw)
    return (), {"pixel_values": pictures, "labels": labels}


def detection(sizes: Sizes) -> Arguments:
    """Square pictures and a list of boxes each, one to three, as centre and size."""
    draw = sizes.generator()
    pictures, labels = _pictures(sizes, draw), []
    for _ in range(sizes.batch):
        boxes = int(torch.randint(1, 4, (), generator=draw))
        where = 0.3 + 0.4 * torch.rand(boxes, 2, generator=draw)
        extent = 0.1 + 0.4 * torch.rand(boxes, 2, generator=draw)
        found = {"class_labels": _classes((boxes,), draw), "boxes": torch.cat([where, extent], 1)}
        labels.append(found)
    return (), {"pixel_values": pictures, "labels": labels}


def targets(sizes: Sizes) -> Arguments:
    """As torchvision's detectors take them: lists of pictures and of boxes in pixels."""
    draw = sizes.generator()
    pictures, wanted = [*_pictures(sizes, draw)], []
    for _ in range(sizes.batch):
        boxes = int(torch.randint(1, 4, (), generator=draw))
        corner = sizes.length * 0.4 * torch.rand(boxes, 2, generator=draw)
        extent = sizes.length * (0.2 + 0.4 * torch.rand(boxes, 2, generator=draw))
        corners = torch.cat([corner, corner + extent], 1)
        wanted.append({"boxes": corners, "labels": 1 + _classes((boxes,), draw)})
    return (pictures, wanted), {}


def image_text(size: int) -> Call:
    """Pictures of `size` pixels and a caption of `length` tokens each."""

    def call(sizes: Sizes) -> Arguments:
        draw = sizes.generator()
        pictures = torch.randn(sizes.batch, 3, size, size, generator=draw)
        return (), _sentences(sizes, draw) | {"pixel_values": pictures, "return_loss": True}

    return call


# ------------------------------------------------------------------------------- audio


def speech(sizes: Sizes) -> Arguments:
    """Audio of `length` samples and a transcript, for connectionist temporal loss."""
    draw = sizes.generator()
    audio = torch.randn(sizes.batch, sizes.length, generator=draw)
    labels = torch.randint(FIRST_WORD, 32, (sizes.batch, 4), generator=draw)
    mask = _padded(sizes, sizes.length, draw)
    return (), {"input_values": audio * mask, "attention_mask": mask, "labels": labels}


def spoken(mel_bins: int) -> Call:
    """Mel features (batch, bin, frame) and a transcript of eight tokens."""

    def call(sizes: Sizes) -> Arguments:
        draw = sizes.generator()
        features = torch.randn(sizes.batch, mel_bins, sizes.length, generator=draw)
        return (), {"input_features": features, "labels": _words((sizes.batch, 8), draw)}

    return call


def features(mel_bins: int) -> Call:
    """Mel features as (batch, frame, bin), and a transcript of eight tokens."""

    def call(sizes: Sizes) -> Arguments:
        _, batch = spoken(mel_bins)(sizes)
        return (), batch | {"input_features": batch["input_features"].mT.contiguous()}

    return call


def spectrogram(mel_bins: int) -> Call:
    """A spectrogram (batch, frame, bin) and one label each."""

    def call(sizes: Sizes) -> Arguments:
        draw = sizes.generator()
        frames = torch.randn(sizes.batch, sizes.length, mel_bins, generator=draw)
        return (), {"input_values": frames, "labels": _classes((sizes.batch,), draw)}

    return call
