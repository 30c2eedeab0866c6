"""A GPU that is not there, whose tensors have no values."""

from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensorMode

from drifa_attn.ops import choose


@contextmanager
def fake_gpu(monkeypatch):
    """A GPU of capability 9.0 with Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choose, "triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # There are no values to draw, and torch 2.6 needs a driver to copy them into the tensor.
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *args, **options: self)
    with FakeTensorMode():
        yield
