"""Helpers of several tests about fused networks."""

import threading
from functools import partial

import torch
from torch import nn

from drifa_attn import fuse
from drifa_attn.trees import at_path, replace_tensor
from tests._wrapping import awaken_
from tests.cases import perturb_
from tests.networks import built

TASKS = {"lesion": 7, "cell": 5}


def record():
    """A clinical record's branch: vectors."""
    return nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Linear(33, 17), nn.ReLU())


def given(names):
    """Backbones by modality and an input for each."""
    pairs = [built(name) if name != "record" else (record().eval(), torch.randn(2, 9)) for name in names]
    return {name: pair[0] for name, pair in zip(names, pairs, strict=True)}, {
        name: pair[1] for name, pair in zip(names, pairs, strict=True)
    }


def fused(names=("resnet", "vit", "record"), **options):
    """A fused network in eval mode in which every parameter does something, and its inputs."""
    torch.manual_seed(0)
    backbones, inputs = given(names)
    net = fuse(backbones, TASKS, example_inputs=inputs, **options).eval()
    for refiner in net.refiners:
        perturb_(refiner)
    awaken_(net)
    return net, inputs


def in_threads(net, inputs, present=None):
    """The same by other means: every backbone runs as it is in a thread of its own; its hooks wait for the others."""
    barrier, waiting, results, errors = threading.Barrier(len(inputs), timeout=60), {}, {}, []

    def wait(name, k, site, _, args, output):
        waiting[name] = output
        if barrier.wait() == 0:
            sites = net.stages[k]
            xs = [at_path(waiting[n], s.path) for n, s in sites.items()]
            waiting["gated"] = dict(zip(sites, net.refiners[k](xs, present), strict=True))
        barrier.wait()
        y = waiting["gated"][name]
        barrier.wait()
        return replace_tensor(output, site.path, lambda _: y)

    def work(name):
        try:
            with torch.no_grad():
                results[name] = net.branches[name](inputs[name])
        except Exception as error:  # noqa: BLE001 - told by the test
            errors.append(error)
            barrier.abort()

    handles = [
        net.branches[name].get_submodule(site.module).register_forward_hook(partial(wait, name, k, site))
        for k, sites in enumerate(net.stages)
        for name, site in sites.items()
    ]
    threads = [threading.Thread(target=work, args=(name,)) for name in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert not errors, errors
    return results
