"""The Triton kernels of the family by the interpreter, without a GPU: against the fp64 reference, and what they promise of bits.

Each test runs in a process in which TRITON_INTERPRET is set, or there needs none.
"""

import concurrent.futures
import importlib.util
import inspect
import itertools
import mmap
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.attn import ops, reference
from mmgen_kernels.battery import tolerance

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
from triton_interpreter import is_interpreted, prepare_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def process():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
        assert pool.submit(is_interpreted).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    yield pool
    pool.shutdown()


# -- inputs and runs --------------------------------------------------------------------------------------------------


def random(*shape, seed, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def inputs_of(dims=(2, 33, 65, 2, 2, 72), dtype=F16, bias=None, bias_dtype=F32, factor=1.0):
    """q (B, T, H, D), k and v (B, S, G, D), bias; `factor` of q makes logits large."""
    B, T, S, H, G, D = dims
    inputs = {"q": factor * random(B, T, H, D, seed=1, dtype=dtype)}
    inputs |= {n: random(B, S, G, D, seed=2 + i, dtype=dtype) for i, n in enumerate("kv")}
    if bias is not None:
        inputs["bias"] = random(*bias, seed=4, dtype=bias_dtype)
    return inputs


def results(call, inputs, use_lse=True, **options):
    """out, lse and the gradients of the inputs, by name. Upstream gradients are the same for the same shape."""
    inputs = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    out, lse = call(inputs["q"], inputs["k"], inputs["v"], bias=inputs.get("bias"), **options)
    upstream = random(*out.shape, seed=11).to(out.dtype), random(*lse.shape, seed=12).to(lse.dtype)
    used = 2 if use_lse else 1
    grads = torch.autograd.grad((out, lse)[:used], list(inputs.values()), upstream[:used])
    return {"out": out.detach(), "lse": lse.detach()} | {f"gradient of {n}": g for n, g in zip(inputs, grads, strict=True)}


def by(implementation, inputs, **options):
    with mk.use_backend(implementation):
        return results(ops.attention, inputs, return_lse=True, **options)


def plain(q, k, v, *, bias=None, causal=False, scale=None, key_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None):
    """As one writes it in PyTorch, every step in the inputs' dtype. Rows without keys are put right."""
    packed = cu_seqlens_q is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    seen = reference.visible(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, causal)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias.to(q.dtype)
    logits = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
    lse = logits.to(torch.promote_types(q.dtype, F32)).logsumexp(-1)
    empty = (lse == -torch.inf).unsqueeze(-1)
    out = (logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v).transpose(1, 2)
    return (out[0], lse[0]) if packed else (out, lse)


def judge(inputs, **options):
    """Without a gradient of lse by torch's own kernel, which saves lse as ours do: at logits of 1e4 what its rounding has lost
    cannot be found again. Else by PyTorch written out, as sdpa rounds 16-bit weights like ours and chance would decide."""
    ours = by("triton", inputs, **options)
    same_dtype = results(plain, inputs, **options) if options.get("use_lse", True) else by("torch", inputs, **options)
    truth = by("reference", {n: t.double() for n, t in inputs.items()}, **options)
    assert list(ours) == list(truth)
    for name in ours:
        expected = same_dtype[name].to(ours[name].dtype)
        _, failure = tolerance.failure(name, ours[name], expected, truth[name])
        assert failure is None, failure


def assert_same(ours, expected):
    assert list(ours) == list(expected)
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


# -- against fp64 -----------------------------------------------------------------------------------------------------


CASES = {
    # B, T, S, H, G, D
    "DiT": {"dims": (2, 65, 65, 2, 2, 72), "dtype": BF16},
    "one query, one key": {"dims": (2, 1, 1, 1, 1, 64), "dtype": BF16},
    "one query": {"dims": (1, 1, 70, 2, 1, 24), "dtype": F16},
    "one key": {"dims": (2, 17, 1, 2, 2, 72), "dtype": F16},
    "causal, fewer keys": {"dims": (1, 70, 17, 2, 1, 80), "dtype": BF16, "causal": True},
    "causal, more keys": {"dims": (2, 17, 130, 1, 1, 8), "dtype": F16, "causal": True},
    "group": {"dims": (1, 33, 65, 6, 2, 24), "dtype": BF16, "scale": 0.3},
    "wide group": {"dims": (1, 65, 33, 3, 1, 96), "dtype": F16},
    "key lengths": {"dims": (4, 17, 70, 1, 1, 72), "dtype": BF16, "lengths": (70, 0, 64, 90)},
    "key lengths, causal": {"dims": (3, 70, 70, 2, 1, 88), "dtype": F16, "lengths": (65, -3, 1), "causal": True},
    "128": {"dims": (1, 64, 65, 1, 1, 128), "dtype": BF16},
    "256": {"dims": (1, 16, 33, 2, 1, 256), "dtype": BF16},
    "fp32": {"dims": (2, 33, 65, 2, 1, 72), "dtype": F32},
    "fp32 causal": {"dims": (2, 65, 65, 1, 1, 8), "dtype": F32, "causal": True, "lengths": (33, 64)},
    "negative scale": {"dims": (1, 17, 65, 1, 1, 24), "dtype": F16, "scale": -0.5},
    "scale 0": {"dims": (1, 17, 33, 1, 1, 64), "dtype": F32, "scale": 0.0, "causal": True},
    "huge logits": {"dims": (1, 33, 65, 1, 1, 64), "dtype": F32, "factor": 3e3, "use_lse": False},
    "huge logits, bf16": {"dims": (1, 33, 65, 1, 1, 72), "dtype": BF16, "factor": 3e3},
    "huge logits, causal": {"dims": (1, 65, 65, 1, 1, 24), "dtype": F16, "factor": 1e3, "scale": 1.0, "causal": True},
}


@pytest.mark.parametrize("name", CASES)
def test_against_fp64(process, name):
    process.submit(judge_case, CASES[name]).result()


def judge_case(case):
    options = {n: v for n, v in case.items() if n in ("causal", "scale", "use_lse")}
    if "lengths" in case:
        options["key_lengths"] = torch.tensor(case["lengths"], dtype=torch.int32)
    inputs = inputs_of(**{n: v for n, v in case.items() if n in ("dims", "dtype", "factor")})
    judge(inputs, **options)


def test_nearly_torchs_own_kernel(process):
    """Where both round the same things, sdpa of the CPU: our errors are no larger, at a size at which chance hardly matters."""
    process.submit(judge_against_sdpa).result()


def judge_against_sdpa():
    inputs = inputs_of((2, 100, 200, 2, 2, 80), F16)
    ours, theirs = (by(i, inputs, use_lse=False) for i in ("triton", "torch"))
    truth = by("reference", {n: t.double() for n, t in inputs.items()}, use_lse=False)
    for name in ("out", "gradient of q", "gradient of k", "gradient of v"):
        ratio = tolerance.rms(ours[name] - truth[name]) / tolerance.rms(theirs[name] - truth[name])
        assert ratio <= (1.01 if name == "gradient of q" else 1.0), (name, ratio)


BROADCASTS = [
    tuple(size if keep else 1 for size, keep in zip((2, 2, 17, 33), which, strict=True))
    for which in itertools.product((True, False), repeat=4)
]


BIAS_DTYPES = (F32, F64, BF16, F16)


@pytest.mark.parametrize("causal", (False, True))
def test_bias_of_every_shape(process, causal):
    process.submit(judge_biases, causal).result()


def judge_biases(causal):
    """All shapes as one sample of errors: of the largest of a few hundred chance would decide."""
    shapes = zip(BROADCASTS[: 4 if causal else 16], itertools.cycle(BIAS_DTYPES), strict=False)
    cases = [inputs_of((2, 17, 33, 2, 1, 24), F32, *shape_and_dtype) for shape_and_dtype in shapes]
    for inputs in cases:
        if inputs["bias"].shape[2:] == (17, 33):
            inputs["bias"][..., 3, :] = -torch.inf  # a query without keys
            inputs["bias"][..., 5, ::2] = -torch.inf
    # of lower rank, and a view whose keys are not next to each other
    cases.append(inputs_of((2, 17, 33, 2, 1, 24), F32) | {"bias": random(33, 17, seed=4).mT})
    errors = {}
    for inputs in cases:
        wide = {n: t.double() for n, t in inputs.items()}
        ours, plainly = (by(implementation, inputs, causal=causal) for implementation in ("triton", "reference"))
        for name, exact in by("reference", wide, causal=causal).items():
            assert ours[name].dtype == plainly[name].dtype and ours[name].shape == exact.shape
            of = f"{name}, {ours[name].dtype}"
            trio = (ours[name], plainly[name], exact)
            if ours[name].dtype == F64:  # summed in fp32
                trio = (ours[name].float(), plainly[name].float(), exact)
            errors.setdefault(of, []).append([t.flatten() for t in trio])
    for name, tensors in errors.items():
        _, failure = tolerance.failure(name, *(torch.cat(t) for t in zip(*tensors, strict=True)))
        assert failure is None, failure


def test_bias_of_16_bits(process):
    process.submit(judge_bias_of_16_bits).result()


def judge_bias_of_16_bits():
    judge(inputs_of((1, 65, 70, 2, 1, 72), BF16, (1, 2, 65, 70), BF16))
    judge(inputs_of((2, 17, 70, 2, 2, 96), F16, (70,), F16), key_lengths=torch.tensor([65, 70]))


# -- bits -------------------------------------------------------------------------------------------------------------


BITS = {
    "short": {"dims": (3, 65, 70, 1, 1, 72), "dtype": BF16},
    "two kernels": {"dims": (3, 33, 70, 1, 1, 96), "dtype": F16},
    "causal": {"dims": (3, 70, 65, 2, 2, 24), "dtype": F16, "causal": True},
    "fp32": {"dims": (3, 33, 70, 2, 1, 8), "dtype": F32},
}


@pytest.mark.parametrize("name", [n if n in ("short", "two kernels") else pytest.param(n, marks=LONG) for n in BITS])
def test_same_bits_again_and_alone(process, name):
    process.submit(again_and_alone, **BITS[name]).result()


def again_and_alone(dims, dtype, causal=False):
    inputs, lengths = inputs_of(dims, dtype), torch.tensor([dims[2], 33, 64])
    whole, again = (by("triton", inputs, causal=causal, key_lengths=lengths) for _ in range(2))
    assert_same(whole, again)
    with mk.use_backend("triton"):
        for b in (0, 2):
            given = {n: t[b : b + 1].detach().requires_grad_() for n, t in inputs.items()}
            out, lse = ops.attention(*given.values(), causal=causal, key_lengths=lengths[b : b + 1], return_lse=True)
            upstream = random(*whole["out"].shape, seed=11).to(dtype)[b : b + 1], random(*whole["lse"].shape, seed=12)[b : b + 1]
            alone = (out, lse, *torch.autograd.grad((out, lse), list(given.values()), upstream))
            for (key, of_whole), one in zip(whole.items(), alone, strict=True):
                assert torch.equal(of_whole[b : b + 1], one), key


def test_one_head_is_as_many(process):
    process.submit(one_head).result()


def one_head():
    inputs = inputs_of((2, 33, 70, 4, 2, 72), BF16)
    with mk.use_backend("triton"):
        out = ops.attention(*inputs.values())
        one = ops.attention(inputs["q"][:, :, 2:3], *(inputs[n][:, :, 1:] for n in "kv"))
    assert torch.equal(out[:, :, 2:3], one)


@pytest.mark.parametrize(("D", "causal"), [(72, False), (8, True), pytest.param(72, True, marks=LONG)])
def test_short_is_as_the_two_kernels(process, D, causal):
    process.submit(short_as_two, D, causal).result()


def short_as_two(D, causal):
    from mmgen_kernels.attn.triton_kernels import backward

    bias = (1, 2, 70, 130) if D == 8 else None
    inputs = inputs_of((2, 70, 130, 2, 1, D), BF16, bias)
    options = {"causal": causal, "key_lengths": torch.tensor([130, 64])}
    launched = count(backward, "attention_backward_short")
    short = by("triton", inputs, **options)
    assert launched() == 1
    patch = pytest.MonkeyPatch()
    patch.setattr(backward, "is_short", lambda T, S: False)
    with patch.context():
        two = by("triton", inputs, **options)
    patch.undo()
    assert launched() == 1
    assert_same(short, two)


def count(module, name):
    """A function that tells how often the kernel was launched."""
    kernel, launches = getattr(module, name), []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    setattr(module, name, Counted())
    return lambda: len(launches)


@pytest.mark.parametrize(("dtype", "causal"), [(BF16, False), (F32, True), pytest.param(BF16, True, marks=LONG)])
def test_packed_is_as_dense(process, dtype, causal):
    process.submit(packed_as_dense, dtype, causal).result()


def packed_as_dense(dtype, causal):
    """Sequences of queries and keys of different lengths, some empty; tokens in no sequence before and after."""
    lengths_q, lengths_k = (65, 0, 1, 33, 7), (70, 5, 64, 0, 129)
    starts_q, starts_k = (torch.tensor([3, *lengths_q]).cumsum(0), torch.tensor([0, *lengths_k]).cumsum(0))
    N, M, H, G, D = int(starts_q[-1]) + 2, int(starts_k[-1]) + 5, 2, 1, 72
    inputs = {n: t[0] for n, t in inputs_of((1, N, M, H, G, D), dtype).items()}
    inputs["q"][:3] = torch.nan
    inputs["k"][-5:] = torch.nan
    bounds = {"cu_seqlens_q": starts_q.int(), "cu_seqlens_k": starts_k.int()}
    packed = by("triton", inputs, causal=causal, **bounds)
    upstream, upstream_lse = random(N, H, D, seed=11).to(dtype), random(H, N, seed=12)
    covered = {"q": torch.zeros(N, dtype=torch.bool), "k": torch.zeros(M, dtype=torch.bool)}
    for c in range(5):
        own_q, own_k = slice(*starts_q[c : c + 2].tolist()), slice(*starts_k[c : c + 2].tolist())
        covered["q"][own_q], covered["k"][own_k] = True, True
        given = [inputs[n][None, own].detach().requires_grad_() for n, own in zip("qkv", (own_q, own_k, own_k), strict=True)]
        with mk.use_backend("triton"):
            out, lse = ops.attention(*given, causal=causal, return_lse=True)
        grads = torch.autograd.grad((out, lse), given, (upstream[None, own_q], upstream_lse[None, :, own_q]))
        assert torch.equal(packed["out"][own_q], out[0]) and torch.equal(packed["lse"][:, own_q], lse[0])
        for n, own, grad in zip("qkv", (own_q, own_k, own_k), grads, strict=True):
            assert torch.equal(packed[f"gradient of {n}"][own], grad[0]), (c, n)
    for n, own in (("q", "q"), ("k", "k"), ("v", "k")):
        assert (packed[f"gradient of {n}"][~covered[own]] == 0).all()
    assert (packed["out"][~covered["q"]] == 0).all() and (packed["lse"][:, ~covered["q"]] == -torch.inf).all()


def test_packed_against_fp64(process):
    process.submit(judge_packed).result()


def judge_packed():
    inputs = {n: t[0] for n, t in inputs_of((1, 50, 60, 2, 1, 24), F16).items()}
    bounds = {"cu_seqlens_q": torch.tensor([0, 17, 17, 40, 50]), "cu_seqlens_k": torch.tensor([0, 33, 40, 50, 60])}
    judge(inputs, causal=True, **bounds)


def test_bounds_out_of_range_are_clamped(process):
    process.submit(clamp_bounds).result()


def clamp_bounds():
    """Neighbours in memory are NaN: what was read out of bounds would show."""
    inputs = inputs_of((3, 40, 50, 1, 1, 8), F32)
    wide = {n: t.clone() for n, t in inputs.items()}
    for t in wide.values():
        t[::2] = torch.nan
    wrong = {"cu_seqlens_q": torch.tensor([-7, 20, 99]), "cu_seqlens_k": torch.tensor([-2**40, 30, 2**40])}
    right = {"cu_seqlens_q": torch.tensor([0, 20, 40]), "cu_seqlens_k": torch.tensor([0, 30, 50])}
    inputs, wide = {n: t[1] for n, t in inputs.items()}, {n: t[1] for n, t in wide.items()}
    assert_same(by("triton", wide, **wrong), by("triton", inputs, **right))
    down = {"cu_seqlens_q": torch.tensor([30, 10, 40]), "cu_seqlens_k": torch.tensor([40, 10, 50])}  # senseless, and harmless
    assert by("triton", wide, **down)["out"].shape == (40, 1, 8)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", (72, 96))
def test_keys_beyond_their_length_leave_no_trace(process, D):
    process.submit(no_trace, D).result()


def no_trace(D):
    inputs, lengths = inputs_of((3, 17, 130, 1, 1, D), BF16), torch.tensor([70, 0, 128])
    clean = by("triton", inputs, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        inputs["k"][b, length:], inputs["v"][b, length:] = torch.nan, torch.inf
    assert_same(by("triton", inputs, key_lengths=lengths), clean)
    for n in "kv":
        assert all((clean[f"gradient of {n}"][b, length:] == 0).all() for b, length in enumerate(lengths.tolist()))
    assert (clean["out"][1] == 0).all() and (clean["lse"][1] == -torch.inf).all() and (clean["gradient of q"][1] == 0).all()


def test_nan_stays_in_its_query(process):
    process.submit(nan_stays).result()


def nan_stays():
    for value in (torch.nan, torch.inf):
        inputs = inputs_of((2, 40, 33, 2, 2, 8), F32)
        clean = by("triton", inputs)
        inputs["q"][1, 36, 0, 5] = value
        spoilt = by("triton", inputs)
        there = torch.zeros(2, 40, 2, dtype=torch.bool)
        there[1, 36, 0] = True
        assert torch.equal(spoilt["out"].isnan().all(-1), there) and torch.equal(spoilt["out"].isnan().any(-1), there)
        assert torch.equal(spoilt["out"][~there], clean["out"][~there])


def test_queries_without_keys_have_no_gradient(process):
    process.submit(no_keys).result()


def no_keys():
    """Whatever comes from upstream: of lse = -inf most functions have a gradient that is not finite."""
    inputs = inputs_of((1, 17, 33, 1, 1, 8), F32) | {"bias": torch.zeros(1, 1, 17, 33)}
    inputs["bias"][..., 4, :] = -torch.inf
    given = {n: t.requires_grad_() for n, t in inputs.items()}
    with mk.use_backend("triton"):
        out, lse = ops.attention(given["q"], given["k"], given["v"], bias=given["bias"], return_lse=True)
    assert (out[0, 4] == 0).all() and lse[0, 0, 4] == -torch.inf
    upstream = torch.ones_like(lse)
    upstream[0, 0, 4] = torch.nan
    grads = torch.autograd.grad((out, lse), list(given.values()), (torch.ones_like(out), upstream))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, 4] == 0).all() and (grads[3][0, 0, 4] == 0).all()


