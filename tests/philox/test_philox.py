"""The noise law: known answers, one stream for every shape and instruction set, keys, dtypes, statistics, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.philox.streams import KEYS, ULPS, error_of_normals
from mmgen_kernels.battery.tolerance import ulp
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.philox import ops, reference

IMPLEMENTATIONS = battery.implementations("philox_normal", torch.device("cpu"))
KEY = torch.tensor([2026, 0])
needs_cpp = pytest.mark.skipif(not OPERATORS["philox_normal"].has_cpp, reason="needs the C++ part")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


# -- known answers ----------------------------------------------------------------------------------------------------

# Random123, kat_vectors: philox4x32 10 <counter> <key> <result>
RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), RANDOM123)
def test_known_answers_of_random123(counter, key, result):
    counter, key, result = (tuple(torch.tensor(int(word, 16)) for word in words.split()) for words in (counter, key, result))
    assert reference.rounds(counter, key) == result


def test_known_answer_of_the_stream(implementation):
    zero = torch.zeros(2, dtype=torch.int64)
    assert [f"{word:08x}" for word in mk.philox_integers((4,), zero).tolist()] == RANDOM123[0][2].split()


INTEGERS_OF_KEY = [1851468003, 2243411547, 3016668856, 1273610028, 4244632846, 1498353002]
NORMALS_OF_KEY = ["-1.28452", "-0.18146", "-0.24229", "0.80491", "-0.08936", "0.12487"]
FOLDED = [6435377145698055438, -3351074889962177279]


def test_numbers_never_change(implementation):
    """What a key gave in the first version it gives in every later one."""
    assert mk.philox_integers((6,), KEY).tolist() == INTEGERS_OF_KEY
    assert [f"{z:.5f}" for z in mk.philox_normal((6,), KEY).tolist()] == NORMALS_OF_KEY
    assert mk.fold_in(KEY, 1).tolist() == FOLDED


def test_fold_in_is_a_block_of_the_stream(implementation):
    words = mk.philox_integers((40,), KEY).view(10, 4)
    low, high = words[:, 0::2], words[:, 1::2]
    assert torch.equal(mk.fold_in(KEY, torch.arange(10)), low | (high << 32))
    assert torch.equal(mk.fold_in(KEY, 7), mk.fold_in(KEY, torch.arange(10))[7])


@pytest.mark.gpu
def test_torch_has_the_same_law():
    random = pytest.importorskip("torch.func._random")
    key = random.key(2026, device="cuda")
    assert torch.equal(random.fold_in(key, 5).view(torch.int64), mk.fold_in(key, 5))
    assert torch.equal(random.split(key, 7).view(torch.int64), mk.fold_in(key, torch.arange(7, device="cuda")))
    torch.testing.assert_close(random.normal(key, (4096,)), mk.philox_normal((4096,), key), rtol=1e-5, atol=3e-4)


@pytest.mark.gpu
def test_the_battery_on_a_gpu():
    rows = battery.run("cuda", family="philox")
    assert "reference" in {row.implementation for row in rows}
    assert [failure for row in rows for failure in row.failures] == [] and all(row.repeatable for row in rows)


@pytest.mark.gpu
def test_a_captured_graph_draws_fresh_noise():
    key, step = KEY.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")

    def draw():
        noise = mk.philox_normal((3, 1000), mk.fold_in(key, step))
        step.add_(1)
        return noise

    draw()  # compiles
    step.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise = draw()
    for i in range(3):
        graph.replay()
        assert torch.equal(noise, mk.philox_normal((3, 1000), mk.fold_in(key, i)))


# -- one stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", (mk.philox_integers, mk.philox_uniform, mk.philox_normal))
def test_an_element_does_not_depend_on_the_shape(implementation, function):
    long = function((5000,), KEY)
    for shape in ((), (1,), (3,), (5,), (1023,), (2, 3), (7, 1, 11), (4, 0), (0,)):
        count = math.prod(shape)
        assert torch.equal(function(shape, KEY), long[:count].view(shape))


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(0, 4),
)
def test_any_key_and_shape(seed, offset, shape, batch_rank):
    batch = shape[: min(batch_rank, len(shape))]
    keys = torch.tensor([seed, offset]) ^ torch.arange(2 * math.prod(batch)).view(*batch, 2)
    assert torch.equal(mk.philox_integers(shape, keys), reference.philox_integers(keys, shape))
    assert error_of_normals(mk.philox_normal(shape, keys), reference.philox_normal(keys, shape, torch.float64))[1] is None


@pytest.mark.parametrize("function", (mk.philox_integers, mk.philox_uniform, mk.philox_normal))
def test_an_offset_is_a_view_further_down(implementation, function):
    stream = function((400,), KEY)
    for blocks in (1, 3, 50):
        assert torch.equal(function((200,), KEY + torch.tensor([0, blocks])), stream[4 * blocks : 4 * blocks + 200])


def test_a_key_per_sample(implementation):
    keys = mk.fold_in(KEY, torch.arange(6)).view(2, 3, 2)
    noise = mk.philox_normal((2, 3, 5, 7), keys)
    assert len(noise.flatten(0, 1)[:, 0, 0].unique()) == 6
    for i in range(2):
        assert torch.equal(mk.philox_normal((3, 5, 7), keys[i]), noise[i])
        assert torch.equal(mk.philox_normal((5, 7), keys[i, 1]), noise[i, 1])


def test_keys_of_any_layout(implementation):
    keys = mk.fold_in(KEY, torch.arange(12)).view(4, 3, 2)
    expected = mk.philox_normal((3, 4, 5), keys.transpose(0, 1).contiguous())
    assert torch.equal(mk.philox_normal((3, 4, 5), keys.transpose(0, 1)), expected)
    padded = torch.zeros(4, 3, 4, dtype=torch.int64)
    padded[..., ::2] = keys
    assert torch.equal(mk.philox_normal((4, 3, 5), padded[..., ::2]), mk.philox_normal((4, 3, 5), keys))


def test_keys_are_not_written(implementation):
    key = KEY.clone()
    mk.philox_normal((5,), mk.fold_in(key, 3))
    mk.philox_normal((5,), key)
    assert torch.equal(key, KEY)


def test_keys_of_torch(implementation):
    """torch.func._random makes uint64 keys."""
    key = torch.tensor([2**64 - 1, 2**63], dtype=torch.uint64)
    same = torch.tensor([-1, -(2**63)])
    assert torch.equal(mk.philox_integers((9,), key), mk.philox_integers((9,), same))
    assert torch.equal(mk.fold_in(key, 3), mk.fold_in(same, 3)) and mk.fold_in(key, 3).dtype == torch.int64


def test_without_a_key_torch_s_generator_gives_one(implementation):
    torch.manual_seed(0)
    first, second = mk.philox_normal((5,), None), mk.philox_normal((5,), None)
    torch.manual_seed(0)
    assert torch.equal(mk.philox_normal((5,), None), first) and not torch.equal(first, second)


def test_a_step_counter_may_be_a_tensor(implementation):
    step = torch.tensor(0)
    for i in range(3):
        assert torch.equal(mk.fold_in(KEY, step), mk.fold_in(KEY, i))
        step += 1


# -- implementations --------------------------------------------------------------------------------------------------


def by_instruction_set(monkeypatch, call):
    probe = pytest.importorskip("mmgen_kernels._probe", reason="built with MMGEN_KERNELS_PROBE=1")
    results = {}
    for instruction_set in probe.instruction_sets():
        monkeypatch.setenv("MMGEN_KERNELS_CPU", instruction_set)
        results[instruction_set] = call()
    return results


@needs_cpp
@pytest.mark.parametrize("size", (0, 1, 3, 5, 16, 17, 31, 33, 63, 65, 1023, 5000))
def test_every_instruction_set_gives_the_same_bits(monkeypatch, size):
    def call():
        drawn = [mk.philox_integers((size,), torch.tensor(key)) for key in KEYS.values()]
        for function in (mk.philox_uniform, mk.philox_normal):
            drawn += [function((size,), KEY, dtype=dtype) for dtype in DTYPES]
        return drawn

    results = by_instruction_set(monkeypatch, call)
    for drawn in results.values():
        for a, b in zip(drawn, results["scalar"], strict=True):
            assert torch.equal(a, b)
    for integers, key in zip(results["scalar"], KEYS.values(), strict=False):
        assert torch.equal(integers, reference.philox_integers(torch.tensor(key), [size]))


@needs_cpp
def test_every_instruction_set_gives_the_same_normals(monkeypatch):
    results = by_instruction_set(monkeypatch, lambda: mk.philox_normal((1_000_000,), KEY))
    assert all(torch.equal(z, results["scalar"]) for z in results.values())


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_normals_are_within_the_bound(dtype):
    size = 500_000
    truth = reference.philox_normal(KEY, [size], torch.float64)
    noise = mk.philox_normal((size,), KEY, dtype=dtype)
    assert error_of_normals(noise, truth)[1] is None
    if dtype == torch.float32:
        units = (noise.double() - truth).abs() / ulp(truth, dtype)
        assert float(units.square().mean().sqrt()) < 1
    elif dtype != torch.float64:
        assert torch.equal(noise, mk.philox_normal((size,), KEY).to(dtype))


def test_uniforms(implementation):
    integers = mk.philox_integers((20_000,), KEY)
    assert integers.min() >= 0 and integers.max() < 2**32
    exact = integers.double() / 2**32
    for dtype in DTYPES:
        uniform = mk.philox_uniform((20_000,), KEY, dtype=dtype).double()
        step = 2.0 ** -reference.DIGITS[dtype]
        assert torch.equal(uniform, (exact / step).floor() * step) and uniform.max() < 1


# -- statistics -------------------------------------------------------------------------------------------------------


def check_statistics(size):
    """Each bound at 5 standard deviations; Kolmogorov-Smirnov at its 0.1 % point. Fixed keys: these never fail by chance."""
    for key in (KEY, mk.fold_in(KEY, 1)):
        z = mk.philox_normal((size,), key).double()
        assert abs(float(z.mean())) < 5 * (1 / size) ** 0.5
        assert abs(float(z.var()) - 1) < 5 * (2 / size) ** 0.5
        assert abs(float((z**3).mean())) < 5 * (15 / size) ** 0.5
        assert abs(float((z**4).mean()) - 3) < 5 * (96 / size) ** 0.5
        for lag in (1, 2, 3, 4, 64):
            assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 * (1 / size) ** 0.5
            assert abs(float((z[lag:].square() * z[:-lag].square()).mean()) - 1) < 5 * (8 / size) ** 0.5
        assert distance_from(torch.special.ndtr(z)) < 1.95 / size**0.5
        assert distance_from(mk.philox_uniform((size,), key).double()) < 1.95 / size**0.5
        other = mk.philox_normal((size,), mk.fold_in(key, 2)).double()
        assert abs(float((z * other).mean())) < 5 * (1 / size) ** 0.5


def distance_from(cumulative):
    """Kolmogorov-Smirnov's largest distance from the uniform distribution."""
    ordered = cumulative.sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((ordered - steps[:-1]).max(), (steps[1:] - ordered).max()))


