"""The contrastive losses of GLoRIA: over a batch, what belongs to one sample is to be alike, globally and position by position.

Axes: `a` samples of the first modality, `b` samples of the second, `d` channels, `n` positions of the first (regions), `t`
positions of the second (words).
"""

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .maps import softmax

LARGEST = 2**28  # elements of one tensor: 1 GiB in float32


def attention(regions: Tensor, words: Tensor, temperature: float) -> Tensor:
    """How each word weighs the regions: softmax over regions of `temperature` · softmax over words of regionsᵀ words.

    Shape: `... d n`, `... d t` -> `... n t`; each column sums to one, float32 at least.
    """
    scores = softmax(einsum(regions, words, "... d n, ... d t -> ... n t"))
    return softmax(temperature * scores, dim=-2)


def local_scores(regions: Tensor, words: Tensor, temperatures: Sequence[float]) -> Tensor:
    """How alike every pair of samples is, position by position: `temp3 · log Σ_t exp(temp2 · cos(c_t, w_t))`.

    c_t is what word t of sample b reads of the regions of sample a.

    Shape: regions `a d n`, words `b d t` -> `a b`.
    Raises: ValueError: a batch for which this would take more than 1 GiB.
    """
    (a, d, n), (b, _, t) = regions.shape, words.shape
    if not torch.compiler.is_compiling() and a * b * t * max(d, n) > LARGEST:
        raise ValueError(
            f"GLoRIA's local loss compares all positions of all pairs of samples, here {a} x {b} x {n} x {t}: take smaller "
            'batches or a later last stage in at=, or leave it out by fusion_options={"gloria_weight": 0}.'
        )
    weights = attention(regions[:, None], words[None], temperatures[0])
    context = einsum(regions, weights, "a d n, a b n t -> a b d t")
    alike = cosine_similarity(context, words[None], dim=2)
    return temperatures[2] * (temperatures[1] * alike).logsumexp(-1)


def matched(scores: Tensor, has: Tensor | None) -> Tensor:
    """The cross entropies of scores `b b` against the diagonal, of the rows and of the columns, added up.

    `has` says which samples take part; the others are in no softmax, and without any the loss is zero.
    """
    if has is None:
        has = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~(has[:, None] & has), lowest)
    both = sum(-scores.log_softmax(dim).diagonal() for dim in (0, 1))
    return torch.where(has, both, 0).sum() / has.sum().clamp(min=1)


def local_loss(regions: Tensor, words: Tensor, temperatures: Sequence[float], has: Tensor | None = None) -> Tensor:
    """The cross entropies of the local scores, in both directions: regions `b d n`, words `b d t`, has `b` -> scalar."""
    return matched(local_scores(regions, words, temperatures), has)


def global_loss(one: Tensor, two: Tensor, temperature: float, has: Tensor | None = None) -> Tensor:
    """The cross entropies of `temp3 · cos(g_a, g_b)`, in both directions: `b d`, `b d`, has `b` -> scalar."""
    return matched(temperature * cosine_similarity(one[:, None], two[None], dim=-1), has)
