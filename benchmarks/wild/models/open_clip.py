"""Networks of open_clip: both towers of CLIP, each alone and together, of every kind that it builds."""

from collections.abc import Callable, Iterator
from functools import partial

from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import Tensor, nn

from benchmarks.wild.case import Case, images, tokens

TEXT = CLIPTextCfg(context_length=12, vocab_size=99, width=64, heads=2, layers=2)
SMALL = partial(CLIPVisionCfg, layers=2, width=64, head_width=32, patch_size=8, image_size=32)
POOLED = partial(SMALL, attentional_pool=True, attn_pooler_heads=2)
TOWERS = {
    "ViT": SMALL(),
    "ViT, average pooling": SMALL(pool_type="avg"),
    "ViT, attentional pooling": POOLED(),
    "ModifiedResNet": CLIPVisionCfg(layers=(1, 1, 1, 1), width=32, head_width=32, image_size=64),
    "timm test_convnext": CLIPVisionCfg(timm_model_name="test_convnext", image_size=64),
}


def pair(size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes a batch of images with their sentences."""
    return lambda: (images(size, size)(), tokens()())


def visual(config: CLIPVisionCfg) -> nn.Module:
    """The tower that reads images."""
    return CLIP(64, config, TEXT).visual


def text() -> nn.Module:
    """The tower that reads sentences."""
    return CustomTextCLIP(64, TOWERS["ViT"], TEXT).text


def coca() -> nn.Module:
    """A tiny CoCa: CLIP with a decoder that reads both towers."""
    sizes = {"vocab_size": 99, "width": 64, "heads": 2, "layers": 2}
    written = CLIPTextCfg(context_length=12, embed_cls=True, output_tokens=True, **sizes)
    model = CoCa(64, MultimodalCfg(context_length=12, **sizes), written, POOLED(output_tokens=True))
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # which it leaves as it was in memory
    return model


def cases() -> Iterator[Case]:
    """All of them."""
    case = partial(Case, library="open_clip")
    for name, config in TOWERS.items():
        size = config.image_size
        yield case(name=f"visual tower, {name}", build=partial(visual, config), inputs=images(size, size))
    yield case(name="text tower", build=text, inputs=tokens())
    for name in ("ViT", "ModifiedResNet"):
        size, build = TOWERS[name].image_size, partial(CLIP, 64, TOWERS[name], TEXT)
        yield case(name=f"CLIP, {name}", build=build, inputs=pair(size))
        yield case(name=f"CLIP, {name}", build=build, inputs=pair(size), part="visual", part_inputs=images(size, size))
    yield case(name="CoCa", build=coca, inputs=pair(32))
    yield case(name="CoCa", build=coca, inputs=pair(32), part="visual", part_inputs=images(32, 32))
