"""The CUDA kernel of scheduler_step without a GPU: run whole by g++ on fibers, from the operator's arguments on, by the battery's
law and against the bits of the C++ kernel. tests/vq/test_simt.py compiles it."""

import battery_cases
import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.schedule.law import BF16, FP16, FP32, FP64
from mmgen_kernels.library import OPERATORS

_probe = pytest.importorskip("mmgen_kernels._probe", reason="built without MMGEN_KERNELS_PROBE=1")
STEP = OPERATORS["scheduler_step"]
# where the C++ kernel has FMAs too, and no bf16 whose subnormals are 0
SAME_OPERATIONS = {"avx2": (FP32, BF16, FP16), "avx512": (FP32, FP16)}.get(_probe.selected(), ())
TABLE = randn(7, 3, 4, seed=50)
KEY = torch.tensor([11, 2**35])


def by_fibers(*arguments):
    """In both orders of threads: a missing barrier would show."""
    found = torch.ops.mmgen_kernels_probe.scheduler_step(*STEP.filled(arguments))
    again = torch.ops.mmgen_kernels_probe.scheduler_step_backwards(*STEP.filled(arguments))
    assert all(map(same_bits, found, again))
    return found


def as_the_cpu_does(*arguments):
    found = by_fibers(*arguments)
    given = [a.dtype for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim() != 3]
    if FP64 not in given:
        for ours, theirs in zip(found, STEP.overloads["default"](*arguments), strict=True):
            assert ours.dtype not in SAME_OPERATIONS or same_bits(ours, theirs)
    return found


def cases():
    for case in battery.cases("schedule"):
        needs_a_whole_sample = "threshold" in case.name or "rescale" in case.name
        if case.operator == "scheduler_step" and not needs_a_whole_sample:
            for dtypes in case.dtypes:
                yield pytest.param(case, dtypes, id=f"{case.name}-{battery.dtype_name(dtypes)}")


@pytest.mark.unpoisoned
@pytest.mark.skipif(not STEP.has_cpp, reason="the C++ part is not built")
@pytest.mark.parametrize(("case", "dtypes"), list(cases()))
def test_case(monkeypatch, case, dtypes):
    monkeypatch.setitem(STEP.overloads, "cpp", as_the_cpu_does)
    battery_cases.check(case, dtypes, "cpp")


def step(inputs, at, dtypes, *, noise=None, key=None, clamp=None, table=TABLE):
    index, number = (at, 0) if isinstance(at, torch.Tensor) else (None, at)
    first, second, *more = (*inputs, *[None] * (5 - len(inputs)))
    dtype_0, dtype_1 = dtypes
    given = (first, table, number, dtype_0, second, dtype_1, *more, None, clamp, noise, key, index)
    return by_fibers(*given)


def test_samples_that_begin_anywhere():
    """Addresses that one load cannot take, sizes that are no multiple of one, and samples that begin within a block of a stream."""
    x, m = (randn(3, 37, seed=i).to(BF16) for i in range(2))
    for width, first in ((37, 0), (36, 1), (33, 0), (16, 3), (8, 8)):
        views = [t[:, first : first + width] for t in (x, m)]
        noise = mk.philox_normal((3, width), mk.fold_in(KEY, 4))
        expected = step([v.contiguous() for v in views], 4, (FP32, BF16), noise=noise)
        for found in (step(views, 4, (FP32, BF16), key=KEY), step(views, torch.tensor(4), (FP32, BF16), key=KEY)):
            assert all(map(same_bits, found, expected)), (width, first)


@pytest.mark.parametrize("clamp", (None, 0.4))
def test_a_row_on_the_device_is_the_host_s(clamp):
    """Also its zeros, whose terms may be NaN."""
    rows = TABLE.clone()
    rows[:, :, 1] = 0
    x = randn(2, 515, seed=1).float()
    for spoiled in (x, torch.full_like(x, torch.nan)):
        host = step((x, spoiled), 3, (FP32, FP32), key=KEY, clamp=clamp, table=rows)
        device = step((x, spoiled), torch.tensor(3), (FP32, FP32), key=KEY, clamp=clamp, table=rows)
        assert all(a.isfinite().all() and same_bits(a, b) for a, b in zip(host, device, strict=True))


def test_every_16_bit_number_is_stored_as_torch_does():
    """All of fp16 and bf16 in; fp32 numbers of every exponent out, with ties, overflow, infinities and NaN."""
    copied = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]], dtype=FP64)
    for dtype in (FP16, BF16):
        numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
        (wide, *_) = step((numbers,), 0, (FP32, None), table=copied)
        assert torch.equal(wide.nan_to_num(7.0), (numbers.float() + 0.0).nan_to_num(7.0))
        words = torch.arange(0, 2**32, 2**14 - 3).to(torch.uint32).view(FP32)
        values = torch.cat((words, torch.tensor([65504.0, 65519.9, 65520.0, -65520.0, 2**-25, 2**-24, 1.5 * 2**-24])))
        (stored, *_) = step((values,), 0, (dtype, None), table=copied)
        assert torch.equal(stored.isnan(), values.isnan())
        assert torch.equal(stored.nan_to_num(7.0), values.to(dtype).nan_to_num(7.0))


def test_what_needs_a_whole_sample_goes_to_triton(monkeypatch):
    pytest.importorskip("triton")
    from mmgen_kernels.schedule import cuda, triton_kernels

    monkeypatch.setattr(triton_kernels, "scheduler_step", lambda *arguments: arguments)
    x = torch.ones(2, 3)
    for uncond, rescale, threshold in ((None, 0.0, 0.9), (x, 0.5, None)):
        given = (x, TABLE, 0, FP32, None, FP32, *[None] * 8, uncond, 0, 1.0, rescale, None, threshold, 1.0)
        assert all(got is was for got, was in zip(cuda.scheduler_step(*given), given, strict=True))
