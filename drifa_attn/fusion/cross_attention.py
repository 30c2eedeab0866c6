"""Cross-attention, the plain control: the positions of each modality ask the positions of all others."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drifa_attn.attention.mfa import pair
from drifa_attn.checks import count
from drifa_attn.functional import lin, without_autocast
from drifa_attn.layout import Place

from .additive import Additive, others
from .maps import MOST_POSITIONS, attend, checked_heads, linear, multiple

HEADS, REDUCTION, SMALLEST_HEAD = 4, 4, 8


class CrossAttention(Additive):
    """Each modality asks all others, position by position.

        q = lin(queries.i, x_i)        k, v = lin(keys.j, x_j), lin(values.j, x_j), of all j other than i along one axis
        y_i = x_i + lin(outs.i, MHA(q, k, v))

    Its cost grows with the square of the positions. It acts at stages where all modalities together have at most
    `max_positions`; `print(net.plan)` says where. It starts with `outs` of zero.

    Args:
        places: where the features of each modality are, and how many channels they have.
        heads: h >= 1.
        dim: the width d of queries, keys and values, a multiple of h; None is `max(max c_i // 4, 8 h)`, and the next multiple
            of h where that is none.
        max_positions: the most positions of all modalities together.

    Shape, Raises: as `Additive`.
    Differs: none; it is a control. Absent modalities are left out of the keys.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        heads: int = HEADS,
        dim: int | None = None,
        max_positions: int = MOST_POSITIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(places, max_positions)
        channels = [place.channels for place in places]
        heads = count("CrossAttention", "heads", heads)
        default = multiple(max(max(channels) // REDUCTION, SMALLEST_HEAD * heads), heads)
        self.dim = default if dim is None else count("CrossAttention", "dim", dim)
        self.heads = checked_heads("CrossAttention", self.dim, heads)
        for name in ("queries", "keys", "values"):
            setattr(self, name, nn.ModuleList(linear(c, self.dim, device, dtype) for c in channels))
        self.outs = nn.ModuleList(linear(self.dim, c, device, dtype) for c in channels)
        for out in self.outs:
            nn.init.zeros_(out.weight)  # type: ignore[arg-type]

    def started(self) -> list[nn.Parameter]:
        """The maps back to the features."""
        return list(self.outs.parameters())

    def attended(self, zs: Sequence[Tensor], present: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """What the positions of each modality read, `b d n_i`, and how they weigh those of the others, `b h n_i l`."""
        q, k, v = ([lin(z, pair(one)) for one, z in zip(maps, zs, strict=True)] for maps in self.maps())
        found = []
        for i, query in enumerate(q):
            rest = others(i, len(zs))
            has = None
            if present is not None:
                has = torch.cat([present[:, j, None].expand(-1, zs[j].shape[-1]) for j in rest], 1)
            found.append(attend(query, torch.cat([k[j] for j in rest], 2), torch.cat([v[j] for j in rest], 2), self.heads, has))
        return found

    def maps(self) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList]:
        """The maps to queries, keys and values."""
        return self.queries, self.keys, self.values  # type: ignore[return-value]

    def deltas(self, zs: Sequence[Tensor], xs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """What is added to each modality."""
        found = zip(self.attended(zs, present), self.outs, strict=True)
        return [lin(y, pair(out)) for (y, _), out in found]  # type: ignore[arg-type]

    def gates(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The attention `b h n_i l` of each modality to the positions of the others, in their order; each row sums to one."""
        zs = self.checked(xs, present)
        with without_autocast(xs[0]):
            return [weights for _, weights in self.attended(zs, present)]
