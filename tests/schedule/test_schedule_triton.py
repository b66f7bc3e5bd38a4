"""The Triton kernels of the family by the interpreter, without a GPU: battery, launches, noise, bits, what may be looked at.

Each test runs in a process in which TRITON_INTERPRET is set.
"""

import importlib.util
import inspect
import itertools
import re

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.schedule.law import BF16, FP32, FP64
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.schedule import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
# beside the quick ones: what has a branch of its own in the launchers or kernels
USUAL = (
    "1_in_1_out", "5_in_3_out", "size_2x1027", "size_0x4", "rank_1", "key_per_sample", "clamp_key", "variance_tensor",
    "variance_key", "threshold_0.5", "threshold_1.0", "threshold_variance_key", "guidance_clamp_key", "guidance_threshold",
    "step_out_of_range", "nothing", "only_noise", "channels_last", "half_of_channels_key", "half_of_batch_key", "expanded", "nan",
    "mixed_noise",
    "rescale_whole", "halves", "no_samples", "linear_flow", "gvp_v", "edm_sample", "vp_flow", "vp_epsilon", "index_v",
    "epsilon_key", "fp32_time", "int32_index",
)  # fmt: skip
TABLE = randn(7, 3, 4, seed=50)
LEARNED = torch.cat((TABLE, torch.tensor([-4.0, -1, 0, 0]).expand(7, 1, 4).double()), 1)
KEY = torch.tensor([11, 2**35])
LOSSES = mk.hybrid_table(torch.linspace(1e-3, 0.3, 20))


def cases():
    for case in battery.cases("schedule"):
        for dtypes in case.dtypes if not case.operator.endswith("_backward") else case.dtypes[:1]:
            marks = () if case.quick or (case.name in USUAL and dtypes == case.dtypes[0]) else pytest.mark.long
            name = f"{case.operator}-{case.name}-{battery.dtype_name(dtypes)}"
            yield pytest.param(case.operator, case.name, dtypes, id=name, marks=marks)


def judge(operator, name, dtypes):
    (case,) = (c for c in battery.cases("schedule") if c.operator == operator and c.name == name)
    prepared = case.prepare(CPU, dtypes)
    with mk.use_backend("triton"):
        outcome = prepared()
    return outcome.failures, outcome.repeatable


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("operator", "name", "dtypes"), list(cases()))
def test_case(process, operator, name, dtypes):
    failures, repeatable = process.submit(judge, operator, name, dtypes).result()
    assert not failures, "\n".join(failures)
    assert repeatable


# -- launches ---------------------------------------------------------------------------------------------------------

MODULE = "mmgen_kernels.schedule.triton_kernels"
KERNELS = {
    "take_step": f"{MODULE}.scheduler_step",
    "add_up": f"{MODULE}.scheduler_step",
    "draw_codes": f"{MODULE}.discrete",
    "lose_places": f"{MODULE}.discrete_loss",
    "noise_samples": f"{MODULE}.add_noise",
    **dict.fromkeys(("lose", "lose_samples", "average", "slope_of_loss"), f"{MODULE}.diffusion_loss"),
    **dict.fromkeys(("lose_terms", "lose_hybrid", "slope_of_terms"), f"{MODULE}.hybrid_loss"),
}


class Counted:
    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def instead_of_kernels(patch, make):
    import sys

    from mmgen_kernels.schedule import triton_kernels  # noqa: F401

    for name, module in KERNELS.items():  # by the modules' names, which two functions bear too
        patch.setattr(sys.modules[module], name, make(name, getattr(sys.modules[module], name)))


def test_launches(process):
    process.submit(count_launches).result()


