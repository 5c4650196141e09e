"""Models of torchvision, without weights, at the smallest sizes that they take."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any

import torch

from corpus import calls
from corpus.case import Case

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

    from corpus.case import Call

__all__ = ["VISION_CASES", "import_torchvision"]

_STAND_INS: list[torch.library.Library] = []
"""Kept alive: a library takes its ops along when it is collected."""


def import_torchvision() -> ModuleType | None:
    """Import torchvision, also where its compiled ops do not load; None without it.

    The wheel on PyPI is compiled for torch with CUDA. Beside torch's CPU wheel its ops are
    missing, and importing it raises, because it describes them to `torch.compile`. Its
    models need but one of them, `nms`, which is then one of Python.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        ops = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        ops.impl("nms", _nms, "CPU")
        _STAND_INS.append(ops)
    torchvision = importlib.import_module("torchvision")
    torchvision.extension._has_ops = lambda: True  # noqa: SLF001 - what nms asks first
    # Without ops it compiles this one at the first call: a second of every test.
    roi_align: Any = importlib.import_module("torchvision.ops.roi_align")
    roi_align._roi_align = inspect.unwrap(roi_align._roi_align)  # noqa: SLF001
    return torchvision


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return which `boxes` (box, corner) stay, best first: none overlaps a better one."""
    overlap = importlib.import_module("torchvision.ops").box_iou(boxes, boxes)
    kept: list[int] = []
    for box in scores.argsort(descending=True, stable=True).tolist():
        if not kept or float(overlap[box, kept].max()) <= iou_threshold:
            kept.append(box)
    return torch.tensor(kept, dtype=torch.long)


def _build(where: str, settings: dict[str, Any]) -> nn.Module:
    import_torchvision()
    module, _, name = f"torchvision.models.{where}".rpartition(".")
    make = getattr(importlib.import_module(module), name)
    model: nn.Module = make(**settings)
    return model


_PICTURE = calls.unlabelled_images()


def _case(
    name: str, settings: dict[str, Any], *, call: Call = _PICTURE, where: str = "", **words: Any
) -> Case:
    build = functools.partial(_build, where or name, settings)
    return Case(f"torchvision_{name}", build, call, **({"lengths": (64, 80)} | words))


_FEW = {"num_classes": calls.CLASSES}
_NO_WEIGHTS = {"weights": None, **_FEW}
_HEADS = _NO_WEIGHTS | {"weights_backbone": None}
_FIXED: dict[str, Any] = {"varies": frozenset({"values", "batch"})}
_DETECTED: dict[str, Any] = {
    "call": calls.targets,
    "graph": False,
    "why": "as many boxes in a picture as are found in it",
}
_DETECTOR = _HEADS | {"num_classes": calls.CLASSES + 1, "min_size": 64, "max_size": 64}
_FEW_PROPOSALS = {
    f"rpn_{when}_nms_top_n_{mode}": 40 for when in ("pre", "post") for mode in ("train", "test")
}

VISION_CASES: tuple[Case, ...] = (
    _case("convnext_tiny", _NO_WEIGHTS),
    _case("deeplabv3", _HEADS, where="segmentation.deeplabv3_mobilenet_v3_large"),
    _case(
        "densenet",
        {"growth_rate": 4, "block_config": (2, 2, 2), "num_init_features": 8, **_FEW},
        where="densenet.DenseNet",
    ),
    _case("efficientnet_b0", _NO_WEIGHTS),
    _case(
        "fasterrcnn",
        _DETECTOR | _FEW_PROPOSALS,
        **_DETECTED,
        where="detection.fasterrcnn_mobilenet_v3_large_320_fpn",
    ),
    _case("fcos", _DETECTOR, **_DETECTED, where="detection.fcos_resnet50_fpn"),
    _case("googlenet", {"aux_logits": True, "init_weights": False, **_NO_WEIGHTS}),
    _case(
        "inception_v3",
        {"aux_logits": False, "init_weights": False, **_NO_WEIGHTS},
        lengths=(96, 107),
    ),
    _case("lraspp", _HEADS, where="segmentation.lraspp_mobilenet_v3_large"),
    _case("mnasnet0_5", _NO_WEIGHTS),
    _case("mobilenet_v3_small", _NO_WEIGHTS),
    _case("regnet_y_400mf", _NO_WEIGHTS),
    _case("resnet18", _NO_WEIGHTS),
    _case("shufflenet_v2_x0_5", _NO_WEIGHTS),
    _case("squeezenet1_1", _NO_WEIGHTS),
    _case(
        "swin",
        {
            "patch_size": [2, 2],
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [2, 2],
            "window_size": [4, 4],
            "stochastic_depth_prob": 0.1,
            **_FEW,
        },
        where="SwinTransformer",
        lengths=(32, 48),
        hidden=frozenset({"softmax"}),
    ),
    _case(
        "vit",
        {
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 2,
            "num_heads": 4,
            "hidden_dim": 32,
            "mlp_dim": 48,
            "dropout": 0.1,
            **_FEW,
        },
        where="VisionTransformer",
        lengths=(32,),
        **_FIXED,
    ),
)
