"""Architectures that people train, each made tiny from its config: no weights, no hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corpus.sense_models import SENSE_CASES
from corpus.text_models import TEXT_CASES
from corpus.torchvision_models import VISION_CASES

if TYPE_CHECKING:
    from corpus.case import Case

__all__ = ["CASES", "VISION_CASES"]

CASES: tuple[Case, ...] = (*TEXT_CASES, *SENSE_CASES)