def count_launches():
    launched = []
    x, m, u = (randn(3, 4, 5, seed=i).float() for i in range(3))
    at, leaf, times = torch.tensor(3), x.clone().requires_grad_(), torch.arange(3)
    codes, rows = torch.full((3, 4), 5), mk.transition_table(torch.linspace(0.9, 0.1, 7), 5)

    def step(*inputs, coefficients=TABLE, step=2, **named):
        return lambda: mk.scheduler_step(inputs, coefficients, step, **named)

    calls = [
        (step(x, m), ["take_step"]),
        (step(x, m, noise=KEY, clamp=1.0), ["take_step"]),
        (step(x, m, step=at, noise=KEY), ["take_step"]),
        (step(x, m, coefficients=LEARNED, variance=m, noise=KEY.expand(3, 2), uncond=u, guidance_scale=3.0), ["take_step"]),
        (step(x, m, uncond=u, guidance_scale=3.0, guidance_rescale=0.5), ["add_up", "take_step"]),
        (step(x, m, threshold=(0.9, 2.0)), ["take_step", "take_step"]),
        (step(x[:0], m[:0]), []),
        (lambda: mk.guidance(x, m, 2.0), ["take_step"]),
        (lambda: mk.guidance(x, m, 2.0, rescale=0.7), ["add_up", "take_step"]),
        (lambda: mk.add_noise(x, KEY, torch.rand(3), path="gvp", target="v"), ["noise_samples"]),
        (lambda: mk.add_noise(x, m, torch.rand(3), path="linear"), ["noise_samples"]),
        (lambda: mk.diffusion_loss(x, m, weight=torch.rand(3)), ["lose", "lose_samples", "average"]),
        (lambda: mk.diffusion_loss(x, m, reduction="none"), ["lose", "lose_samples"]),
        (lambda: mk.diffusion_loss(leaf, m).backward(), ["lose", "lose_samples", "average", "slope_of_loss"]),
        (lambda: mk.hybrid_loss(x, m[:, :2], u[:, :2], times, table=LOSSES), ["lose_terms", "lose_hybrid"]),
        (lambda: mk.vq_diffusion_step(x, codes, rows, 1, noise=KEY), ["draw_codes"]),
        (lambda: mk.unmask_step(x, codes, rows[:, :2], at, mask_id=5, noise=KEY), ["draw_codes"]),
        (lambda: mk.unmask_step(x, codes, rows[:, :2], 0, mask_id=5, noise=(x.exp(), x[..., 0].exp())), ["draw_codes"]),
        (lambda: mk.vq_diffusion_loss(leaf, codes, codes, rows, 1).loss.backward(), ["lose_places", "lose_places"]),
        (lambda: mk.vq_diffusion_step(x[:, :0], codes[:, :0], rows, 1, noise=KEY), []),
        (
            lambda: mk.hybrid_loss(leaf, m[:, :2], u[:, :2], times, table=LOSSES).loss.sum().backward(),
            ["lose_terms", "lose_hybrid", "slope_of_terms"],
        ),
    ]
    with pytest.MonkeyPatch.context() as patch, mk.use_backend("triton"):
        instead_of_kernels(patch, lambda name, kernel: Counted(name, kernel, launched))
        for call, expected in calls:
            launched.clear()
            call()
            assert launched == expected


def test_no_look_at_a_value(process):
    process.submit(looks_at_nothing).result()