@needs_cpp
def test_statistics():
    check_statistics(1_000_000)


@needs_cpp
@pytest.mark.long
def test_statistics_of_ten_million():
    check_statistics(10_000_000)


def test_bits_are_fair(implementation):
    words = mk.philox_integers((100_000,), KEY)
    for bit in range(32):
        assert abs(float(((words >> bit) & 1).double().mean()) - 0.5) < 5 * 0.5 / 100_000**0.5


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "shape_int": (5, KEY, {}, TypeError, "shape must be a tuple of ints, got 5"),
    "shape_float": ((2.0,), KEY, {}, TypeError, r"shape must be a tuple of ints, got \(2.0,\)"),
    "shape_negative": ((2, -1), KEY, {}, ValueError, r"shape must have sizes >= 0, got \(2, -1\)"),
    "key_int": ((2,), 3, {}, TypeError, "key must be a tensor, got int"),
    "key_dtype": ((2,), KEY.float(), {}, TypeError, r"key must be int64 or uint64, got torch.float32"),
    "key_shape": ((2,), torch.zeros(3, dtype=torch.int64), {}, ValueError, r"key must be \(2,\) or .*, got shape \(3,\)"),
    "key_rank": ((2,), torch.tensor(1), {}, ValueError, r"key must be \(2,\) or .*, got shape \(\)"),
    "batch": ((3, 4), KEY.expand(2, 2), {}, ValueError, r"shape must begin with key's leading sizes \(2,\), got \(3, 4\)"),
    "batch_rank": ((3,), KEY.expand(3, 4, 2), {}, ValueError, r"shape must begin with key's leading sizes \(3, 4\), got \(3,\)"),
    "dtype": ((2,), KEY, {"dtype": torch.int64}, TypeError, r"dtype must be float64, .* or float16, got torch.int64"),
    "dtype_string": ((2,), KEY, {"dtype": "fp32"}, TypeError, r"dtype must be float64, .* or float16, got fp32"),
    "device": ((2,), KEY.to("meta"), {"device": "cpu"}, ValueError, "key must be on cpu or on the CPU, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("function", (mk.philox_normal, mk.philox_uniform, mk.philox_integers))
def test_bad_input(function, name):
    shape, key, options, error, message = BAD[name]
    if function is mk.philox_integers and "dtype" in options:
        pytest.skip("integers have no dtype")
    with pytest.raises(error, match=f"^{message}"):
        function(shape, key, **options)


FOLD_BAD = {
    "string": ("1", TypeError, "i must be an int or an int64 tensor, got str"),
    "bool": (True, TypeError, "i must be an int or an int64 tensor, got bool"),
    "float_tensor": (torch.tensor(1.0), TypeError, "i must be an int or an int64 tensor, got torch.float32"),
    "large": (2**63, ValueError, r"i must be at least -2\^63 and below 2\^63, got 9223372036854775808"),
    "broadcast": (torch.arange(3), ValueError, r"i must broadcast with key's batch \(2,\), got \(3,\)"),
    "device": (torch.tensor(1, device="meta"), ValueError, "i must be on key's device cpu, got meta"),
}


@pytest.mark.parametrize("name", FOLD_BAD)
def test_bad_input_of_fold_in(name):
    i, error, message = FOLD_BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        mk.fold_in(KEY.expand(2, 2), i)


@needs_cpp
def test_direct_calls_with_bad_shapes_raise():
    for key, shape in ((KEY.expand(2, 2), [3, 4]), (KEY.expand(2, 2), []), (KEY, [-1]), (KEY[:1], [3]), (KEY.int(), [3])):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.mmgen_kernels.philox_integers(key, shape)
    with pytest.raises(RuntimeError, match="one per key"):
        torch.ops.mmgen_kernels.fold_in(KEY, torch.arange(3))


def test_on_the_meta_device():
    with mk.use_backend("reference"):
        noise = mk.philox_normal((3, 4), KEY.to("meta"), dtype=torch.bfloat16)
    assert noise.shape == (3, 4) and noise.dtype == torch.bfloat16 and noise.is_meta


def test_the_bound_is_what_the_documentation_says(request):
    page = (request.config.rootpath / "docs" / "philox.md").read_text()
    assert f"within {ULPS[torch.float32]} units in the last place" in page
    assert f"within {ULPS[torch.float32]} units in the last place" in ops.philox_normal.__doc__
