import pytest

pytest.importorskip("triton")
from benchmarks import kernels  # noqa: E402  (compiles with triton, which may be missing)

FAST = "mfa 64 @ 784 nhwc bfloat16"


def assert_fits(code):
    assert isinstance(code, kernels.Code), code
    launch = code.launch
    assert code.shared <= kernels.SHARED_LIMIT[launch.capability], launch
    if launch.kernel in kernels.FORWARD:
        assert (code.spills, code.stack) == (0, 0), launch
    if launch.kernel in ("chain_kernel", "layer_kernel", "back_kernel", "pools_kernel"):
        assert code.tensor_cores != "none", launch


@pytest.mark.parametrize("capability", [80, 90])
def test_chain_compiles_without_spills_on_tensor_cores(capability):
    chosen = [launch for launch in kernels.launches([capability], FAST) if launch.kernel == "chain_kernel"]
    assert len(chosen) == 1
    assert_fits(kernels.attempt(chosen[0]))


@pytest.mark.slow
def test_every_launch_fits_the_chip():
    for launch in kernels.launches(kernels.CAPABILITIES):
        assert_fits(kernels.attempt(launch))
