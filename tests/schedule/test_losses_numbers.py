"""How near the C++ kernels' exponentials and logarithms bring an element's loss and its slopes to fp64: samples of one element."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.library import OPERATORS

pytestmark = pytest.mark.skipif(not OPERATORS["hybrid_loss"].has_cpp, reason="the C++ part is not built")
SETS = ("scalar", "avx2", "avx512")
N = 40_000


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    probe = pytest.importorskip("mmgen_kernels._probe", reason="built with MMGEN_KERNELS_PROBE=1")
    if request.param not in probe.instruction_sets():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("MMGEN_KERNELS_CPU", request.param)
    return request.param


def elements(row, differences, log_variances, x0, dtype, backend="cpp"):
    """Terms in nats, and their derivatives by the prediction and by the logarithm of the variance; row 0 decodes."""
    table = torch.tensor([[0, 1, -1, 1, 0, 0, 1.0]] * 2, dtype=torch.float64)  # apart = -difference, true variance 1, v its log
    output = torch.stack((differences, log_variances), 1).to(dtype).requires_grad_()
    zeros = torch.zeros(len(output), 1, dtype=dtype)
    with mk.use_backend(backend):
        found = mk.hybrid_loss(
            output, x0.to(dtype)[:, None], zeros, torch.full((len(output),), row), table=table, vb_weight=0.6931471805599453,
            objective="kl",
        )  # fmt: skip
        (grad,) = torch.autograd.grad(found.vb.sum(), output)
    return found.vb.detach().double(), grad[:, 0].double(), grad[:, 1].double()


def ulps(got, true, scale):
    """In units of fp32's last place of what the result is made of."""
    return float(((got - true).abs() / (scale * 2.0**-23)).max())


def test_divergences(instruction_set):
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(N, generator=generator) * 2
    v = torch.cat((torch.linspace(-30, 60, N // 2), torch.linspace(-1e-3, 1e-3, N // 2)))
    x0 = torch.zeros(N)
    got, true = (elements(1, d, v, x0, dtype) for dtype in (torch.float32, torch.float64))
    wide, precision = v.double(), torch.exp(-v.double())
    square = d.double().square() * precision
    parts = (torch.expm1(-wide).abs() + wide.abs() + square) / 2  # of less_one + gap + squares
    assert ulps(got[0], true[0], parts) <= 4
    assert ulps(got[1], true[1], d.double().abs() * precision) <= 4
    assert ulps(got[2], true[2], (torch.expm1(-wide).abs() + square) / 2) <= 4


def test_levels(instruction_set):
    """Deviations up to where a probability is 1e-12; the relative error of that is the absolute one of its logarithm."""
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(N, generator=generator) * 8 - 12
    d = torch.randn(N, generator=generator) * 2 * torch.exp(v / 2)
    x0 = torch.linspace(-1.2, 1.2, N)
    got, true = (elements(0, d, v, x0, dtype) for dtype in (torch.float32, torch.float64))
    seen = true[0] < 27  # beyond it the clamp is
    assert seen.double().mean() > 0.5 and (true[0] > 1).double().mean() > 0.2
    # the exponent of a tail is made of a deviation's third power, each of whose factors is rounded
    assert float(((got[0] - true[0]).abs() / (1 + true[0]))[seen].max()) <= 2e-6
    for a, b in zip(got[1:], true[1:], strict=True):
        assert a.isfinite().all()
        assert float((a - b)[seen].square().mean().sqrt() / b[seen].square().mean().sqrt()) <= 2e-6


def test_what_overflows_is_infinite(instruction_set):
    d, v = torch.full((3,), 0.5), torch.tensor([-88.0, -88.5, -1000.0])
    found = elements(1, d, v, torch.zeros(3), torch.float32)[0]
    assert found.isinf().tolist() == [False, True, True]


@pytest.mark.parametrize("delta", [2.0**-126, 1e-30, 3e-4, 1.0, 1e20, 1e38])
def test_pseudo_huber_at_every_scale(instruction_set, delta):
    """Of differences from far below delta to far above it, whose squares would vanish or overflow; each is a sample."""
    around = delta * 10.0 ** torch.linspace(-12, 12, 5000, dtype=torch.float64)
    d = torch.cat((around, 10.0 ** torch.linspace(-37, 38, 1000, dtype=torch.float64), torch.tensor([0.0])))
    d = torch.cat((d, -d))
    d = d[d.abs() < 1e38].float()
    output = d[:, None].requires_grad_()

    def losses(output):
        found = mk.diffusion_loss(output, torch.zeros_like(output), kind="pseudo_huber", delta=delta, reduction="none")
        return found.detach().double(), torch.autograd.grad(found.sum(), output)[0][:, 0].double()

    (got, slope), (true, true_slope) = losses(output), losses(output.detach().double().requires_grad_())
    least = 2.0**-126  # below, a unit in the last place is no share of the number
    assert ((got - true).abs() <= 4 * 2.0**-23 * true.clamp(min=least)).all()
    assert ((slope - true_slope).abs() <= 4 * 2.0**-23 * true_slope.abs().clamp(min=least)).all()
    assert torch.equal(slope.sign(), d.sign().double().where(true_slope.abs() > 2.0**-149, slope.sign()))
