"""The steps of discrete diffusion with torch's machinery: opcheck, compile, export, vmap, autocast; and what they refuse."""

import io

import pytest
import torch
from overloads import each_overload
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.schedule.discrete import KEPT

NAMES = ("vq_diffusion_step", "unmask_step")
KEY = torch.tensor([11, 2**35])
K = 9
ROWS = mk.transition_table(KEPT, K, gammas_cumprod=0.9 * (1 - KEPT))
SCHEDULE = mk.masking_table(6)


@pytest.fixture(params=battery.implementations("vq_diffusion_step", torch.device("cpu")))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def inputs(*shape, num_codes=K):
    return randn(*shape, num_codes, seed=1).float(), randint(num_codes - 3, num_codes + 1, shape, 2)


@each_overload(NAMES)
def test_opcheck(name, overload):
    logits, codes = inputs(3, 5)
    keys, index, drawn = KEY.expand(3, 2), torch.tensor([0, 9, 2]), torch.rand(3, 5, K + 1)
    if name == "vq_diffusion_step":
        calls = [
            (logits, codes, None, ROWS, None, KEY, 2, 1.0, True),
            (logits.bfloat16().mT.contiguous().mT, codes, None, ROWS, index, keys, 0, 0.5, False),
            (logits.double(), codes, drawn.double(), ROWS, None, None, 1, 1.0, True),
        ]
    else:
        calls = [
            (logits, codes, None, None, SCHEDULE, None, KEY, 2, K, 1.0),
            (logits.half(), codes, None, None, SCHEDULE, index, keys, 0, K, 0.7),
            (logits, codes, None, drawn[..., 0], SCHEDULE, None, None, 1, K, 0.0),
        ]
    for arguments in calls:
        torch.library.opcheck(overload, arguments)


def run(logits, codes, step):
    """A step of each, the second on what the first left."""
    x = mk.vq_diffusion_step(logits, codes, ROWS, step, noise=KEY)
    return mk.unmask_step(logits, x, SCHEDULE, step, mask_id=K, noise=KEY)


def test_compile_with_dynamic_shapes_and_steps(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for (B, N), step in (((3, 20), 1), ((5, 12), 2), ((4, 33), 3), ((7, 2), 5)):
        given = inputs(B, N)
        assert all(map(same_bits, compiled(*given, step), run(*given, step)))
        graphs.append(counter.frame_count)
    assert len(set(graphs[1:])) == 1


def test_export_saved_and_loaded(implementation):
    class Sampler(torch.nn.Module):
        def forward(self, logits, codes, step):
            x, log_prob = mk.vq_diffusion_step(logits, codes, ROWS, step, noise=KEY, return_log_prob=True)
            return *mk.unmask_step(logits, x, SCHEDULE, step, mask_id=K, noise=KEY), log_prob

    step = torch.tensor(2)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("N")}
    program = torch.export.export(Sampler(), (*inputs(3, 6), step), dynamic_shapes=(sizes, sizes, None))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    given = (*inputs(4, 9), step)
    assert all(map(same_bits, torch.export.load(file).module()(*given), Sampler()(*given)))


def test_vmap_is_a_loop(implementation):
    logits, codes = inputs(3, 2, 5)
    keys = torch.arange(6).view(3, 2)

    def step(logits, codes, key):
        return mk.vq_diffusion_step(logits, codes, ROWS, 2, noise=key), *mk.unmask_step(
            logits, codes, SCHEDULE, 2, mask_id=K, noise=key
        )

    each = [torch.stack(o) for o in zip(*[step(*a) for a in zip(logits, codes, keys, strict=True)], strict=True)]
    assert all(map(same_bits, vmap(step)(logits, codes, keys), each))


def test_autocast_and_inference_mode_change_nothing(implementation):
    given = inputs(2, 8)
    expected = run(*given, 1)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert all(map(same_bits, run(*given, 1), expected))


def test_a_step_of_the_host_is_that_of_a_tensor(implementation):
    logits, codes = inputs(3, 8)
    for step in range(6):
        expected = (mk.vq_diffusion_step(logits, codes, ROWS, step, noise=KEY), *run(logits, codes, step))
        of_tensor = torch.tensor(step)
        assert all(map(same_bits, (mk.vq_diffusion_step(logits, codes, ROWS, of_tensor, noise=KEY), *run(logits, codes, of_tensor)),
                       expected))  # fmt: skip


def test_keys_are_drawn_where_none_is_given(implementation):
    logits, codes = inputs(2, 200)
    torch.manual_seed(3)
    first, second = (mk.vq_diffusion_step(logits, codes, ROWS, 2) for _ in range(2))
    torch.manual_seed(3)
    again = mk.vq_diffusion_step(logits, codes, ROWS, 2)
    assert torch.equal(first, again) and not torch.equal(first, second)
    mk.vq_diffusion_step(logits, codes, ROWS, torch.tensor([0, 3]))
    mk.unmask_step(logits, codes, SCHEDULE, torch.tensor([0, 3]), mask_id=K)


def test_a_draw_has_no_derivative(implementation):
    logits, codes = inputs(2, 5)
    logits.requires_grad_()
    assert not mk.vq_diffusion_step(logits, codes, ROWS, 1, noise=KEY).requires_grad
    with torch.no_grad():
        assert not mk.vq_diffusion_step(logits, codes, ROWS, 1, noise=KEY, return_log_prob=True)[1].requires_grad


