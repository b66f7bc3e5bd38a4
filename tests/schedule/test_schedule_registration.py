"""The family with torch's machinery: opcheck, gradcheck, compile, export, vmap, torch.func, autocast; and what it refuses."""

import io

import pytest
import torch
from overloads import each_overload, with_backward
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.schedule.law import BF16, FP32, FP64
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
TABLE = randn(7, 3, 4, seed=50)
LEARNED = torch.cat((TABLE, torch.tensor([-4.0, -1, 0, 0]).expand(7, 1, 4).double()), 1)
KEY = torch.tensor([11, 2**35])
ALPHAS = torch.linspace(0.99, 0.01, 100, dtype=FP64)


@pytest.fixture(params=battery.implementations("scheduler_step", CPU))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def pair(*shape, dtype=FP32):
    return [randn(*shape, seed=i).to(dtype).requires_grad_() for i in range(2)]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


def slopes(outputs, inputs):
    return torch.autograd.grad(sum((i + 1) * o.square().sum() for i, o in enumerate(outputs)), inputs)


# -- opcheck, gradcheck -----------------------------------------------------------------------------------------------


def samples(name):
    """Arguments that reach every branch of an operator's fake and schema."""
    (x, m), (u, v) = pair(3, 4, 5), pair(3, 4, 5)
    none = (None, None, None)
    calls = {
        "scheduler_step": [
            (x, TABLE, 2, FP32, m, BF16, *none, None, 0.7, None, KEY),
            (x, TABLE[:, :2], 3, FP32, m),
            (x, TABLE, 0, FP32, m, FP32, *none, None, None, v, None, torch.arange(3), u, 1, 3.0, 0.5, None, None, 1.0),
            (x, LEARNED, 1, FP64, m, FP32, *none, None, None, u, None, None, None, 0, 1.0, 0.0, v, 0.9, 2.0),
        ],
        "guidance": [(x, m, 7.5, 0.0), (x, m, 7.5, 0.7)],
        "add_noise": [
            (x, m, None, torch.rand(3), None, "linear", "flow"),
            (x, None, KEY, torch.tensor([3, 50, 99]), ALPHAS, "vp", "v"),
            (x, m, None, torch.rand(3), None, "gvp", None),
        ],
    }
    forward = OPERATORS[name.removesuffix("_backward")]
    for arguments in calls[forward.name]:
        if name == forward.name:
            yield arguments
            continue
        given = {
            n: a.detach() if isinstance(a, torch.Tensor) else a
            for n, a in zip(forward.inputs, forward.filled(arguments), strict=True)
        }
        outputs = forward.reference(*given.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = {f"grad_{n}": torch.randn_like(o) for n, o in zip(forward.outputs, outputs, strict=True) if o.numel()}
        extra = {f"need_grad_{n}": given.get(n) is not None for n in forward.inputs} | {"x0_shape": [3, 4, 5]}
        tensors = [r.removeprefix("grad_") for r in forward.backward.outputs]
        extra["needs"] = [given.get(n) is not None for n in tensors]
        yield tuple((given | upstream | extra).get(n) for n in OPERATORS[name].inputs)


@each_overload(with_backward("scheduler_step", "guidance", "add_noise"))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


def test_gradcheck(implementation):
    x, m = pair(2, 3, 4, dtype=FP64)
    u, v, z = (randn(2, 3, 4, seed=i).requires_grad_() for i in range(5, 8))

    def step(x, m, u, v, z):
        return mk.scheduler_step((x, m), LEARNED, 3, noise=z, clamp=0.9, variance=v.tanh(), uncond=u, guidance_scale=2.0,
                                 guidance_rescale=0.4)  # fmt: skip

    torch.autograd.gradcheck(step, (x, m, u, v, z))
    torch.autograd.gradcheck(lambda x, m: mk.scheduler_step((x, m), TABLE, torch.tensor([1, 4]), noise=KEY.expand(2, 2)), (x, m))
    torch.autograd.gradcheck(lambda x, m: mk.guidance(x, m, 3.0, rescale=0.6), (x, m))
    t = torch.tensor([0.2, 0.7])
    torch.autograd.gradcheck(lambda x, m: mk.add_noise(x, m, t, path="gvp", target="flow"), (x, m))
    torch.autograd.gradcheck(lambda x, m: mk.add_noise(x, m, t, path="linear"), (x, m))


def test_a_key_stands_for_the_normals_of_the_step(implementation):
    x, m = (v.detach() for v in pair(3, 4, 35))
    for key in (KEY, torch.arange(6).view(3, 2)):
        noise = mk.philox_normal(x.shape, mk.fold_in(key, 4))
        assert_same(mk.scheduler_step((x, m), TABLE, 4, noise=key), mk.scheduler_step((x, m), TABLE, 4, noise=noise))
        t = torch.tensor([0.1, 0.5, 1.0])
        drawn = mk.add_noise(x, mk.philox_normal(x.shape, key), t, path="linear", target="flow")
        assert_same(mk.add_noise(x, key, t, path="linear", target="flow"), drawn)


def test_noise_of_the_first_times_is_not_lost_in_16_bits(implementation):
    """diffusers' DDPM in bf16 adds none at t = 0: 1 - alphas_cumprod is 0 there."""
    x0 = torch.full((2, 4096), 1.0, dtype=BF16)
    table = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=FP64)).cumprod(0)
    x_t, _ = mk.add_noise(x0, KEY, torch.tensor([0, 1]), table=table)
    assert (x_t.double().std(1) / (1 - table[:2]).sqrt() - 1).abs().max() < 0.05


