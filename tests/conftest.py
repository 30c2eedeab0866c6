import importlib.util
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of NumPy, for the interpreter of triton; read when NumPy is imported

import pytest
import torch
from hypothesis import settings

from drifa_attn.ops.choose import triton_missing
from tests.cases import CASES

# Samples are drawn from their own seed in the test, so a failure needs no example database to be repeated.
settings.register_profile("dev", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # tiny tensors: more threads only wait for each other


def pytest_addoption(parser):
    if importlib.util.find_spec("xdist") is None:  # its options are accepted, and the tests run in one process
        group = parser.getgroup("xdist")
        group._addoption("-n", dest="numprocesses", help="no effect: pytest-xdist is not installed")
        group.addoption("--dist", help="no effect: pytest-xdist is not installed")
    parser.addoption("--device", default="cpu", help="device of the layer tests: cpu (default), cuda, cuda:1, ...")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """A worker for every processor that this process may use, those of one core too."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pytest_configure(config):
    """Import triton for its interpreter, unless tests that need a GPU may run: it decides at its first import."""
    to_compile = torch.cuda.is_available() and "not cuda" not in config.option.markexpr
    if triton_missing() is None and not to_compile:
        with pytest.MonkeyPatch.context() as patch:  # not for longer: other tests on a CPU would run the kernels
            patch.setenv("TRITON_INTERPRET", "1")
            import drifa_attn.ops.triton  # noqa: F401
    from tests import older  # not above: timm imports triton

    older.register()


@pytest.fixture(scope="module")
def interpreter():
    """Within these tests the library runs its kernels on the CPU, in the interpreter of triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param
