"""The launch configurations of the Triton kernels, compiled ahead of time in processes of their own: here triton interprets."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests._triton import skip_without_triton

skip_without_triton()
from benchmarks import kernels  # noqa: E402  (compiles with triton, which may be missing)

FAST = "mfa 64 @ 784 nhwc bfloat16"


@pytest.fixture(scope="module")
def compiler():
    """A process in which triton compiles."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def assert_fits(code):
    assert isinstance(code, kernels.Code), code
    launch = code.launch
    assert code.shared <= kernels.SHARED_LIMIT[launch.capability], launch
    if launch.kernel in kernels.FORWARD:
        assert code.stack <= (0 if launch.capability == 90 else 16), launch
    if launch.kernel in ("chain_kernel", "layer_kernel", "back_kernel", "pools_kernel") and "exact" not in launch.label:
        assert code.tensor_cores != "none", launch


@pytest.mark.parametrize("capability", [80, 90])
def test_chain_compiles_without_spills_on_tensor_cores(capability, compiler):
    launches = compiler.submit(kernels.launches, [capability], FAST).result()
    chosen = [launch for launch in launches if launch.kernel == "chain_kernel"]
    assert len(chosen) == 1
    assert_fits(compiler.submit(kernels.attempt, chosen[0]).result())


@pytest.mark.slow
def test_every_launch_fits_the_chip(compiler):
    for code in compiler.map(kernels.attempt, compiler.submit(kernels.launches, kernels.CAPABILITIES).result()):
        assert_fits(code)
