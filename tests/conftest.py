import os

import pytest
import torch
from hypothesis import settings

from tests.cases import CASES

# Samples are drawn from their own seed in the test, so a failure needs no example database to be repeated.
settings.register_profile("dev", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the layer tests: cpu (default), cuda, cuda:1, ...")


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
