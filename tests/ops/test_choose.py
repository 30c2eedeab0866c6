"""What `auto` chooses on a GPU, asked with fake CUDA tensors: never the chunked operators, which launch hundreds of kernels."""

import pytest
import torch

from drifa_attn import MFA, MIFA, ops
from drifa_attn.ops import choose
from tests._gpu import fake_gpu


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch):
        yield monkeypatch


def explained(shape, dtype, **options):
    """What runs for features of this shape on the GPU."""
    return ops.explain(MFA(shape[1], device="cuda", dtype=dtype, **options), torch.empty(shape, device="cuda", dtype=dtype))


REFUSED = {  # what the kernels refuse: shape, dtype, options, and a word of the reason
    "float32 without TF32": ((8, 64, 56, 56), torch.float32, {}, "without TF32"),
    "float64": ((8, 64, 56, 56), torch.float64, {}, "float64"),
    "too wide": ((8, 4100, 7, 7), torch.bfloat16, {}, "4096"),
    "empty": ((0, 64, 7, 7), torch.bfloat16, {}, "empty"),
    "one position": ((8, 64, 1, 1), torch.bfloat16, {}, "one position"),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("shape", "dtype", "options", "word"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_refuse_takes_the_equations(gpu, shape, dtype, options, word, trained):
    with torch.set_grad_enabled(trained):
        choice = explained(shape, dtype, **options)
    assert (choice.path, word in choice.reason) == ("reference", True), choice


@pytest.mark.parametrize(("change", "word"), [("capability", "below 8.0"), ("triton", "not installed")])
def test_a_machine_without_the_kernels_takes_the_equations(gpu, change, word):
    if change == "capability":
        gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    else:
        gpu.setattr(choose, "triton_missing", lambda: "triton is not installed")
    choice = explained((8, 64, 56, 56), torch.bfloat16)
    assert (choice.path, word in choice.reason) == ("reference", True), choice


@pytest.mark.parametrize("width", [1, 8, 12, 15, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_width_takes_the_kernels(gpu, width, dtype):
    assert explained((8, width, 14, 14), dtype).path == "triton"


@pytest.mark.parametrize(("channels", "path"), [(64, "triton"), (256, "triton"), (512, "triton"), (1024, "reference")])
def test_exact_float32_takes_the_kernels_where_it_is_narrow(gpu, channels, path):
    """The sites of `wrap`, whose widths are 8 to 64; with TF32 all of them."""
    assert explained((8, channels, 14, 14), torch.float32, reduction=16).path == path
    gpu.setattr(choose, "tf32_allowed", lambda: True)
    assert explained((8, channels, 14, 14), torch.float32, reduction=16).path == "triton"


def test_only_who_asks_for_memory_gets_the_chunked_operators(gpu):
    with ops.use("fused"):
        choice = explained((8, 64, 56, 56), torch.float32)
    assert choice.path == "chunked"
    assert "without TF32" in choice.reason


def test_one_modality_that_the_kernels_refuse_is_enough(gpu):
    mifa = MIFA([64, 4100], dim=64, device="cuda", dtype=torch.bfloat16)
    xs = [torch.empty(2, c, 14, 14, device="cuda", dtype=torch.bfloat16) for c in mifa.channels]
    assert "4096" in ops.explain(mifa, xs).reason
    assert ops.explain(mifa, xs).path == "reference"
    vector = [torch.empty(2, 64, *rest, device="cuda", dtype=torch.bfloat16) for rest in ((14, 14), ())]
    assert ops.explain(MIFA(64, device="cuda", dtype=torch.bfloat16), vector).path == "triton"


def test_compiled_code_asks_the_same(monkeypatch):
    """The reasons are read while the compiler traces, without a graph break."""
    monkeypatch.setattr(choose, "triton_missing", lambda: None)
    monkeypatch.setattr(choose, "interpreting", lambda: True)

    def asked(x):
        return choose.unsupported(x, 64), choose.unsupported(x, 5000), choose.unsupported(x.double(), 64), x + 1

    torch._dynamo.reset()
    *found, _ = torch.compile(asked, fullgraph=True, backend="eager")(torch.zeros(2, 64, 9))
    assert found[0] is None
    assert "4096" in found[1]
    assert "float64" in found[2]