def test_views_are_read_in_place(process):
    process.submit(views_in_place).result()


def views_in_place():
    from mmgen_kernels.attn.triton_kernels import tiles

    B, T, H, D = 2, 33, 2, 24
    qkv = random(B, T, 3, H, D, seed=1, dtype=BF16)
    uneven = random(B, T, 3, H, D + 5, seed=1, dtype=BF16)[..., 3 : D + 3]
    by_head = random(3, B, H, T, D, seed=1, dtype=BF16).transpose(2, 3)
    spread = random(B, T, 3, H, D, 2, seed=1, dtype=BF16)[..., 0]
    for views, unit in ((qkv.unbind(2), 8), (uneven.unbind(2), 1), (by_head.unbind(0), 8), (spread.unbind(2), None)):
        if unit is not None:
            assert all(tiles.dense_rows(t) is t for t in views) and tiles.unit_of(*views) == unit
        before = [t.clone() for t in views]
        inputs = dict(zip("qkv", views, strict=True))
        assert_same(by("triton", inputs), by("triton", {n: t.contiguous() for n, t in inputs.items()}))
        assert all(torch.equal(a, b) for a, b in zip(before, views, strict=True))
    one = random(1, 1, 1, D, seed=1).as_strided((1, 1, 1, D), (7, 5, 3, 1))
    assert tiles.unit_of(one) == 8


