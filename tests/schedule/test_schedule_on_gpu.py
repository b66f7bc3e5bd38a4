"""What only a GPU can tell: miscompiled code, what a graph captures, who waits for the device."""

import pytest
import torch
from on_device import waits_are_errors

import mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.schedule.law import BF16, FP32, FP64
from mmgen_kernels.library import OPERATORS

pytestmark = pytest.mark.gpu
KERNELS = [name for name in ("cuda", "triton") if not backends.reasons_against(OPERATORS["scheduler_step"], name, "cuda")]
STEPS = 20
KEY = torch.tensor([11, 2**35])


def table():
    """Of an ancestral sampler: the data, clipped, and the next sample, which stays near the unit normal."""
    rows = torch.zeros(STEPS, 3, 4, dtype=FP64)
    signal = torch.linspace(0.1, 0.99, STEPS + 1, dtype=FP64).sqrt()
    rows[:, 0, 0], rows[:, 0, 1] = 1 / signal[:-1], -(1 - signal[:-1] ** 2).sqrt() / signal[:-1]
    rows[:, 1, 2], rows[:, 1, 1] = signal[1:], 0.5 * (1 - signal[1:] ** 2).sqrt()
    rows[:, 1, 3] = (0.75 * (1 - signal[1:] ** 2)).sqrt()
    rows[:, 2, 2] = 1
    return rows


def model(x):
    return 0.9 * x.tanh()


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_loop_in_one_graph_is_the_eager_loop(implementation, dtype):
    """With the index of the step on the device, where the graph advances it; and with an int and a table on the CPU."""
    start, rows, key = randn(2, 4, 64, 65, seed=1).to(dtype).cuda(), table().cuda(), KEY.cuda()
    at, x = torch.zeros((), dtype=torch.int64, device="cuda"), start.clone()

    def loop():
        at.zero_()
        x.copy_(start)
        for _ in range(STEPS):
            following, _ = mk.scheduler_step((x, model(x)), rows, at, noise=key, clamp=1.0)
            x.copy_(following)
            at.add_(1)

    with mk.use_backend(implementation, "schedule"):
        loop()  # compiles
        with waits_are_errors():
            loop()
            eager = x.clone()
            by_the_host, host_rows = start, table()
            for i in range(STEPS):
                by_the_host, _ = mk.scheduler_step((by_the_host, model(by_the_host)), host_rows, i, noise=key, clamp=1.0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loop()
            x.zero_()
            graph.replay()
            graph.replay()
    assert eager.isfinite().all() and eager.std() > 0.1
    assert torch.equal(x, eager) and torch.equal(by_the_host, eager)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_key_is_philox_normals(implementation):
    """Bit for bit, also where samples begin within a block of the stream and where they are slices."""
    x = randn(3, 5, 33, seed=1).float().cuda()
    key, rows = KEY.cuda(), table()[:, :2]
    with mk.use_backend(implementation):
        for view in (x, x[:, 1:4], x[:, :1]):
            noise = mk.philox_normal(view.shape, mk.fold_in(key, 3))
            (expected,) = mk.scheduler_step((view.contiguous(), view), rows, 3, noise=noise)
            (found,) = mk.scheduler_step((view, view), rows, 3, noise=key)
            assert torch.equal(found, expected)


@pytest.mark.skipif(len(KERNELS) < 2, reason="needs both kernels")
def test_cuda_and_triton_have_the_same_bits():
    inputs = [randn(2, 4, 33, 64, seed=i).to(FP32 if i % 2 else BF16).cuda() for i in range(5)]
    rows = randn(STEPS, 4, 7, seed=9)
    options = {"noise": KEY.cuda(), "clamp": 0.7, "uncond": inputs[0], "guided": 2, "guidance_scale": 3.0}
    found = []
    for implementation in KERNELS:
        with mk.use_backend(implementation, "schedule"):
            found.append(mk.scheduler_step(inputs, rows, 2, **options))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_waits_for_the_device():
    x, m, u = (randn(2, 4, 32, 32, seed=i).to(BF16).cuda().requires_grad_() for i in range(3))
    rows, key, t = table(), KEY.cuda(), torch.rand(2, device="cuda")

    def calls():
        out, clean = mk.scheduler_step((x, m), rows, 3, noise=key, uncond=u, guidance_scale=3.0, guidance_rescale=0.5)
        with torch.no_grad():
            mk.scheduler_step((x, m), rows, 3, threshold=(0.9, 2.0))
        x_t, target = mk.add_noise(x, key, t, path="gvp", target="v")
        (out + clean + x_t + target + mk.guidance(x, u, 2.0)).sum().backward()

    for implementation in ("triton", "reference"):
        with mk.use_backend(implementation, "schedule"):
            calls()
            with waits_are_errors():
                calls()


CODES, POSITIONS = 70, 65


@pytest.mark.parametrize("codes_first", (False, True))
@pytest.mark.parametrize("implementation", ("reference", "triton"))
def test_a_discrete_run_in_one_graph_is_the_eager_run(implementation, codes_first):
    """Both steps, by an index on the device that the graph advances; the same codes as on the CPU; nobody waits for the device."""
    rows = mk.transition_table(torch.linspace(0.99, 0.01, STEPS), CODES).cuda()
    schedule, key = mk.masking_table(STEPS).cuda(), KEY.expand(2, 2).contiguous()
    logits = randn(2, POSITIONS, CODES, seed=1).float()
    given = logits.mT.contiguous().cuda() if codes_first else logits.cuda()
    dim, on_gpu = 1 if codes_first else -1, key.cuda()
    start = torch.full((2, POSITIONS), CODES, device="cuda")
    at, x, y = torch.zeros((), dtype=torch.int64, device="cuda"), start.clone(), start.clone()

    def loop():
        at.zero_(), x.copy_(start), y.copy_(start)
        for _ in range(STEPS):
            x.copy_(mk.vq_diffusion_step(given, x, rows, STEPS - 1 - at, noise=on_gpu, dim=dim))
            y.copy_(mk.unmask_step(given, y, schedule, at, mask_id=CODES, noise=on_gpu, dim=dim).prev_sample)
            at.add_(1)

    with mk.use_backend(implementation, "schedule"), mk.use_backend("reference", "philox"):
        loop()  # compiles
        with waits_are_errors():
            loop()
        expected = x.clone(), y.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop()
        x.zero_(), y.zero_()
        graph.replay()
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    a, b = start.cpu(), start.cpu()
    for step in range(STEPS):
        a = mk.vq_diffusion_step(logits, a, rows.cpu(), STEPS - 1 - step, noise=key)
        b = mk.unmask_step(logits, b, schedule.cpu(), step, mask_id=CODES, noise=key).prev_sample
    assert torch.equal(x.cpu(), a) and torch.equal(y.cpu(), b)
