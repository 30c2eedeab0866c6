"""Which copy of a network runs: without memory, or a small real one; with its hooks, or without."""

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import drifa_attn
from drifa_attn.network.survey import survey
from tests.networks import Net, conv

# Lines that need a value, so that the meta device cannot run them.
LINES = {
    "constant": lambda x: x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1),
    "guard": lambda x: x if not x.isnan().any() else x.nan_to_num(),
    "item": lambda x: x * (1 + 0 * x.mean().item()),
    "select": lambda x: x[torch.ones(len(x), dtype=torch.bool, device=x.device).nonzero().flatten()],
    "packed": lambda x: nn.utils.rnn.pack_padded_sequence(x.flatten(2).mT, [64] * len(x), batch_first=True) and x,
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_needs_a_value_refuses_no_network(line):
    net = Net(lambda net, x: net.head(net.f(line(x)).mean((2, 3))), f=conv(3, 8), head=nn.Linear(8, 2)).eval()
    x = torch.randn(5, 3, 8, 8)
    before, state = net(x), torch.get_rng_state()
    plan = drifa_attn.plan(net, example_input=x)
    assert [site.name for site in plan.sites] == ["f"]
    assert torch.equal(torch.get_rng_state(), state)
    drifa_attn.wrap(net, example_input=x)
    assert torch.equal(net(x), before)


def test_a_real_run_says_why_and_what_it_took():
    net = Net(lambda net, x: net.f(LINES["item"](x)), f=conv(3, 8))
    (note,) = [note for note in drifa_attn.plan(net, "f", example_input=torch.randn(2, 3, 8, 8)).notes if "CPU" in note]
    assert "MiB ran on the CPU" in note
    assert "the meta device cannot run it (RuntimeError" in note


def test_a_real_run_takes_two_samples_and_changes_nothing():
    seen = []

    def run(net, x):
        seen.append(0 if x.is_meta else len(x))
        return net.norm(net.f(x * (1 + 0 * x.sum().item())))

    net = Net(run, f=conv(3, 8), norm=nn.BatchNorm2d(8))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = survey(net, torch.randn(64, 3, 8, 8))
    assert found.is_real
    assert max(seen) == 3  # two, and one more in the second trace
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training


def test_a_network_without_memory_runs_nowhere_else():
    with torch.device("meta"):
        net = Net(lambda net, x: net.f(x * x.mean().item()), f=conv(3, 8))
    with pytest.raises(
        ValueError, match=r"Net could not be traced with inputs .* on the meta device \(RuntimeError.*\): check"
    ):
        survey(net, torch.empty(2, 3, 8, 8))


def test_both_errors_are_told():
    net = Net(lambda net, x: net.f(x.reshape(-1)), f=conv(3, 8))
    with pytest.raises(ValueError, match=r"on the meta device \(.*\) or on the CPU \(.*\): check example_input="):
        survey(net, torch.randn(2, 3, 8, 8))


def test_half_precision_runs_as_float():
    net = Net(lambda net, x: net.f(x if x.isfinite().all() else x), f=conv(3, 8)).half()
    assert survey(net, torch.randn(2, 3, 8, 8).half()).found["f"].sites


# Hooks that are plain functions ------------------------------------------------------------------------------------------

KEPT: dict[str, Tensor] = {}


def extractor(where):
    """A network that reads its features by a hook."""
    kept = where if where is not None else {}

    def hook(module, args, output):
        kept["f"] = output

    def run(net, x):
        net.f(x)
        return net.head(net.kept["f"].mean((2, 3)))

    net = Net(run, f=conv(3, 8), head=nn.Linear(8, 2))
    net.kept = kept
    net.f.register_forward_hook(hook)
    return net.eval()


def test_features_read_by_a_hook_are_found():
    net, x = extractor(None), torch.randn(2, 3, 8, 8)
    before = net(x)
    kept = net.kept["f"]
    drifa_attn.wrap(net, example_input=x)
    assert net.kept["f"] is kept  # the copy has a store of its own
    assert list(drifa_attn.gates(net, x)) == ["f"]
    assert torch.equal(net(x), before)
    nn.init.constant_(net.f.drifa_attn.alpha, 3)
    assert not torch.equal(net(x), before)  # what the hook keeps is what attention made


