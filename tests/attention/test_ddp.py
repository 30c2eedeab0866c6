"""Data-parallel training of a MIFA whose processes lack different modalities."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from drifa_attn import MIFA
from tests._compare import assert_same_math
from tests.cases import loss

PRESENT = torch.tensor([[[1, 0, 0], [1, 0, 0]], [[0, 0, 0], [0, 1, 1]]]).bool()  # process, sample, modality


def built():
    torch.manual_seed(0)
    return MIFA((8, 3, 8), init="identity", dtype=torch.float64)


def shard(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [torch.randn(2, c, n, generator=generator, dtype=torch.float64) for c, n in ((8, 5), (3, 4), (8, 3))]


def train(rank, folder):
    """Two steps in one of two processes; the gradients of each and the last parameters go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mifa = built()
    ddp = DistributedDataParallel(mifa, find_unused_parameters=False)
    sgd, history = torch.optim.SGD(mifa.parameters(), lr=0.1), []
    for step in range(2):
        sgd.zero_grad()
        loss(ddp(shard(rank, step), PRESENT[rank])).backward()
        history.append([p.grad.clone() for p in mifa.parameters()])
        sgd.step()
    torch.save((history, list(mifa.parameters())), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_processes_that_lack_modalities_stay_in_step(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    (history, parameters), (other_history, other_parameters) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for a, b in zip([*sum(history, []), *parameters], [*sum(other_history, []), *other_parameters], strict=True):
        assert_same_math(a, b)
    mifa = built()
    sgd = torch.optim.SGD(mifa.parameters(), lr=0.1)
    for step, grads in enumerate(history):
        sgd.zero_grad()
        (sum(loss(mifa(shard(rank, step), PRESENT[rank])) for rank in (0, 1)) / 2).backward()
        for p, grad in zip(mifa.parameters(), grads, strict=True):
            assert_same_math(grad, p.grad)
        sgd.step()
    assert any(p.grad.abs().max() > 0 for p in mifa.mlifa.parameters())
