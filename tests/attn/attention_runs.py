"""Inputs of the tests of the Triton kernels, and runs of the operator by one implementation and another."""

import torch

import mmgen_kernels as mk
from mmgen_kernels.attn import ops
from mmgen_kernels.attn.reference.attention import visible
from mmgen_kernels.battery import tolerance

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


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
    seen = visible(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, causal)
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