def hook_of_defaults(module, args, output, store=KEPT):
    store["f"] = output


def test_what_a_hook_writes_elsewhere_stays_the_users():
    """It runs on the copy where nothing is found without it, and then on copies of what it writes to."""
    net = Net(lambda net, x: net.f(x).mean().reshape(1, 1).expand(len(x), 2), f=conv(3, 8))
    net.f.register_forward_hook(hook_of_defaults)
    KEPT.clear()
    drifa_attn.plan(net, example_input=torch.randn(2, 3, 8, 8))
    assert not KEPT


def test_hooks_that_nothing_needs_do_not_run():
    seen = []
    net = Net(lambda net, x: net.f(x), f=conv(3, 8))
    net.f.register_forward_hook(lambda module, args, output: seen.append(output))
    drifa_attn.plan(net, ["f"], example_input=torch.randn(2, 3, 8, 8))
    assert seen == []


def test_a_network_that_cannot_be_copied_is_told_once():
    net = Net(lambda net, x: net.f(x), f=conv(3, 8))
    net.lock = threading.Lock()
    with pytest.raises(ValueError, match="keeps 'lock', a lock, which cannot be copied"):
        survey(net, torch.randn(2, 3, 8, 8))


# Outputs and inputs of other kinds ---------------------------------------------------------------------------------------


@dataclass
class Output:
    features: Tensor
    logits: Tensor


@dataclass
class Input:
    image: Tensor
    age: Tensor


def test_dataclasses_go_in_and_come_out():
    def run(net, given):
        y = net.stem(Output(given.image, given.age)).features
        return Output(y, net.head(y.mean((2, 3)) + given.age))

    stem = Net(lambda net, given: Output(net.f(given.features), given.logits), f=conv(3, 8))
    net = Net(run, stem=stem, head=nn.Linear(8, 2)).eval()
    given = Input(torch.randn(2, 3, 8, 8), torch.randn(2, 1))
    before = net(given)
    drifa_attn.wrap(net, ["stem"], example_input=(given,))
    assert list(drifa_attn.gates(net, given)) == ["stem[features]"]
    assert torch.equal(net(given).logits, before.logits)
    nn.init.constant_(next(iter(drifa_attn.attention_parameters(net))).data, 3)
    for parameter in drifa_attn.attention_parameters(net):
        nn.init.constant_(parameter, 0.3)
    assert not torch.equal(net(given).logits, before.logits)


class Detector(nn.Module):
    """Takes a list of images of any size, and needs the values of one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, padding=1)

    def forward(self, images):
        largest = int(max(float(image.shape[-1]) + 0 * image.max().item() for image in images))
        batch = torch.stack([F.pad(image, (0, largest - image.shape[-1])) for image in images])
        return [{"scores": row} for row in self.second(self.first(batch).relu()).relu().mean((2, 3))]


def test_a_list_of_images_has_a_sample_an_entry():
    images = [torch.rand(3, 16, 16), torch.rand(3, 16, 12)]
    plan = drifa_attn.plan(Detector(), example_input=(images,))
    assert [site.name for site in plan.sites] == ["first", "second"]
    net = Detector()
    expected = [row["scores"] for row in net(images)]
    drifa_attn.wrap(net, example_input=(images,))
    assert all(torch.equal(row["scores"], e) for row, e in zip(net(images), expected, strict=True))


def test_a_module_that_forgets_in_a_copy_carries_nothing():
    """The layers of einops are built anew from their pattern."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU(), Rearrange("b c h w -> b c w h")),
        nn.Conv2d(8, 4, 3, 2, padding=1),
        nn.Flatten(),
        nn.LazyLinear(2),
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    net(x)
    drifa_attn.wrap(net, at=["0", "1"], example_input=x)
    for parameter in drifa_attn.attention_parameters(net):
        nn.init.normal_(parameter)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    assert len(drifa_attn.gates(twin, x)) == 2
    with pytest.raises(ValueError, match="a copy of the module would forget"):
        drifa_attn.wrap(copy.deepcopy(drifa_attn.unwrap(net)), at=["0.2"], example_input=x)
