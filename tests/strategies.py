"""What hypothesis draws: shapes, options and a seed; tensors are then built from the seed."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from drifa_attn.layout import LAYOUTS

SEEDS = st.integers(0, 2**16)
CHANNELS = st.sampled_from([1, 2, 7, 8, 17, 33, 64])
SIZES = st.lists(st.integers(1, 7), max_size=3).map(tuple)  # a vector, a sequence, a map, a volume; 1x1 is among them
FORMATS = st.sampled_from(["contiguous", "channels_last", "sliced", "expanded"])
DTYPES = st.sampled_from([torch.float32, torch.float64])
INITS = st.sampled_from(["paper", "identity"])


def stored(x, memory_format):
    """The values of `x` (expanded: of its first sample) in memory of another shape."""
    if memory_format == "channels_last" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory_format == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    return x[:1].expand_as(x) if memory_format == "expanded" else x


class Features(NamedTuple):
    """One modality: `x` in its own layout, and where its positions are."""

    x: torch.Tensor
    channels: int
    layout: str
    num_prefix_tokens: int

    @property
    def options(self):
        return {"layout": self.layout, "num_prefix_tokens": self.num_prefix_tokens}

    def positions(self, t=None):
        """The positions of `t` (its own features by default) as `b c ...`."""
        t = self.x if t is None else t
        return t if self.layout == "b c ..." else t[:, self.num_prefix_tokens :].movedim(-1, 1)


@st.composite
def features(draw, channels=None, batch=None, dtype=torch.float64, layouts=LAYOUTS):
    """Features of any rank, layout, prefix and memory format."""
    c = draw(CHANNELS) if channels is None else channels
    b = draw(st.integers(1, 3)) if batch is None else batch
    sizes, layout, memory_format = draw(SIZES), draw(st.sampled_from(layouts)), draw(FORMATS)
    prefix = draw(st.integers(0, 2)) if layout == "b ... c" and len(sizes) == 1 else 0
    sizes = (sizes[0] + prefix,) if prefix else sizes
    shape = (b, c, *sizes) if layout == "b c ..." else (b, *sizes, c)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(SEEDS)), dtype=torch.float64)
    return Features(stored(x.to(dtype), memory_format), c, layout, prefix)


class Modalities(NamedTuple):
    """One to four modalities of one batch, and which sample has which (None: all)."""

    each: list[Features]
    present: torch.Tensor | None

    @property
    def xs(self):
        return [one.x for one in self.each]

    @property
    def options(self):
        return {"layout": [one.layout for one in self.each], "num_prefix_tokens": [one.num_prefix_tokens for one in self.each]}


@st.composite
def modalities(draw, channels=None, equal=None, at_least=1, masked=None, dtype=torch.float64, layouts=LAYOUTS):
    """Modalities of equal or unequal channels, each with its own positions, layout and memory format."""
    m, b = draw(st.integers(at_least, 4)), draw(st.integers(1, 3))
    equal = draw(st.booleans()) if equal is None else equal
    shared = (draw(CHANNELS) if channels is None else channels) if equal else None
    each = [draw(features(shared, b, dtype, layouts)) for _ in range(m)]
    present = None
    if draw(st.booleans()) if masked is None else masked:
        present = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=b, max_size=b)))
    return Modalities(each, present)
