"""Every fusion with a published implementation against numbers measured on it, forward and backward."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from drifa_attn.fusion.aff import AFF
from drifa_attn.fusion.caf import CoAttention
from drifa_attn.fusion.contrast import attention, global_loss, local_scores, matched
from drifa_attn.fusion.hyperbranch import HyperBranch
from drifa_attn.fusion.iaff import IAFF
from drifa_attn.fusion.lmf import LowRank
from drifa_attn.fusion.mmtm import MMTM
from drifa_attn.fusion.mttu import MTTU
from drifa_attn.fusion.mutual_attention import MutualAttention
from drifa_attn.layout import Place
from tests._compare import assert_golden, max_abs

FOLDER = Path(__file__).parents[1] / "golden" / "fusions"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def place(*shape):
    return Place(channels=shape[0], layout="b c ...", num_prefix_tokens=0, shape=shape)


class Golden:
    """A file's arrays in one dtype; what is read of them, and what a layer gave."""

    def __init__(self, name, dtype):
        self.name, self.values = name, dict(np.load(FOLDER / f"{name}.npz"))
        self.dtype = dtype

    def __getitem__(self, key):
        value = torch.from_numpy(np.asarray(self.values[key]))
        return value.to(self.dtype) if value.is_floating_point() else value

    def inputs(self, *keys):
        return [self[key].requires_grad_() for key in keys]

    def places(self, *keys):
        return [place(*self.values[key].shape[1:]) for key in keys]

    def load(self, layer, rename=lambda name: name):
        """The layer with the file's weights; every weight of the layer is in the file."""
        weights = {rename(name[2:]): self[name] for name in self.values if name.startswith("w.")}
        layer = layer.to(self.dtype).eval()
        missing, _ = layer.load_state_dict({k: v for k, v in weights.items() if k in layer.state_dict()}, strict=False)
        assert not [name for name in missing if not name.endswith("num_batches_tracked")]
        return layer

    def check(self, **found):
        for key, value in found.items():
            assert_golden(value, self.values[key], self.name, key)

    def check_gradients(self, layer, outputs, cotangents, leaves):
        """The gradients of Σ output · cotangent, of these inputs and of every weight that the file has one of."""
        sum((y * self[r]).sum() for y, r in zip(outputs, cotangents, strict=True)).backward()
        for name, x in leaves.items():
            assert_golden(x.grad, self.values[name], self.name, name)
        named = {f"g.{name}": p for name, p in layer.named_parameters()} if layer is not None else {}
        for name in self.values:
            if name in named and name.startswith("g.keys") and name.endswith("bias"):
                assert max_abs(named[name].grad) < 1e-5  # zero: it adds the same to all that a softmax weighs
            elif name in named:
                assert_golden(named[name].grad, self.values[name], self.name, name)
        return [name for name in self.values if name in named]


def test_golden_files_are_all_here():
    assert sorted(path.stem for path in FOLDER.glob("*.npz")) == [
        *("aff", "caf_coattention", "caf_hyperbranch", "gloria_attention", "gloria_losses"),
        *("iaff", "lmf", "mmtm", "mttu", "mutual_attention"),
    ]


@DTYPES
def test_mmtm(dtype):
    golden = Golden("mmtm", dtype)
    layer = golden.load(MMTM(golden.places("x1", "x2"), scale=1))
    xs = golden.inputs("x1", "x2")
    ys = layer(xs)
    golden.check(y1=ys[0], y2=ys[1])
    checked = golden.check_gradients(layer, ys, ["R1", "R2"], {"g.x1": xs[0], "g.x2": xs[1]})
    assert len(checked) == len(list(layer.parameters()))


@DTYPES
def test_lmf(dtype):
    golden = Golden("lmf", dtype)
    vs = golden.inputs("x1", "x2", "x3")
    layer = golden.load(LowRank(golden.places("x1", "x2", "x3"), rank=3, dim=7))
    z = layer(vs, {}, None)
    golden.check(z=z)
    golden.check_gradients(layer, [z], ["R"], {f"g.x{i + 1}": v for i, v in enumerate(vs)})


@DTYPES
@pytest.mark.parametrize(("name", "kind"), [("aff", AFF), ("iaff", IAFF)])
def test_aff(name, kind, dtype):
    golden = Golden(name, dtype)
    xs, places = golden.inputs("x1", "x2"), golden.places("x1", "x2")
    layer = golden.load(kind(places, [places]))
    z = layer.folded({0: xs}, None)[0].reshape(xs[0].shape)
    golden.check(z=z)
    golden.check_gradients(layer, [z], ["R"], {"g.x1": xs[0], "g.x2": xs[1]})
    if name == "iaff":
        assert not torch.allclose(z, golden["z_as_released"], rtol=1e-3)