def test_a_share_of_0_is_not_looked_at(implementation):
    x0, nothing = torch.ones(2, 70), torch.full((2, 70), torch.nan)
    x_t, _ = mk.add_noise(x0, nothing, torch.zeros(2), path="linear")
    assert_same([x_t], [x0])
    assert mk.add_noise(x0, nothing, torch.full((2,), 0.5), path="linear")[0].isnan().all()


# -- torch.compile, torch.export, torch.func --------------------------------------------------------------------------


def sampler(x, m, step):
    """Two steps, guided."""
    clean, noisy = mk.scheduler_step((x, m), TABLE, step, noise=KEY, clamp=1.0)
    return mk.scheduler_step((mk.guidance(clean, noisy, 2.0), x), TABLE, step + 1)


def test_compile_with_dynamic_shapes_steps_and_a_change_of_rank(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sampler, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for (B, C, W), step in (((3, 2, 23), 1), ((5, 3, 9), 2), ((4, 4, 64), 3), ((7, 2, 5), 5)):
        given = pair(B, C, W)
        expected = sampler(*given, step)
        found = compiled(*given, step)
        assert_same((*found, *slopes(found, given)), (*expected, *slopes(expected, given)))
        graphs.append(counter.frame_count)
    assert len(set(graphs[1:])) == 1  # sizes and steps are not specialised on
    for shape in ((9, 4), (3, 2, 4, 2)):
        given = pair(*shape)
        assert_same(compiled(*given, 2), sampler(*given, 2))


def test_export_saved_and_loaded(implementation):
    class Noiser(torch.nn.Module):
        def forward(self, x, z, t):
            x_t, v = mk.add_noise(x, z, t, path="gvp", target="v")
            return mk.scheduler_step((x_t, v), TABLE, torch.zeros((), dtype=torch.int64), clamp=1.0)

    given = (*(v.detach() for v in pair(3, 4, 6)), torch.rand(3))
    program = torch.export.export(Noiser(), given, dynamic_shapes=({0: torch.export.Dim("B")},) * 3)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    given = (*(v.detach() for v in pair(5, 4, 6)), torch.rand(5))
    assert_same(loaded(*given), Noiser()(*given))


def test_vmap_and_func_grad(implementation):
    def loss(x, m, t):
        x_t, target = mk.add_noise(x, m, t, path="linear", target="flow")
        return sum(o.square().sum() for o in mk.scheduler_step((x_t, target), TABLE, 2))

    x, m, t = (randn(3, 2, 5, seed=i).float() for i in range(3))
    each = [grad(loss, argnums=(0, 1))(x[i], m[i], t[i, :, 0]) for i in range(3)]
    assert_same(vmap(grad(loss, argnums=(0, 1)))(x, m, t[..., 0]), [torch.stack(g) for g in zip(*each, strict=True)])


def test_autocast_casts_nothing(implementation):
    x, m = pair(2, 3, 8)
    expected = (*mk.scheduler_step((x, m), TABLE, 0), mk.guidance(x, m, 2.0))
    with torch.autocast("cpu", BF16):
        assert_same((*mk.scheduler_step((x, m), TABLE, 0), mk.guidance(x, m, 2.0)), expected)


def test_inference_mode_checkpoint_and_second_derivative(implementation):
    x, m = pair(2, 3, 8)
    expected = mk.scheduler_step((x, m), TABLE, 0, clamp=0.5)
    with torch.inference_mode():
        assert_same(mk.scheduler_step((x.detach(), m.detach()), TABLE, 0, clamp=0.5), expected)
    again = checkpoint(lambda: mk.scheduler_step((x, m), TABLE, 0, clamp=0.5), use_reentrant=False)
    assert_same(slopes(again, (x, m)), slopes(expected, (x, m)))
    (slope,) = torch.autograd.grad(mk.guidance(x, m, 2.0, rescale=0.1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="guidance_backward has no derivative; the operator is differentiable once"):
        slope.sum().backward()


@pytest.mark.parametrize("size", [8, 1031])  # less than a vector; more than a piece, and no whole number of vectors
def test_dtypes_of_outputs(implementation, size):
    x, m = (v.detach() for v in pair(2, 3, size, dtype=BF16))
    wide = mk.scheduler_step((x, m), TABLE, 1, dtypes=(FP32, FP32))
    for dtypes in ((BF16, FP32), (FP32, BF16), (torch.float16, FP32), (BF16, torch.float16)):
        mixed = mk.scheduler_step((x, m), TABLE, 1, dtypes=dtypes)
        assert [o.dtype for o in mixed] == list(dtypes)
        assert_same(mixed, tuple(o.to(d) for o, d in zip(wide, dtypes, strict=True)))


# -- bad input --------------------------------------------------------------------------------------------------------

X, M = (v.detach() for v in pair(2, 3, 8))


def step(*, inputs=(X, M), coefficients=TABLE, at=0, **named):
    return mk.scheduler_step(inputs, coefficients, at, **named)


def noised(x0=X, noise=KEY, t=torch.tensor([0.1, 0.2]), **named):  # noqa: B008
    return mk.add_noise(x0, noise, t, **{"path": "linear", **named})


REFUSED = [
    (lambda: step(inputs=X), TypeError, "inputs must be a sequence of 1 to 5 tensors, got Tensor"),
    (lambda: step(inputs=()), TypeError, "inputs must be a sequence of 1 to 5 tensors, got 0"),
    (lambda: step(inputs=(X, M[:1])), ValueError, r"inputs\[1\] must have inputs\[0\]'s shape \(2, 3, 8\), got \(1, 3, 8\)"),
    (lambda: step(inputs=(X.long(), M)), TypeError, r"inputs\[0\] must be float64, float32, bfloat16 or float16, got torch.int64"),
    (lambda: step(coefficients=TABLE.float()), TypeError, "coefficients must be a float64 tensor, got torch.float32"),
    (lambda: step(coefficients=TABLE[..., 1:]), ValueError, r"coefficients must be \(steps, 1 \+ outputs, 4\) with 1 to 3 outputs"),
    (lambda: step(coefficients=TABLE[:, :1]), ValueError, "coefficients must be"),
    (lambda: step(at=7), ValueError, r"step must be in \[0, 7\), got 7"),
    (lambda: step(at=-1), ValueError, r"step must be in \[0, 7\), got -1"),
    (lambda: step(at=1.0), TypeError, "step must be an int or an int64 tensor, got float"),
    (lambda: step(at=torch.tensor(1.0)), TypeError, "step must be an int or an int64 tensor, got torch.float32"),
    (lambda: step(at=torch.zeros(3, dtype=torch.int64)), ValueError, "step must be a scalar or one index per sample"),
    (lambda: step(noise=X[:1]), ValueError, "noise must have inputs"),
    (lambda: step(noise=3), TypeError, "noise must be a tensor or a key, got int"),
    (lambda: step(noise=torch.zeros(3, 2, dtype=torch.int64)), ValueError, r"noise, where it is a key, must be \(2,\) or \(B, 2\)"),
    (lambda: step(at=torch.tensor([1, 2]), noise=KEY), ValueError, "noise, where it is a key, must be one per sample"),
    (lambda: step(clamp=0.0), ValueError, "clamp must be above 0, got 0.0"),
    (lambda: step(clamp="1"), TypeError, "clamp must be a number, got str"),
    (lambda: step(clamp=1.0, threshold=(0.9, 1)), ValueError, "clamp and threshold are alternatives"),
    (lambda: step(threshold=0.9), TypeError, r"threshold must be \(ratio, maximum\), got 0.9"),
    (lambda: step(threshold=(1.5, 1)), ValueError, r"threshold must have a ratio in \[0, 1\], got 1.5"),
    (lambda: step(threshold=(0.5, 0)), ValueError, "threshold must have a maximum above 0, got 0"),
    (lambda: step(threshold=(0.5, float("nan"))), ValueError, "threshold must have a maximum above 0, got nan"),
    (lambda: step(inputs=pair(2, 3, 8), threshold=(0.5, 1)), ValueError, "threshold has no derivative here"),
    (lambda: step(coefficients=TABLE[:, :2], variance=X), ValueError, r"coefficients must be \(steps, 2 \+ outputs, with a"),
    (lambda: step(coefficients=LEARNED, variance=X[:1]), ValueError, "variance must have inputs"),
    (lambda: step(uncond=X, guided=2), ValueError, "guided must name one of the 2 inputs, got 2"),
    (lambda: step(uncond=X, guidance_scale=float("nan")), ValueError, "guidance_scale must be finite, got nan"),
    (lambda: step(uncond=X.double().sum()), ValueError, "uncond must have inputs"),
    (lambda: step(dtypes=(FP32,)), ValueError, "dtypes must be 2 dtypes, one for each output"),
    (lambda: step(dtypes=(FP32, torch.int8)), TypeError, "dtypes must be float64, float32, bfloat16 or float16, got torch.int8"),
    (lambda: mk.guidance(X, M[:1], 2.0), ValueError, "uncond must have cond's shape"),
    (lambda: mk.guidance(X, M, "2"), TypeError, "scale must be a number, got str"),
    (lambda: mk.guidance(X.sum(), M.sum(), 2.0, rescale=1.0), ValueError, "cond must be"),
    (lambda: noised(path="cosine"), ValueError, "path must be one of vp, linear, gvp, edm, got 'cosine'"),
    (lambda: noised(target="noise"), ValueError, "target must be one of epsilon, sample, v, flow, got 'noise'"),
    (lambda: noised(target="v"), ValueError, "target 'v' is of paths that keep the variance, vp and gvp, got path 'linear'"),
    (lambda: noised(t=torch.zeros(3)), ValueError, r"t must be one time per sample \(2,\), got shape \(3,\)"),
    (lambda: noised(t=torch.zeros(2, dtype=torch.int64)), TypeError, "t must be float64"),
    (lambda: noised(table=ALPHAS), TypeError, "t must be int64 or int32 where there is a table, got torch.float32"),
    (lambda: noised(table=ALPHAS.view(10, 10), t=torch.zeros(2).long()), ValueError, r"table must be \(S,\) with S >= 1"),
    (lambda: noised(table=ALPHAS, t=torch.zeros(2).long(), path="vp", target="flow"), ValueError, "target 'flow' is a derivative"),
    (lambda: noised(x0=X.sum(), t=torch.zeros(())), ValueError, r"x0 must be \(B, ...\), got a scalar"),
    (lambda: noised(noise=X[..., :2]), ValueError, "noise must have x0's shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m[:50] for _, _, m in REFUSED])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