def test_addresses_beyond_32_bits(process):
    process.submit(far_apart).result()


def far_apart():
    """Samples, heads or tokens 4 GiB apart, in memory that is never touched between them."""
    B, T, H, D = 2, 2, 2, 8
    far = 2**31 + 8  # as a number of 16 bytes it fits 32 bits

    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + B * T * H * D), flags=flags), dtype=F16)
    dense = random(B, T, H, D, seed=1, dtype=F16)
    for strides in ((far, H * D, D, 1), (T * D, D, far, 1), (H * D, far, D, 1)):
        view = memory.as_strided(dense.shape, strides)
        view.copy_(dense)
        assert_same(by("triton", dict.fromkeys("qkv", view)), by("triton", dict.fromkeys("qkv", dense)))


def test_empty_inputs(process):
    process.submit(nothing_to_do).result()


def nothing_to_do():
    for dims in ((2, 0, 5, 2, 1, 8), (2, 5, 0, 2, 1, 8), (0, 5, 5, 2, 1, 8)):
        inputs = inputs_of(dims, F16)
        assert_same(by("triton", inputs), by("reference", inputs))
    assert (by("triton", inputs_of((2, 5, 0, 2, 1, 8), F16))["lse"] == -torch.inf).all()
    wide = inputs_of((1, 5, 9, 2, 1, 8), F64)
    assert_same(by("triton", wide), by("reference", wide))