@DTYPES
def test_caf_coattention(dtype):
    golden = Golden("caf_coattention", dtype)
    layer = golden.load(CoAttention(golden.places("x1", "x2")))
    xs = golden.inputs("x1", "x2")
    ys = layer(xs)
    golden.check(y1=ys[0], y2=ys[1])
    checked = golden.check_gradients(layer, ys, ["R1", "R2"], {"g.x1": xs[0], "g.x2": xs[1]})
    assert len(checked) == len(list(layer.parameters()))
    for y, key in zip(ys, ("y1_as_released", "y2_as_released"), strict=True):
        assert not torch.allclose(y, golden[key], rtol=1e-3)


@DTYPES
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_caf_hyperbranch(mode, dtype):
    golden = Golden("caf_hyperbranch", dtype)
    stages = [golden.places("u1", "u2"), golden.places("v1", "v2")]
    layer = golden.load(HyperBranch(stages[-1], stages)).train(mode == "train")
    us, vs = golden.inputs("u1", "u2"), golden.inputs("v1", "v2")
    f, _ = layer.fused({0: us, 1: vs}, None)
    f1, _ = layer.stages[0].weighed(us, None)
    golden.check(**{f"f1_{mode}": f1.reshape(us[0].shape), f"f2_{mode}": f.reshape(vs[0].shape)})
    leaves = {"g.u1": us[0], "g.u2": us[1], "g.v1": vs[0], "g.v2": vs[1]}
    leaves = {f"{name}_{mode}": x for name, x in leaves.items()}
    golden.check_gradients(layer, [f.reshape(vs[0].shape)], [f"R_{mode}"], leaves)


@DTYPES
def test_mutual_attention_of_vectors(dtype):
    golden = Golden("mutual_attention", dtype)
    vs = golden.inputs("v1", "v2")
    layer = golden.load(MutualAttention(golden.places("v1", "v2"), heads=3, dims=[24, 18]))
    ys = layer(vs)
    golden.check(z1=ys[0], z2=ys[1])


@DTYPES
def test_mutual_attention_position_by_position(dtype):
    golden = Golden("mutual_attention", dtype)
    xs = golden.inputs("x1", "x2")
    layer = golden.load(MutualAttention(golden.places("x1", "x2"), heads=3, dims=[24, 18]))
    ys = [x + layer.attended(xs, i)[1 - i][0] for i, x in enumerate(xs)]
    golden.check(y1=ys[0], y2=ys[1])
    golden.check_gradients(layer, ys, ["R1", "R2"], {"g.x1": xs[0], "g.x2": xs[1]})


@DTYPES
def test_mttu(dtype):
    golden = Golden("mttu", dtype)
    x, tokens = golden.inputs("x", "tokens")
    tokens_, heads = tokens.mT if tokens.shape[1] == 16 else tokens, int(golden.values["heads"])
    places = golden.places("x")
    layer = MTTU(places, [places], dim=16, heads=heads, layers=2, mlp_ratio=1.5)
    layer.projections = nn.ModuleList([nn.Identity()])
    layer = golden.load(layer, lambda name: re.sub("^positions$", "positions.0", name))
    t = layer.transformed(tokens_ + layer.positions[0])
    golden.check(T=t.mT)
    layer.tokens = lambda maps: tokens_ + layer.positions[0]
    z = layer([], {0: [x]}, None)
    golden.check(z=z)
    golden.check_gradients(layer, [z], ["R"], {"g.x": x, "g.tokens": tokens})


@DTYPES
def test_gloria_attention(dtype):
    golden = Golden("gloria_attention", dtype)
    regions, words = golden.inputs("x1", "x2")
    weights = attention(regions, words, float(golden.values["temp1"]))
    context = regions @ weights
    golden.check(attention=weights.mT, context=context)
    golden.check_gradients(None, [context], ["R"], {"g.x1": regions, "g.x2": words})


@DTYPES
def test_gloria_losses(dtype):
    golden = Golden("gloria_losses", dtype)
    regions, words, v, t = golden.inputs("regions", "words", "v", "t")
    temperatures, lengths = [float(one) for one in golden.values["temps"]], golden.values["lengths"]
    columns = [local_scores(regions, words[b : b + 1, :, :n], temperatures) for b, n in enumerate(lengths)]
    scores = torch.cat(columns, 1)
    golden.check(local_scores=scores)
    assert_golden(matched(scores, None), golden.values["local_loss"].sum(), "gloria_losses", "local_loss")
    assert_golden(global_loss(v, t, temperatures[2]), golden.values["global_loss"].sum(), "gloria_losses", "global_loss")
    (matched(scores, None) + global_loss(v, t, temperatures[2])).backward()
    golden.check(**{"g.regions": regions.grad, "g.words": words.grad, "g.v": v.grad, "g.t": t.grad})