def looks_at_nothing():
    """Fake tensors have none: a launcher that asked for one would fail. A table on the CPU beside a step that is an int is the
    exception, and the host knows it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), mk.use_backend("triton"):
        instead_of_kernels(patch, lambda name, kernel: Silent())
        x, table, keys = torch.empty(3, 4, 5), torch.empty(7, 3, 4, dtype=FP64), torch.empty(3, 2, dtype=torch.int64)
        for at, key in itertools.product((torch.empty((), dtype=torch.int64), torch.empty(3, dtype=torch.int64)), (None, keys)):
            outputs = mk.scheduler_step((x, x), table, at, noise=key, uncond=x, guidance_rescale=0.4, dtypes=(BF16, FP32))
            assert [(o.shape, o.dtype) for o in outputs] == [(x.shape, BF16), (x.shape, FP32)]
        with torch.no_grad():
            assert mk.scheduler_step((x, x), table, at, threshold=(0.5, 2.0))[0].shape == x.shape
        assert mk.add_noise(x, keys, x[:, 0, 0], path="gvp", target="flow")[1].shape == x.shape
        codes, of_step = torch.empty(3, 4, dtype=torch.int64), torch.empty((), dtype=torch.int64)
        drawn = mk.vq_diffusion_step(x, codes, torch.empty(7, 9, dtype=FP64), of_step, noise=keys, return_log_prob=True)
        assert [(d.shape, d.dtype) for d in drawn] == [(codes.shape, torch.int64), (codes.shape, FP32)]
        drawn = mk.unmask_step(x, codes, torch.empty(7, 2, dtype=FP64), of_step, mask_id=5, noise=keys)
        assert [(d.shape, d.dtype) for d in drawn] == [(codes.shape, torch.int64)] * 2
        leaf, table = torch.empty(3, 4, 5, requires_grad=True), torch.empty(20, 7, dtype=FP64)
        loss = mk.hybrid_loss(leaf, x[:, :2], x[:, :2], keys[:, 0], table=table, clamp=1.0).loss.sum()
        mask = torch.empty(3, 1, 5, dtype=torch.bool)
        loss = loss + mk.diffusion_loss(leaf, x, weight=x[:, 0, 0], delta=x[:, 0, 0], kind="huber", mask=mask)
        assert torch.autograd.grad(loss, leaf)[0].shape == x.shape


def test_nothing_is_specialised_on_sizes():
    import sys

    from mmgen_kernels.schedule import triton_kernels  # noqa: F401

    for name, module in KERNELS.items():
        kernel = getattr(sys.modules[module], name)
        counts = r"size|pieces|samples|parts|length|step|steps|rank|entries|\w+_b|positions|classes|known|mask_id|(by|e)_\w+"
        counted = {p.name for p in kernel.params if re.fullmatch(counts, p.name)}
        assert counted and {p.name for p in kernel.params if p.do_not_specialize} == counted, name


def test_the_reference_takes_what_the_launchers_take():
    """Signatures: the schema's order is the reference's."""
    from mmgen_kernels.schedule import triton_kernels

    for name in triton_kernels.__all__:
        ours, plain = (inspect.signature(getattr(m, name)).parameters for m in (triton_kernels, reference))
        assert list(ours) == list(plain), name


# -- noise and bits ---------------------------------------------------------------------------------------------------


def test_a_key_stands_for_the_normals_of_the_step(process):
    process.submit(key_is_normals).result()


def key_is_normals():
    """Bit for bit those of philox's Triton kernel, whatever the layout, the step's place and the block in which a sample begins."""
    x, m = (randn(3, 4, 35, seed=i).float() for i in range(2))
    sliced = torch.cat((x, x), 1)[:, :4]
    table, at = TABLE, torch.tensor([4, 0, 9])
    with mk.use_backend("triton"):
        for key, shape in itertools.product((KEY, torch.arange(6).view(3, 2)), ((3, 4, 35), (3, 1, 33))):
            a, b, c = (t[:, : shape[1], : shape[2]] for t in (x, m, sliced))
            for step in (4, at[0]):
                noise = mk.philox_normal(shape, mk.fold_in(key, 4))
                expected = mk.scheduler_step((a.contiguous(), b), table, step, noise=noise)
                for first in (a.contiguous(), c if shape[1] == 4 else a):
                    found = mk.scheduler_step((first, b), table, step, noise=key)
                    assert all(map(same_bits, found, expected)), (key, shape, step)
            t = torch.tensor([0.1, 0.5, 1.0])
            drawn = mk.add_noise(a, mk.philox_normal(shape, key), t, path="linear", target="flow")
            assert all(map(same_bits, mk.add_noise(a, key, t, path="linear", target="flow"), drawn))
        keys = torch.arange(6).view(3, 2)
        noise = mk.philox_normal(x.shape, mk.fold_in(keys, at.clamp(0, 6)))
        expected = mk.scheduler_step((x, m), table, at, noise=noise)
        assert all(map(same_bits, mk.scheduler_step((x, m), table, at, noise=keys), expected))


def test_a_row_on_the_device_is_the_host_s(process):
    process.submit(rows_agree).result()


def rows_agree():
    """Also its zeros, whose terms may be NaN; and with a limit, when the derived value is made."""
    rows = TABLE.clone()
    rows[:, :, 1] = 0
    x, m = (randn(2, 515, seed=i).float() for i in range(2))
    with mk.use_backend("triton"):
        for clamp, spoiled in itertools.product((None, 0.4), (m, torch.full_like(m, torch.nan))):
            host = mk.scheduler_step((x, spoiled), rows, 3, noise=KEY, clamp=clamp)
            device = mk.scheduler_step((x, spoiled), rows, torch.tensor(3), noise=KEY, clamp=clamp)
            for a, b in zip(host, device, strict=True):
                assert a.isfinite().all() and same_bits(a, b)


def test_samples_are_read_in_place(process):
    process.submit(reads_in_place).result()


def reads_in_place():
    from mmgen_kernels.schedule.triton_kernels.pieces import Samples

    x = randn(4, 6, 8, seed=1).float()
    for view, by_sample, expected in (
        (x, False, (1, 192, 0)), (x, True, (4, 48, 48)), (x.chunk(2)[1], False, (1, 96, 0)), (x[:, 2:4], False, (4, 16, 48)),
        (x[:1, 2:4], True, (1, 16, 0)), (x[:, :1].expand(4, 1, 8), False, (4, 8, 48)), (x[0, 0].expand(4, 8), True, (4, 8, 0)),
    ):  # fmt: skip
        samples = Samples(view, (view, None), by_sample)
        assert samples.tensors[0] is view
        assert (samples.count, samples.size, samples.strides[0]) == expected
        assert samples.aligned
    assert Samples(x, (x.mT,), False).tensors[0].is_contiguous() and not Samples(x[..., 1:], (x,), True).aligned


def test_numbers_reach_the_kernel_whole():
    from mmgen_kernels.schedule.triton_kernels.pieces import numbers_of

    for value in (1 / 3, -(2**0.5), 1e-20, 123456789.123456789, 0.0, float("inf"), 5e300):
        parts = numbers_of((value,), 3)
        assert all(torch.tensor(p, dtype=FP32).double().item() == p for p in parts)
        assert sum(parts) == (value if abs(value) < 1e38 else float("inf"))


def test_opcheck(process):
    process.submit(check_operators).result()


def check_operators():
    x, m = (randn(3, 4, 5, seed=i).float().requires_grad_() for i in range(2))
    of = torch.ops.mmgen_kernels
    step = (x, TABLE, 2, FP32, m, BF16, None, None, None, None, 0.7, None, KEY)
    torch.library.opcheck(of.scheduler_step.triton, step)
    torch.library.opcheck(of.guidance.triton, (x, m, 7.5, 0.7))
    torch.library.opcheck(of.add_noise.triton, (x, None, KEY, torch.rand(3), None, "linear", "flow"))
    torch.library.opcheck(of.diffusion_loss.triton, (x, m, torch.rand(3), None, None, "huber", 0.4, True))
    half = m.detach()[:, :2]
    torch.library.opcheck(of.hybrid_loss.triton, (x, half, half.clone(), torch.arange(3), LOSSES, 1.0, True, None))
    assert set(OPERATORS["scheduler_step"].launchers) >= {"triton"}