def test_a_gradient_that_nobody_needs_is_empty(process):
    process.submit(only_what_is_needed).result()


def only_what_is_needed():
    inputs = inputs_of((1, 17, 33, 2, 1, 8), F32, (1, 1, 17, 33))
    given = (*inputs.values(), None, None, None)
    out, lse = torch.ops.mmgen_kernels.attention.triton(*given, True, 0.3, True)
    upstream, upstream_lse = random(*out.shape, seed=11), random(*lse.shape, seed=12)
    backward = torch.ops.mmgen_kernels.attention_backward
    for needs in itertools.product((True, False), repeat=4):
        for grads in ((upstream, None), (None, upstream_lse), (upstream.sum().expand_as(upstream), upstream_lse)):
            request = (*grads, *given, out, lse, True, 0.3, True, *needs)
            for ours, plainly in zip(backward.triton(*request), backward.reference(*request), strict=True):
                assert ours.shape == plainly.shape and ours.dtype == plainly.dtype
                assert torch.allclose(ours, plainly, rtol=1e-4, atol=1e-5)


def test_opcheck(process):
    process.submit(check_operators).result()


def check_operators():
    inputs = {n: t.requires_grad_() for n, t in inputs_of((1, 5, 9, 2, 1, 8), F32, (1, 1, 5, 9)).items()}
    torch.library.opcheck(torch.ops.mmgen_kernels.attention.triton, (*inputs.values(), None, None, None, True, 0.3, True))


