"""The CUDA kernels without a GPU, run whole by g++: the same bits as the C++ kernels. tests/vq/test_simt.py compiles them."""

import pytest
import torch

import mmgen_kernels as mk

_probe = pytest.importorskip("mmgen_kernels._probe", reason="built without MMGEN_KERNELS_PROBE=1")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of the enumeration Float
KEYS = torch.tensor([[0, 0], [7, 3], [-1, -2], [2**62, -(2**63)]])
NOTHING = torch.zeros(0, dtype=torch.int64)


def by_fibers(kind, dtype, keys, size, data=NOTHING):
    element = DTYPES.index(dtype) if dtype in DTYPES else 0
    raw = _probe.philox_by_fibers(
        kind, element, keys.view(torch.uint64).numpy(), size, dtype.itemsize, data.view(torch.uint64).numpy()
    )
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(len(keys), size)


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).tolist()


@pytest.mark.parametrize("size", (1, 3, 4, 5, 1000, 1025))
def test_integers(size):
    """Whole blocks of four elements, parts of one, and more than a thread block."""
    assert torch.equal(by_fibers("integers", torch.int64, KEYS, size), mk.philox_integers((len(KEYS), size), KEYS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1, 7, 1000, 1025))
def test_uniform(size, dtype):
    assert bits(by_fibers("uniform", dtype, KEYS, size)) == bits(mk.philox_uniform((len(KEYS), size), KEYS, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1, 7, 1000, 1025))
def test_normal(size, dtype):
    assert bits(by_fibers("normal", dtype, KEYS, size)) == bits(mk.philox_normal((len(KEYS), size), KEYS, dtype=dtype))


def test_fold_in():
    data = torch.tensor([0, 5, -1, 2**40])
    assert torch.equal(by_fibers("fold", torch.int64, KEYS, 2, data), mk.fold_in(KEYS, data))
