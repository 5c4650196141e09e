"""Models of pictures and of sound that people train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corpus import calls
from corpus.calls import CLASSES
from corpus.tiny import SEQUENCE, TEXT, TWO_SIDED, tiny

if TYPE_CHECKING:
    from collections.abc import Mapping

    from corpus.case import Call, Case

__all__ = ["SENSE_CASES"]

# ------------------------------------------------------------------------------ vision

_SEEN = {"num_labels": CLASSES, "num_channels": 3}
_PATCHES = _SEEN | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_FIXED: Mapping[str, Any] = {"varies": frozenset({"values", "batch"}), "lengths": (32,)}
_ANY_SIZE: Mapping[str, Any] = {"lengths": (32, 48)}


def _classifier(name: str, head: str, words: Mapping[str, Any], /, **settings: Any) -> Case:
    return tiny(name, f"{head}ForImageClassification", calls.images, _SEEN | settings, **words)


def _patched(name: str, head: str, call: Call = calls.images, /, **settings: Any) -> Case:
    return tiny(name, head, call, _PATCHES | settings, **_FIXED)


def _resized(name: str, head: str, call: Call = calls.images, /, **settings: Any) -> Case:
    return tiny(name, head, call, _PATCHES | settings, **_ANY_SIZE)


_MATCHED = "scipy matches what was found to what is there, picture by picture"

_VISION = (
    _resized("beit", "BeitForImageClassification"),
    tiny(
        "clip",
        "CLIPModel",
        calls.image_text(32),
        {"projection_dim": 16},
        {"text_config": ("CLIPTextConfig", TEXT), "vision_config": ("CLIPVisionConfig", _PATCHES)},
        **SEQUENCE,
    ),
    _classifier(
        "convnext",
        "ConvNext",
        _ANY_SIZE,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        drop_path_rate=0.1,
    ),
    _classifier(
        "convnextv2", "ConvNextV2", _ANY_SIZE, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]
    ),
    _classifier(
        "cvt", "Cvt", _ANY_SIZE, embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]
    ),
    _resized("data2vec_vision", "Data2VecVisionForImageClassification"),
    _patched("deit", "DeiTForImageClassification"),
    _resized("dinov2", "Dinov2ForImageClassification", drop_path_rate=0.1, mlp_ratio=2),
    _classifier(
        "efficientnet",
        "EfficientNet",
        _ANY_SIZE,
        image_size=32,
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
    ),
    _classifier(
        "focalnet",
        "FocalNet",
        _ANY_SIZE,
        image_size=32,
        patch_size=2,
        embed_dim=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
    ),
    _classifier(
        "levit",
        "Levit",
        _FIXED,
        image_size=32,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    ),
    _classifier("mobilenet_v2", "MobileNetV2", _ANY_SIZE, depth_multiplier=0.25, image_size=32),
    _classifier(
        "mobilevit",
        "MobileViT",
        {"lengths": (64, 96)},
        image_size=64,
        hidden_sizes=[16, 16, 24],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 32],
        num_attention_heads=2,
    ),
    _classifier(
        "poolformer",
        "PoolFormer",
        _ANY_SIZE,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        drop_path_rate=0.1,
    ),
    _classifier(
        "pvt",
        "Pvt",
        _FIXED,
        image_size=32,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
    ),
    _classifier(
        "regnet",
        "RegNet",
        _ANY_SIZE,
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 24],
        depths=[1, 1, 1, 1],
        groups_width=4,
    ),
    _classifier(
        "resnet",
        "ResNet",
        _ANY_SIZE,
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 24],
        depths=[1, 1, 1, 1],
    ),
    tiny(
        "segformer",
        "SegformerForSemanticSegmentation",
        calls.segmentation,
        _SEEN
        | {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
            "decoder_hidden_size": 16,
        },
        lengths=(64, 96),
    ),
    tiny(
        "siglip",
        "SiglipModel",
        calls.image_text(32),
        {},
        {
            "text_config": ("SiglipTextConfig", TEXT | {"projection_size": 32}),
            "vision_config": ("SiglipVisionConfig", _PATCHES),
        },
        **SEQUENCE,
    ),
    _classifier(
        "swin",
        "Swin",
        _ANY_SIZE,
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    _classifier(
        "swinv2",
        "Swinv2",
        _ANY_SIZE,
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    _patched("vit", "ViTForImageClassification"),
    _patched("vit_eager", "ViTForImageClassification", attn_implementation="eager"),
    _patched(
        "vit_mae",
        "ViTMAEForPreTraining",
        calls.unlabelled_images("pixel_values"),
        decoder_num_attention_heads=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=24,
    ),
    tiny(
        "yolos",
        "YolosForObjectDetection",
        calls.detection,
        _PATCHES | {"image_size": [32, 32], "num_detection_tokens": 5},
        **_ANY_SIZE,
        graph=False,
        why=_MATCHED,
    ),
    tiny(
        "detr",
        "DetrForObjectDetection",
        calls.detection,
        TWO_SIDED | {"num_labels": CLASSES, "num_queries": 5, "auxiliary_loss": True},
        {
            "backbone_config": (
                "ResNetConfig",
                {
                    "embedding_size": 8,
                    "hidden_sizes": [8, 16, 16, 24],
                    "depths": [1, 1, 1, 1],
                    "out_features": ["stage4"],
                },
            )
        },
        lengths=(64, 96),
        graph=False,
        why=_MATCHED,
    ),
    _resized(
        "dpt",
        "DPTForSemanticSegmentation",
        calls.segmentation,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    ),
)

# ------------------------------------------------------------------------------- audio

_EARS = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_length": 2,
}
_SAMPLES: Mapping[str, Any] = {"lengths": (800, 1000)}
_HEARD = TWO_SIDED | {"num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32}
_AUGMENTED = "SpecAugment draws masks with numpy"


def _listener(name: str, head: str, words: Mapping[str, Any], /, **settings: Any) -> Case:
    return tiny(name, head, calls.speech, _EARS | settings, **_SAMPLES, **words)


_AUDIO = (
    tiny(
        "ast",
        "ASTForAudioClassification",
        calls.spectrogram(16),
        _PATCHES | {"num_mel_bins": 16, "max_length": 24, "time_stride": 8, "frequency_stride": 8},
        varies=_FIXED["varies"],
        lengths=(24,),
    ),
    _listener(
        "data2vec_audio",
        "Data2VecAudioForCTC",
        {},
        conv_pos_kernel_size=5,
        num_conv_pos_embeddings=2,
    ),
    _listener("hubert", "HubertForCTC", {}),
    _listener(
        "hubert_layerdrop",
        "HubertForCTC",
        {"why": "skips layers at random", "graph": False},
        layerdrop=0.5,
    ),
    _listener("sew", "SEWForCTC", {}),
    tiny(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        calls.features(16),
        {k: v for k, v in _HEARD.items() if k != "num_mel_bins"}
        | {"input_feat_per_channel": 16, "conv_channels": 16, "max_source_positions": 60},
        lengths=(40, 60),
    ),
    _listener("unispeech", "UniSpeechForCTC", {}),
    _listener("wav2vec2", "Wav2Vec2ForCTC", {}),
    _listener(
        "wav2vec2_augmented",
        "Wav2Vec2ForCTC",
        {"graph": False, "why": _AUGMENTED},
        apply_spec_augment=True,
        mask_time_prob=0.2,
    ),
    _listener("wav2vec2_conformer", "Wav2Vec2ConformerForCTC", {}),
    _listener("wavlm", "WavLMForCTC", {}),
    tiny(
        "whisper",
        "WhisperForConditionalGeneration",
        calls.spoken(16),
        _HEARD,
        varies=_FIXED["varies"],
        lengths=(60,),
    ),
)

SENSE_CASES: tuple[Case, ...] = (*_VISION, *_AUDIO)
