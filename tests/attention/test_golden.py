"""Every layer against the numbers of the released implementation, forward and backward."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from drifa_attn import MFA, MIFA, RRA
from tests._compare import assert_golden
from tests.cases import listed

FILES = [path for path in sorted((Path(__file__).parents[1] / "golden").glob("*.npz")) if not path.stem.startswith("fullnet")]
DTYPES = [torch.float32, torch.float64]  # float64 shows how much of an error is the golden's own


def layer_name(golden_name):
    """The golden files number MIFA's pair from one."""
    return re.sub(r"(?:(mlifa\.conv)|(alpha))([12])\b", lambda m: f"{m[1] or m[2]}s.{int(m[3]) - 1}", golden_name)


def load(path, device, dtype):
    """The golden arrays as they are, and the layer with their weights."""
    golden = dict(np.load(path))
    kind, channels = path.stem.split("_")[0], golden.get("x", golden.get("x1")).shape[1]
    if kind == "rra":
        padding = "same" if "asympad" in path.stem else "symmetric"
        layer = RRA(channels, golden["y"].shape[1], 2 if "_s2_" in path.stem else 1, padding=padding)
        layer.train("bntrain" in path.stem)
    else:
        layer = {"mfa": MFA, "mifa": MIFA}[kind](channels)
    weights = {layer_name(name[2:]): torch.from_numpy(value) for name, value in golden.items() if name.startswith("w.")}
    missing, unexpected = layer.load_state_dict(weights, strict=False)
    counters = {name for name in layer.state_dict() if name.endswith("num_batches_tracked")}
    assert set(missing) - counters == ({"global_scale", "local_scale"} if "noscale" in path.stem else set())
    assert not unexpected
    return golden, layer.to(device, dtype)


def test_golden_files_are_all_here():
    assert [path.stem.split("_")[0] for path in FILES] == ["mfa"] * 4 + ["mifa"] * 3 + ["rra"] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layer_is_the_released_one(path, dtype, device):
    golden, layer = load(path, device, dtype)

    def tensors(pattern):
        names = sorted(name for name in golden if re.fullmatch(pattern, name))
        return names, [torch.tensor(golden[name]).to(device, dtype) for name in names]

    (_, xs), (_, cotangents), (names, _) = tensors("x[12]?"), tensors("R[12]?"), tensors("y[12]?")
    before = {name: value.clone() for name, value in layer.named_buffers()}
    for x in xs:
        x.requires_grad_()
    ys = listed(layer(xs if len(xs) == 2 else xs[0]))
    sum((y * r).sum() for y, r in zip(ys, cotangents, strict=True)).backward()

    for name, y in zip(names, ys, strict=True):
        assert_golden(y, golden[name], path.stem, name)
    if "attention" in golden:
        for gate in listed(layer.gates(xs if len(xs) == 2 else xs[0])):
            assert_golden(gate, golden["attention"], path.stem, "attention")
    grads = {f"g.{name}": p.grad for name, p in layer.named_parameters()}
    grads.update({f"g.{name}": x.grad for name, x in zip(tensors("x[12]?")[0], xs, strict=True)})
    checked = {name for name in golden if name.startswith("g.")}
    for name in checked:
        assert_golden(grads[layer_name(name)], golden[name], path.stem, name)
    unused = {"g.global_scale", "g.local_scale"} if "noscale" in path.stem else set()
    assert {layer_name(name) for name in checked} == set(grads) - unused
    after = {name for name in golden if name.startswith("after.")}
    for name in after:
        value = dict(layer.named_buffers())[name.removeprefix("after.")]
        if name.endswith("running_var"):  # ours is unbiased, theirs biased: n - 1 against n in the batch's share
            kept, n = 0.99 * before[name.removeprefix("after.")], len(ys[0]) * ys[0][0, 0].numel()
            value = kept + (value - kept) * (n - 1) / n
        assert_golden(value, golden[name], path.stem, name)
    assert len(after) == (4 if "bntrain" in path.stem else 0)
