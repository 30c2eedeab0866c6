"""Multimodal information fusion attention (MIFA), Fig. 3 of arXiv:2412.01248: MGIFA, MLIFA and the gates that they share."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from drifa_attn import functional, ops
from drifa_attn.checks import Init, check_init, check_modalities, check_present, count, per_modality
from drifa_attn.functional import Linear, Masks
from drifa_attn.layout import Layout, check_features, check_layout, checked_masks, positions

from .mfa import add_statistics, must_call, pair, statistics, unfitted
from .refines import Refines, Spec
from .start import check_samples, fit_, fit_statistics_, glorot_, is_start, reduced_width, start_, wide


def checked_positions(
    owner: str, xs: Sequence[Tensor], modalities: int, channels: int, present: Tensor | None, mask: Masks
) -> tuple[list[Tensor], Masks]:
    """Checks `b c ...` features and gives them as `b c n`, with zeros for absent modalities, and their masks as `b n`."""
    check_modalities(owner, xs, modalities)
    for x in xs:
        check_features(owner, x, channels, "b c ...")
    check_present(owner, present, xs)
    mask = checked_masks(owner, mask, xs, [("b c ...", 0)] * len(xs))
    return functional.mask_absent([positions(x, "b c ...") for x in xs], present), mask


def seen(present: Tensor | None, mask: Masks) -> Tensor | None:
    """Which sample has which modality, `b m`: what is present and has a True in its mask, as `b n`."""
    real = [one for one in mask or () if one is not None]
    if not real:
        return present
    full = torch.ones(len(real[0]), dtype=torch.bool, device=real[0].device)
    some = torch.stack([full if one is None else one.any(1) for one in mask or ()], 1)
    return some if present is None else present & some


def common_width(channels: Sequence[int], dim: int | None, reduction: int | None) -> int:
    """The width at which MIFA reads all modalities."""
    if dim is None:
        return reduced_width("MIFA", max(channels), reduction)
    if reduction is not None:
        raise ValueError(f"MIFA expected dim or reduction, got both (dim={dim}, reduction={reduction}): leave one out.")
    return count("MIFA", "dim", dim)


class MGIFA(nn.Module):
    """Multimodal global information fusion attention, Fig. 3: the three poolings share one dense layer.

        G = Σ_{r ∈ (min, mean, max)} σ(lin(dense, Σ_i r(x_i)))

    Args:
        channels: channels of every modality, >= 1.

    Shape: a list of x_i `b c ...` (positions may differ), present `b m`, mask a list of `b n_i` or None, as `MIFA` takes it ->
        G `b c`, float32 at least, in (0, 3).
    Raises: ValueError, TypeError: a feature of other channels or batch size, a `present` that is not a boolean `b m`, or a mask
        that does not fit its feature.
    Differs: `present` and `mask` are not in the paper; None is the paper.
    """

    def __init__(self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.channels = channels = count("MGIFA", "channels", channels)
        self.dense = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper initialisation: Glorot-uniform weights, zero biases."""
        self.apply(glorot_)

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None, mask: Masks = None) -> Tensor:
        """The global information G `b c` that the modalities share."""
        xs, mask = checked_positions("MGIFA", xs, len(xs), self.channels, present, mask)
        with functional.without_autocast(xs[0]):
            return functional.mgifa(xs, pair(self.dense), present, mask)

    def calibrate(self, pools: Tensor) -> Tensor:
        """Fit the map to the poolings `r b c`; the information G `b c` afterwards."""
        fitted = fit_(pair(self.dense), rearrange(pools, "r b c -> b c r"))
        return fitted.sigmoid().sum(-1)

    def extra_repr(self) -> str:
        return f"{self.channels}"