# -- what needs no interpreter ----------------------------------------------------------------------------------------


def test_tiles_cover_a_head_without_waste():
    from mmgen_kernels.attn.triton_kernels.tiles import tiles_of

    for D in range(8, 257, 8):
        for narrowest in (8, 16):
            cut = tiles_of(D, narrowest)
            assert [start for start, _ in cut] == [sum(w for _, w in cut[:i]) for i in range(len(cut))]
            assert all(width & (width - 1) == 0 and width >= narrowest for _, width in cut)
            columns = sum(width for _, width in cut)
            assert columns >= D > cut[-1][0]
            assert columns - -(-D // narrowest) * narrowest <= D / 12
    assert tiles_of(72, 16) == ((0, 64), (64, 16)) and tiles_of(72, 8) == ((0, 64), (64, 8))
    assert tiles_of(80, 16) == tiles_of(80, 8) == ((0, 64), (64, 16)) and tiles_of(96, 8) == ((0, 64), (64, 32))


def kernels():
    from mmgen_kernels.attn.triton_kernels import backward_bias, backward_keys, backward_queries, backward_short, forward

    modules = (forward, backward_queries, backward_keys, backward_short, backward_bias)
    return [getattr(m, n) for m in modules for n in vars(m) if n.startswith("attention_") and hasattr(getattr(m, n), "params")]


def test_nothing_is_specialised_on_sizes():
    assert len(kernels()) == 5
    for kernel in kernels():
        integers = {p.name for p in kernel.params if p.do_not_specialize}
        sizes = {"T", "S", "H", "group", "C", "tiles", "tiles_m", "tiles_n", "heads", "b_walk", "h_walk"}
        strides = {f"{of}_{d}" for of in ("q", "k", "v", "out", "grad", "new", "bias") for d in "bth"}
        assert integers == {p.name for p in kernel.params if p.name in sizes | strides}


def test_two_ways_have_the_same_tiles():
    """The bits of short heads: tiles of keys are those that queries walk, tiles of queries those that keys walk."""
    from mmgen_kernels.attn.triton_kernels import configuration

    for dtype, D, capability in itertools.product((BF16, F16, F32), range(8, 257, 8), ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))):
        short = configuration.short_configuration(dtype, D, capability)
        if short is not None:
            assert short.block_n == configuration.queries_configuration(dtype, D, capability).block_n
            assert short.block_m == configuration.keys_configuration(dtype, D, capability).block_m


