"""Networks whose weights are shards (FSDP2) write the file that they would write whole."""

import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import drifa_attn
from tests.older import needs_later_torch


def built():
    """A wrapped network with moved gates, the same in every process."""
    torch.manual_seed(0)
    net = drifa_attn.wrap(timm.create_model("test_vit").eval())
    with torch.no_grad():
        for parameter in drifa_attn.attention_parameters(net):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return net


def save(rank, folder):
    """One of two processes: a step of training on shards, then the file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = built()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    net(torch.ones(2, 3, 160, 160)).square().sum().backward()
    assert any(hasattr(p, "full_tensor") for p in drifa_attn.attention_parameters(net))
    drifa_attn.save_attention(net, f"{folder}/shards{rank}.safetensors")
    dist.destroy_process_group()


@needs_later_torch("shards nothing on a CPU")
def test_one_process_writes_what_all_hold(tmp_path):
    torch.multiprocessing.spawn(save, (str(tmp_path),), nprocs=2)
    whole = built()
    drifa_attn.save_attention(whole, tmp_path / "whole.safetensors")
    found, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("shards0", "whole"))
    assert not (tmp_path / "shards1.safetensors").exists()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = drifa_attn.load_attention(timm.create_model("test_vit").eval(), tmp_path / "shards0.safetensors")
    assert {name.partition("drifa_attn")[1] for name in again.state_dict()} == {"", "drifa_attn"}
