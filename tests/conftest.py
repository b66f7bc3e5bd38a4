import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "vq"))

# Allocations of the kernels' tests are poisoned; training runs and benchmarks have their own folders and are left alone.
UNPOISONED = ("mmgen", "benchmarks")


def pytest_configure(config):
    config.addinivalue_line("markers", "unpoisoned: torch's own algorithms as users have them, uninitialised memory as it comes")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module")
def process():
    """In which TRITON_INTERPRET is set, so that Triton kernels run on CPU tensors."""
    from triton_interpreter import interpreting_pool

    with interpreting_pool() as pool:
        yield pool


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_allocations(request):
    """Every new tensor starts as NaN (integers: the largest), in Python and C++ alike: aten's own empty fills it. An operator
    that forgets an element cannot pass by finding a lucky zero. test_library.py sees to it that this stays so.

    warn_only: the point is the filling, not to forbid torch operators without a deterministic version.
    """
    folder = request.path.relative_to(request.config.rootpath / "tests").parts[0]
    if folder in UNPOISONED or request.node.get_closest_marker("unpoisoned"):
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Graphs compiled by one test neither serve nor hinder another."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
