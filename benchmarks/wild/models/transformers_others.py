"""Networks of transformers that find objects, or read sound, video, series, or images with sentences."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.wild.case import Case, images, tokens
from benchmarks.wild.models.transformers import BART, net
from benchmarks.wild.models.transformers_images import RESNET, VIT

SOUND = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SOUND |= {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2}
DETR = {name: value for name, value in BART.items() if name not in ("vocab_size", "use_cache")}
DETR |= {"num_queries": 5, "num_labels": 3, "use_timm_backbone": False, "use_pretrained_backbone": False}
SERIES = {"context_length": 24, "prediction_length": 4, "lags_sequence": [1, 2], "num_time_features": 1}
SERIES |= {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
WORDS = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WORDS |= {"max_position_embeddings": 16, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}


def resnet() -> Any:
    """The configuration of a backbone with four maps."""
    return transformers.ResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])


def with_backbone(kind: str, config: str, part: str = "", *, last: bool = False, **options: Any) -> Case:
    """A network around a ResNet of transformers."""
    network, made = getattr(transformers, kind), getattr(transformers, f"{config}Config")

    def build() -> nn.Module:
        backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"]) if last else resnet()
        return network(made(backbone_config=backbone, **options))

    return Case(library="transformers", name=kind, build=build, inputs=images(64, 64), part=part, part_inputs=images(64, 64))


def detectors() -> Iterator[Case]:
    """Networks that find objects, or cut images into regions."""
    yield with_backbone("DetrForObjectDetection", "Detr", last=True, **DETR)
    yield with_backbone("ConditionalDetrForObjectDetection", "ConditionalDetr", last=True, **DETR)
    yield with_backbone("DeformableDetrForObjectDetection", "DeformableDetr", **DETR, num_feature_levels=3)
    yield net("YolosForObjectDetection", "Yolos", images(32, 32), **VIT | {"image_size": [32, 32]}, num_detection_tokens=4)
    upernet = {
        "hidden_size": 16,
        "num_labels": 3,
        "auxiliary_in_channels": 32,
        "pool_scales": [1, 2],
        "use_auxiliary_head": False,
    }
    yield with_backbone("UperNetForSemanticSegmentation", "UperNet", **upernet)
    yield with_backbone("UperNetForSemanticSegmentation", "UperNet", part="backbone", **upernet)


def sounds() -> Iterator[Case]:
    """Networks that read waves and spectrograms."""
    wave = images(channels=400)
    yield net("Wav2Vec2Model", "Wav2Vec2", wave, **SOUND)
    yield net("Wav2Vec2ForSequenceClassification", "Wav2Vec2", wave, **SOUND, num_labels=3, classifier_proj_size=16)
    yield net("HubertModel", "Hubert", wave, **SOUND)
    yield net("WavLMModel", "WavLM", wave, **SOUND)
    yield net("SEWModel", "SEW", wave, **SOUND, squeeze_factor=2)
    whisper = BART | {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16, "pad_token_id": 0}
    yield net("WhisperForAudioClassification", "Whisper", images(40, channels=16), **whisper, num_labels=3)
    yield net("WhisperModel", "Whisper", spoken, **whisper)
    yield net("ASTModel", "AST", images(16, channels=64), **VIT | {"patch_size": 8, "max_length": 64, "num_mel_bins": 16})


def spoken() -> dict[str, Tensor]:
    """Spectrograms and the beginnings of what is said."""
    return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens(7)()}


def described() -> dict[str, Tensor]:
    """Images and sentences."""
    return {"input_ids": tokens()(), "pixel_values": torch.randn(2, 3, 32, 32)}


def films() -> Iterator[Case]:
    """Networks that read video."""
    film = images(3, 32, 32, channels=4)
    yield net("VideoMAEModel", "VideoMAE", film, **VIT, num_frames=4, tubelet_size=2)
    yield net("TimesformerModel", "Timesformer", film, **VIT, num_frames=4)
    yield net("VivitModel", "Vivit", film, **VIT, num_frames=4, tubelet_size=[2, 8, 8])


def series() -> Iterator[Case]:
    """Networks that read series."""
    past = images(3, channels=24)
    yield net(
        "PatchTSTModel",
        "PatchTST",
        past,
        num_input_channels=3,
        context_length=24,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_attention_heads=2,
        ffn_dim=32,
        num_hidden_layers=2,
    )
    yield net("TimeSeriesTransformerModel", "TimeSeriesTransformer", told, **SERIES)


def told() -> dict[str, Tensor]:
    """A series, what is known of it, and what comes next."""
    seen, coming = (2, 26), (2, 4)
    found = {
        "past_values": torch.rand(seen),
        "past_time_features": torch.rand(*seen, 1),
        "past_observed_mask": torch.ones(seen),
    }
    return found | {"future_values": torch.rand(coming), "future_time_features": torch.rand(*coming, 1)}


def pairs() -> Iterator[Case]:
    """Networks that read images with sentences, and the half of one that reads sentences."""
    yield net("CLIPTextModel", "CLIPText", tokens(), **WORDS)
    seen, projection = VIT | {"projection_dim": 16}, {"projection_dim": 16}
    clip = partial(net, "CLIPModel", "CLIP", described, text_config=WORDS, vision_config=seen, **projection)
    yield clip()
    yield clip(part="vision_model", part_inputs=images(32, 32))


def cases() -> Iterator[Case]:
    """All of these."""
    yield from detectors()
    yield from sounds()
    yield from films()
    yield from series()
    yield from pairs()
