"""Every operator and overload of the family with torch's machinery: opcheck, compile, export, vmap, autocast."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
NAMES = list({case.operator: None for case in battery.cases("philox")})
KEY = torch.tensor([2026, -5])
KEYS = torch.arange(10).view(5, 2) * 0x123456789ABCDEF


@pytest.fixture(params=battery.implementations("philox_normal", CPU))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def samples(name):
    transposed = KEYS.t().contiguous().t()
    if name == "fold_in":
        yield from ((KEY, torch.tensor(3)), (KEYS, torch.arange(5)), (transposed, torch.arange(10)[::2]), (KEYS[:0], KEYS[:0, 0]))
    else:
        dtypes = [()] if name == "philox_integers" else [(dtype,) for dtype in DTYPES]
        yield from ((KEY, [2, 3], *dtype) for dtype in dtypes)
        yield from ((key, shape, *dtypes[0]) for key, shape in ((KEYS, [5, 9]), (transposed, [5]), (KEYS[:0], [0, 3]), (KEY, [])))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overload", ("default", "reference"))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(OPERATORS[name].overloads[overload], arguments)


@pytest.mark.parametrize("name", NAMES)
def test_fakes_tell_what_kernels_return(name):
    for arguments in samples(name):
        fake = OPERATORS[name].fake(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        real = OPERATORS[name]("cpp" if OPERATORS[name].has_cpp else "reference", *arguments)
        assert (fake.shape, fake.dtype, strides_that_count(fake)) == (real.shape, real.dtype, strides_that_count(real))


def strides_that_count(tensor):
    """What is alone in its dimension has no next: a slice of the reference's blocks keeps the stride that it was cut from."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


# -- torch.compile ----------------------------------------------------------------------------------------------------


def noise_like(x, key, step):
    folded = mk.fold_in(key, step)
    normal = mk.philox_normal(x.shape, folded)
    return x + normal, mk.philox_uniform(x.shape, folded, dtype=torch.bfloat16), mk.philox_integers((x.shape[0],), key)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_compile_with_dynamic_shapes_and_a_change_of_rank(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(noise_like, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for step, size in enumerate((23, 5, 64, 7), 2):
        x = torch.ones(size, 3)
        assert_same(compiled(x, KEY, step), noise_like(x, KEY, step))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # neither sizes nor the step are specialised on
    for shape in ((3, 5, 2), (9,), (2, 3, 4, 5)):
        assert_same(compiled(torch.ones(shape), KEY, 4), noise_like(torch.ones(shape), KEY, 4))


def test_compile_with_a_key_per_sample_and_a_step_on_the_device(implementation):
    def function(x, keys, step):
        return x + mk.philox_normal(x.shape, mk.fold_in(keys, step))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, step in ((5, 0), (3, 7)):
        arguments = torch.zeros(count, 2, 6), KEYS[:count], torch.tensor(step)
        assert torch.equal(compiled(*arguments), function(*arguments))


def test_compile_with_sizes_of_zero_and_one(implementation):
    compiled = torch.compile(noise_like, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((0, 3), (1, 1), (4, 0)):
        assert_same(compiled(torch.ones(shape), KEY, 3), noise_like(torch.ones(shape), KEY, 3))


@pytest.mark.long  # it compiles C++
def test_compile_with_inductor(implementation):
    def function(x, key):
        return (x * 2 + mk.philox_normal(x.shape, key)).sum(1)

    x = torch.randn(5, 8)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x, KEYS), function(x, KEYS))


def test_bad_input_in_compiled_code():
    compiled = torch.compile(lambda x: mk.philox_normal(x.shape, KEYS), backend="aot_eager")
    with pytest.raises(Exception, match=r"shape must begin with key's leading sizes"):
        compiled(torch.ones(3, 4))


# -- torch.export, vmap, autocast, autograd ---------------------------------------------------------------------------


class Noisy(torch.nn.Module):
    def forward(self, x, key):
        return x + mk.philox_normal(x.shape, mk.fold_in(key, 3)), mk.philox_uniform((4,), key), mk.philox_integers((4,), key)


def test_export_saved_and_loaded(implementation):
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Noisy(), (torch.ones(8, 6), KEY), dynamic_shapes=({0: rows}, None))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (8, 3, 100):
        assert_same(loaded(torch.ones(size, 6), KEY), Noisy()(torch.ones(size, 6), KEY))


@pytest.mark.parametrize("dim", (0, 1))
def test_vmap_over_keys_is_one_key_per_sample(implementation, dim):
    keys = KEYS.movedim(0, dim)
    for function in (mk.philox_normal, mk.philox_uniform, mk.philox_integers):
        got = torch.vmap(lambda key, function=function: function((3, 7), key), in_dims=dim)(keys)
        assert torch.equal(got, function((5, 3, 7), KEYS))
    nested = torch.vmap(torch.vmap(lambda key: mk.philox_normal((7,), key)))(KEYS.expand(2, 5, 2))
    assert torch.equal(nested, mk.philox_normal((2, 5, 7), KEYS.expand(2, 5, 2)))


def test_vmap_of_fold_in(implementation):
    expected = mk.fold_in(KEYS, torch.arange(5))
    assert torch.equal(torch.vmap(mk.fold_in)(KEYS, torch.arange(5)), expected)
    assert torch.equal(torch.vmap(mk.fold_in, in_dims=(1, 0))(KEYS.t(), torch.arange(5)), expected)
    assert torch.equal(torch.vmap(mk.fold_in, in_dims=(None, 0))(KEY, torch.arange(5)), mk.fold_in(KEY, torch.arange(5)))
    assert torch.equal(torch.vmap(lambda key: mk.fold_in(key, 3))(KEYS), mk.fold_in(KEYS, 3))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_changes_nothing(implementation, dtype):
    expected = mk.philox_normal((9,), KEY)
    with torch.autocast("cpu", dtype):
        assert torch.equal(mk.philox_normal((9,), KEY), expected)


def test_noise_takes_part_in_autograd_as_a_constant(implementation):
    x = torch.ones(5, requires_grad=True)
    noise = mk.philox_normal((5,), KEY)
    assert not noise.requires_grad
    (grad,) = torch.autograd.grad((x * noise).sum(), x)
    assert torch.equal(grad, noise)
    assert torch.equal(torch.func.grad(lambda x: (x * mk.philox_normal((5,), KEY)).sum())(torch.ones(5)), noise)