def test_no_look_at_a_value():
    """Fake tensors have none: a launcher that asked for one would fail. And one axis of programs, so that many heads fit."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmgen_kernels.attn import triton_kernels
    from mmgen_kernels.attn.triton_kernels import backward, forward

    grids = []

    class Silent:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    patch = pytest.MonkeyPatch()
    for module in (forward, backward):
        for name in [n for n in vars(module) if n.startswith("attention_") and n != "attention_backward"]:
            patch.setattr(module, name, Silent())
    with patch.context(), FakeTensorMode():
        q, k = torch.empty(1, 50, 4, 8, dtype=BF16), torch.empty(1, 60, 2, 8, dtype=BF16)
        bounds, lengths = torch.empty(7, dtype=torch.int32), torch.empty(70000, dtype=torch.int64)
        many_q, many_k, bias = q.expand(70000, 50, 4, 8), k.expand(70000, 60, 2, 8), torch.empty(1, 4, 50, 60)
        for given in ((q, k, k, None, None, bounds, bounds), (many_q, many_k, many_k, bias, lengths, None, None)):
            out, lse = triton_kernels.attention(*given, False, 1.0, True)
            grads = triton_kernels.attention_backward(out, lse, *given, out, lse, False, 1.0, True, *[True] * 4)
            assert [g.shape for g in grads[:3]] == [t.shape for t in given[:3]]
    patch.undo()
    assert len(grids) == 6 and all(len(grid) == 1 for grid in grids)
    assert grids[0] == (4 * (50 // 64 + 8),) and grids[3] == (70000 * 4,)


def test_the_reference_takes_what_the_launchers_take():
    """Signatures: the schema's order is the reference's."""
    from mmgen_kernels.attn import triton_kernels

    for name in triton_kernels.__all__:
        ours, plainly = (inspect.signature(getattr(m, name)).parameters for m in (triton_kernels, reference))
        assert list(ours) == list(plainly), name