class MLIFA(nn.Module):
    """Multimodal local information fusion attention, Fig. 3: one convolution per modality.

        t_i = σ(lin(convs[i], x_i))        L = Σ_{r ∈ (min, mean, max)} Σ_i r(t_i)

    Args:
        channels: channels of every modality, >= 1.
        modalities: their number m, >= 1.

    Shape: a list of m x_i `b c ...` (positions may differ), present `b m`, mask a list of m `b n_i` or None, as `MIFA` takes it
        -> L `b c`, float32 at least, in (0, 3m).
    Raises: ValueError, TypeError: a feature of other channels or batch size, a `present` that is not a boolean `b m`, or a mask
        that does not fit its feature.
    Differs: m other than 2, `present` and `mask` are not in the paper.
    """

    def __init__(
        self,
        channels: int,
        modalities: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels = count("MLIFA", "channels", channels)
        self.modalities = modalities = count("MLIFA", "modalities", modalities)
        self.convs = nn.ModuleList(nn.Linear(channels, channels, device=device, dtype=dtype) for _ in range(modalities))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper initialisation: Glorot-uniform weights, zero biases."""
        self.apply(glorot_)

    def weights(self) -> list[Linear]:
        """The weights of the convolutions, one pair per modality."""
        return [pair(conv) for conv in self.convs]

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None, mask: Masks = None) -> Tensor:
        """The local information L `b c` that the modalities share."""
        xs, mask = checked_positions("MLIFA", xs, self.modalities, self.channels, present, mask)
        with functional.without_autocast(xs[0]):
            return functional.mlifa(xs, self.weights(), present, mask)

    def calibrate(self, xs: Sequence[Tensor], present: Tensor, mask: Masks = None) -> Tensor:
        """Fit each map to the features `b c n` that are present; the information L `b c` afterwards."""
        for conv, x, has, real in zip(self.weights(), xs, present.unbind(1), functional.each(mask, xs), strict=True):
            fit_(conv, x[has], None if real is None else real[has])
        return functional.mlifa(xs, self.weights(), present, mask)

    def extra_repr(self) -> str:
        return f"{self.channels}, modalities={self.modalities}"


class Alphas(nn.ParameterList):
    """The alphas of all modalities. It is called, so that hooks of other tools, such as those that load weights, run."""

    __call__ = nn.Module.__call__  # a plain list of parameters refuses it

    def forward(self) -> list[Tensor]:
        """The alphas, `c_i` each."""
        return list(self)


class MIFA(Refines, nn.Module):
    """Multimodal information fusion attention, Fig. 3: one gate shared by all modalities.

        a   = σ(global_scale · MGIFA(x_1..x_m) + local_scale · MLIFA(x_1..x_m))
        y_i = x_i · a · alphas[i]

    The modalities may differ in positions, layout and channels. Unequal channels, or a `dim` or `reduction`, add linear maps
    to one width d and back: `z_i = lin(squeezes[i], x_i)`, and `lin(expands[i], …)` gives each modality its own gate.
    `init="identity"` starts where every gain `a · alphas[i]` is exactly one; G and L are then standardised by four buffers, see
    `MFA`. While `enabled` is False, every y_i is x_i.

    Args:
        channels: channels of every modality, >= 1: one number, or one per modality.
        modalities: their number m, >= 1; None is the length of `channels`, or the paper's 2.
        dim: the common width d, >= 1; None with unequal channels and no reduction is the largest of the channels.
        reduction: None, or an integer >= 1 for `d = max(max(channels) // reduction, 8)`; not together with `dim`.
        init: "paper" (Glorot-uniform weights, zero biases, scales and alphas one) or "identity" (the same, but alphas two, and
            `expands`, or without them the scales, zero).
        layout: "b c ..." or "b ... c", one for all or one per modality.
        num_prefix_tokens: leading tokens that are left out of the pooling and pass unchanged, one for all or one per modality.

    Shape: a list of m features of these layouts, present `b m` (True: this sample has this modality) -> a list of the same
        shapes, dtypes and strides. An absent modality adds to no sum and passes unchanged; so does a sample with none. mask, a
        list with one mask, as `MFA` takes it, or None per modality: what is False takes no part and passes unchanged. A
        modality of which a sample has no True is absent from it.
    Raises: ValueError, TypeError: an argument out of its range, a feature of another layout, width or batch size, a `present`
        that is not a boolean `b m`, or a mask that does not fit its feature.
    Differs: m other than 2, unequal channels, `dim`, `reduction`, `init="identity"`, `layout`, `num_prefix_tokens`, `present`
        and `mask` are not in the paper; the defaults do not use them. The released notebooks call the layer
        DeeperGlobalLocalAttentionLayer.
    """

    def __init__(
        self,
        channels: int | Sequence[int],
        modalities: int | None = None,
        *,
        dim: int | None = None,
        reduction: int | None = None,
        init: Init = "paper",
        layout: Layout | Sequence[Layout] = "b c ...",
        num_prefix_tokens: int | Sequence[int] = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if modalities is None:
            modalities = len(channels) if isinstance(channels, Sequence) else 2
        modalities = count("MIFA", "modalities", modalities)
        check_init("MIFA", init)
        self.channels = tuple(count("MIFA", "channels", c) for c in per_modality("MIFA", "channels", channels, modalities))
        self.layouts = per_modality("MIFA", "layout", layout, modalities)
        self.num_prefix_tokens = per_modality("MIFA", "num_prefix_tokens", num_prefix_tokens, modalities)
        for place in zip(self.layouts, self.num_prefix_tokens, strict=True):
            check_layout("MIFA", *place)
        self.modalities, self.reduction, self.init = modalities, reduction, init
        self.dim = common_width(self.channels, dim, reduction)
        self.squeezes: nn.ModuleList | None = None
        self.expands: nn.ModuleList | None = None
        if dim is not None or reduction is not None or len(set(self.channels)) > 1:
            self.squeezes = nn.ModuleList(nn.Linear(c, self.dim, device=device, dtype=dtype) for c in self.channels)
            self.expands = nn.ModuleList(nn.Linear(self.dim, c, device=device, dtype=dtype) for c in self.channels)
        self.mgifa = MGIFA(self.dim, device=device, dtype=dtype)
        self.mlifa = MLIFA(self.dim, modalities, device=device, dtype=dtype)
        self.global_scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.local_scale = nn.Parameter(torch.empty(self.dim, device=device, dtype=dtype))
        self.alphas = Alphas(torch.empty(c, device=device, dtype=dtype) for c in self.channels)
        add_statistics(self, self.dim, init, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all weights to the start that `init` names."""
        self.apply(glorot_)
        start_(self.init, *self.gating(), statistics(self))

    def gating(self) -> tuple[list[Tensor], list[Tensor], list[nn.Linear]]:
        """The alphas, the scales and the maps before σ: what decides the gains."""
        return list(self.alphas), [self.global_scale, self.local_scale], list(self.expands or [])  # type: ignore[arg-type]

    def is_start(self) -> bool:
        """Whether every gain is still exactly one by the identity start; False where an `expand` must be called."""
        return not any(callable(pair(expand)) for expand in self.expands or ()) and is_start(self.init, *self.gating())

    def must_call(self) -> str | None:
        """The first linear map that is no plain `nn.Linear`, in words: it is called, and no fused operator can take it."""
        maps = {"mgifa.dense": self.mgifa.dense}
        for name, some in (("mlifa.convs", self.mlifa.convs), ("squeezes", self.squeezes), ("expands", self.expands)):
            maps |= {f"{name}.{i}": linear for i, linear in enumerate(some or ())}  # type: ignore[misc]
        return must_call(maps)

    @torch.no_grad()
    def calibrate(self, xs: Sequence[Tensor], present: Tensor | None = None, mask: Masks = None) -> None:
        """Fit the maps and the four buffers, in place, to features xs of at least 16 samples; see `MFA.calibrate`.

        Only what is present counts, at the positions of its mask. What decides the gains is not touched.

        Raises: ValueError, TypeError: fewer samples, fewer than two of a modality, paper init, a layer that has left its start,
            a linear map that is no plain `nn.Linear`, or features that `forward` does not take.
        """
        zs, mask = self.checked(xs, present, mask)
        zs = [wide(z) for z in functional.as_maps(zs, mask)]
        check_samples("MIFA.calibrate", zs[0].shape[0])
        buffers, present = unfitted(self), seen(present, mask)
        if present is None:
            present = torch.ones(len(zs[0]), self.modalities, dtype=torch.bool, device=zs[0].device)
        if (present.sum(0) < 2).any():
            raise ValueError(
                f"MIFA.calibrate expected at least two samples of each modality, got {present.sum(0).tolist()}: "
                "pass a batch in which each is present."
            )
        with functional.without_autocast(xs[0]):
            zs = functional.mask_absent(zs, present)
            each = functional.each(mask, zs)
            for i, (squeeze, has) in enumerate(zip(self.squeezes or (), present.unbind(1), strict=False)):
                real = each[i]
                fit_(pair(squeeze), zs[i][has], None if real is None else real[has], deviation=1)
                zs[i] = functional.lin(zs[i], pair(squeeze))
            pools, some = functional.pool_modalities(zs, present, mask), present.any(1)
            global_info, local_info = self.mgifa.calibrate(pools[:, some]), self.mlifa.calibrate(zs, present, mask)
            fit_statistics_(buffers, global_info, local_info[some])

    def gates(self, xs: Sequence[Tensor], present: Tensor | None = None, mask: Masks = None) -> list[Tensor]:
        """The gates a_i `b c_i` of features xs, in (0, 1), float32 at least; at equal channels they are one gate."""
        return self.attend(xs, present, mask)[0]

    def gains(self, xs: Sequence[Tensor], present: Tensor | None = None, mask: Masks = None) -> list[Tensor]:
        """The factors of each channel, `b c_i` per modality, for features xs: `a · alphas[i]`, and one for what is absent."""
        return self.factors(self.gates(xs, present, mask), seen(present, self.checked(xs, present, mask)[1]))

    def factors(self, gates: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """The gains that these gates give."""
        factors = [functional.gain(a, alpha) for a, alpha in zip(gates, self.alphas(), strict=True)]
        if present is None:
            return factors
        return [torch.where(has[:, None], factor, 1) for has, factor in zip(present.unbind(1), factors, strict=True)]

    def attend(self, xs: Sequence[Tensor], present: Tensor | None, mask: Masks = None) -> tuple[list[Tensor], bool]:
        """The gates of features xs, and whether a fused operator runs for them: the one choice of a forward."""
        dense, convs = pair(self.mgifa.dense), self.mlifa.weights()
        squeezes = None if self.squeezes is None else [pair(squeeze) for squeeze in self.squeezes]
        expands = None if self.expands is None else [pair(expand) for expand in self.expands]
        zs, mask = self.checked(xs, present, mask)
        fused = ops.is_fused(zs, self.dim, (dense, *convs, *(squeezes or ()), *(expands or ())), mask)
        gates = ops.mifa(
            zs,
            dense,
            convs,
            self.global_scale,
            self.local_scale,
            present=present,
            mask=mask,
            squeezes=squeezes,
            expands=expands,
            statistics=statistics(self),
            fused=fused,
        )
        return gates, fused

    def checked(self, xs: Sequence[Tensor], present: Tensor | None, mask: Masks = None) -> tuple[list[Tensor], Masks]:
        """The positions `b c_i n_i` of features that fit this layer, and their masks `b n_i`."""
        check_modalities("MIFA", xs, self.modalities)
        check_present("MIFA", present, xs)
        places = list(zip(self.layouts, self.num_prefix_tokens, strict=True))
        for x, channels, place in zip(xs, self.channels, places, strict=True):
            check_features("MIFA", x, channels, *place)
        mask = checked_masks("MIFA", mask, xs, places)
        return [positions(x, *place) for x, place in zip(xs, places, strict=True)], mask

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None, mask: Masks = None) -> list[Tensor]:
        """The features xs, each channel of each present modality multiplied by its gain; while disabled, xs themselves."""
        if not self.enabled:
            return list(xs)
        gates, fused = self.attend(xs, present, mask)
        parts = zip(xs, self.factors(gates, present), self.layouts, self.num_prefix_tokens, strict=True)
        each = functional.each(mask, xs)
        return [ops.gate(*part, mask=one, fused=fused) for part, one in zip(parts, each, strict=True)]

    def spec(self) -> Spec:
        """The width and the start; the places give the rest."""
        dim = self.dim if self.reduction is None and self.squeezes is not None else None
        return Spec("mifa", {"dim": dim, "reduction": self.reduction, "init": self.init})

    def extra_repr(self) -> str:
        same = len(set(self.channels)) == 1
        return (
            f'{self.channels[0] if same else self.channels}, modalities={self.modalities}, dim={self.dim}, init="{self.init}"'
        )