# -- bad input --------------------------------------------------------------------------------------------------------

L, X = inputs(2, 3)


def step(logits=L, x_t=X, rows=ROWS, at=0, **named):
    return mk.vq_diffusion_step(logits, x_t, rows, at, **named)


def unmask(logits=L, sample=X, rows=SCHEDULE, at=0, **named):
    return mk.unmask_step(logits, sample, rows, at, **({"mask_id": K} | named))


REFUSED = [
    (lambda: step(logits=L.long()), TypeError, "logits must be float64, float32, bfloat16 or float16, got torch.int64"),
    (lambda: step(logits=L[0]), ValueError, r"logits must be \(B, N, K\) with K >= 1, got shape \(3, 9\)"),
    (lambda: step(logits=L[..., :0]), ValueError, r"logits must be \(B, N, K\) with K >= 1"),
    (lambda: step(logits=L[..., :0].mT, dim=1), ValueError, r"logits must be \(B, K, N\) with K >= 1"),
    (lambda: step(dim=2), ValueError, "dim must be -1 or 1, got 2"),
    (lambda: step(dim=1), ValueError, r"x_t must be of shape \(2, 9\), classes last, got \(2, 3\)"),
    (lambda: step(x_t=X.int()), TypeError, "x_t must be int64, got torch.int32"),
    (lambda: step(x_t=None), TypeError, "x_t must be int64, got NoneType"),
    (lambda: step(rows=ROWS.float()), TypeError, "transitions must be a float64 tensor, got torch.float32"),
    (lambda: step(rows=ROWS[:, :8]), ValueError, r"transitions must be \(steps, 9\) with a step at least, got shape \(6, 8\)"),
    (lambda: step(rows=ROWS[:0]), ValueError, r"transitions must be \(steps, 9\) with a step at least"),
    (lambda: step(at=6), ValueError, r"step must be in \[0, 6\), got 6"),
    (lambda: step(at=1.0), TypeError, "step must be an int or an int64 tensor, got float"),
    (lambda: step(at=torch.zeros(3, dtype=torch.int64)), ValueError, "step must be a scalar or one index per sample"),
    (lambda: step(temperature=0), ValueError, "temperature must be from 1e-30 to 1e30, got 0"),
    (lambda: step(temperature="1"), TypeError, "temperature must be a number, got str"),
    (lambda: step(noise=3), TypeError, "noise must be a tensor or a key, got int"),
    (lambda: step(noise=torch.zeros(3, 2).long()), ValueError, r"noise, where it is a key, must be \(2,\) or \(B, 2\) with B = 2"),
    (lambda: step(noise=KEY, at=torch.tensor([1, 2])), ValueError, "noise, where it is a key, must be one per sample"),
    (lambda: step(noise=L), ValueError, r"noise must be of shape \(2, 3, 10\), classes last, got \(2, 3, 9\)"),
    (lambda: step(logits=L.clone().requires_grad_(), return_log_prob=True), ValueError, "return_log_prob has no derivative here"),
    (lambda: unmask(sample=X[:1]), ValueError, r"sample must be of shape \(2, 3\), classes last, got \(1, 3\)"),
    (lambda: unmask(rows=ROWS), ValueError, r"schedule must be \(steps, 2\) with a step at least"),
    (lambda: unmask(mask_id=1.0), TypeError, "mask_id must be an int, got float"),
    (lambda: unmask(temperature=-1.0), ValueError, "temperature must be 0 or from 1e-30 to 1e30, got -1.0"),
    (lambda: unmask(noise=L), TypeError, r"noise must be a key or \(of codes, of confidences\), got one float tensor"),
    (lambda: unmask(noise=(L,)), ValueError, r"noise, where it is a tuple, must be \(of codes, of confidences\), got 1"),
    (lambda: unmask(noise=(None, L[..., 0])), TypeError, r"noise\[0\] must be a tensor where temperature is not 0, got NoneType"),
    (lambda: unmask(noise=(L[:1], L[..., 0])), ValueError, r"noise\[0\] must be of shape \(2, 3, 9\), classes last"),
    (lambda: unmask(noise=(L, L)), ValueError, r"noise\[1\] must be of shape \(2, 3\), classes last"),
    (lambda: mk.transition_table([0.5], 3), TypeError, "alphas_cumprod must be a tensor, got list"),
    (lambda: mk.transition_table(KEPT[None], 3), ValueError, r"alphas_cumprod must be \(T,\) with T >= 1, one for each step"),
    (lambda: mk.transition_table(KEPT, 3, gammas_cumprod=KEPT[:2]), ValueError, r"gammas_cumprod must be \(T,\) with T >= 1"),
    (lambda: mk.transition_table(KEPT, 0), ValueError, "num_codes must be an int of at least 1, got 0"),
    (lambda: mk.masking_table(0), ValueError, "num_steps must be an int of at least 1, got 0"),
    (lambda: mk.masking_table(3, kind="sine"), ValueError, "kind must be one of cosine, linear, got 'sine'"),
    (lambda: mk.masking_table(3, temperature="1"), TypeError, "temperature must be a number, got str"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m[:50] for _, _, m in REFUSED])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
