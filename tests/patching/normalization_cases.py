"""The layers of diffusers' normalization file that the tests go through, and what they do with each."""

import copy

import torch
from called import Called
from torch import nn
from torch.utils._pytree import tree_leaves

import mmgen_kernels as mk
from mmgen_kernels.patching import Forward

B, T, D, C = 3, 5, 24, 10
EMB = {"emb": (B, D)}
# name -> class, its options, the shapes of what its forward takes (integers for int tensors: values below them)
CASES = {
    "AdaLayerNorm": ("AdaLayerNorm", (D,), {"temb": (D,)}),
    "AdaLayerNorm, timesteps": ("AdaLayerNorm", (D, 5), {"timestep": 5}),
    "AdaLayerNorm, per sample": ("AdaLayerNorm", (C, None, 2 * D, True, 1e-2, 1), {"temb": (B, C)}),
    "AdaLayerNormZero": ("AdaLayerNormZero", (D,), EMB),
    "AdaLayerNormZero, labels": ("AdaLayerNormZero", (D, 10), {"timestep": (B, 7), "class_labels": (B, 9)}),
    "AdaLayerNormZero, fp32": ("AdaLayerNormZero", (D, None, "fp32_layer_norm", False), EMB),
    "AdaLayerNormZeroSingle": ("AdaLayerNormZeroSingle", (D,), EMB),
    "SD35AdaLayerNormZeroX": ("SD35AdaLayerNormZeroX", (D,), EMB),
    "LuminaRMSNormZero": ("LuminaRMSNormZero", (D, 1e-2, True), EMB),
    "AdaLayerNormContinuous": ("AdaLayerNormContinuous", (D, C), {"conditioning_embedding": (B, C)}),
    "AdaLayerNormContinuous, rms": (
        "AdaLayerNormContinuous", (D, C, False, 1e-2, True, "rms_norm"), {"conditioning_embedding": (B, C)},
    ),
    "LuminaLayerNormContinuous": ("LuminaLayerNormContinuous", (D, C), {"conditioning_embedding": (B, C)}),
    "CogVideoXLayerNormZero": ("CogVideoXLayerNormZero", (C, D), {"encoder_hidden_states": (B, 4, D), "temb": (B, C)}),
    "CogView3Plus": ("CogView3PlusAdaLayerNormZeroTextImage", (C, D), {"context": (B, 4, D), "emb": (B, C)}),
    "FP32LayerNorm": ("FP32LayerNorm", (D,), {}),
    "RMSNorm": ("RMSNorm", (D, 1e-2), {}),
    "RMSNorm, bias": ("RMSNorm", (D, 1e-2, True, True), {}),
    "RMSNorm, no weight": ("RMSNorm", (D, 1e-2, False), {}),
    "MochiRMSNorm": ("MochiRMSNorm", (D, 1e-2), {}),
}  # fmt: skip
MODULATED = [name for name in CASES if CASES[name][2]]
DTYPES = {  # of parameters, of x
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp64": (torch.float64, torch.float64),
    "bf16 x": (torch.float32, torch.bfloat16),
    "fp32 x": (torch.bfloat16, torch.float32),
}
PLAIN = [name for name in CASES if not CASES[name][2]]


def make(library, case, dtype=torch.float32):
    """With weights of which none is like another: models begin with zeros and ones."""
    name, options, _ = CASES[case]
    module = getattr(library, name)(*options)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(dtype)


def arguments(case, dtype=torch.float32, x=(B, T, D), x_dtype=None):
    """(x,), the rest by name."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape, dtype):
        if isinstance(shape, int):
            return torch.tensor(shape - 1)
        if len(shape) == 2 and shape[1] < C:
            return torch.arange(shape[0]) % shape[1]
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    args, kwargs = (draw(x, x_dtype or dtype),), {name: draw(shape, dtype) for name, shape in CASES[case][2].items()}
    return args, kwargs | ({"hidden_dtype": dtype} if "class_labels" in kwargs else {})


def results(module, case, given=None, **options):
    """Outputs, and the gradients of inputs and parameters."""
    args, kwargs = given or arguments(case, **options)
    torch.manual_seed(3)
    outputs = tree_leaves(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(2)
    total = sum((o.double() * torch.randn(o.shape, generator=generator).double()).sum() for o in outputs)
    wanting = [t for t in (*args, *kwargs.values(), *module.parameters()) if getattr(t, "requires_grad", False)]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(total, wanting, allow_unused=True))


def patched(module, **options):
    ours = copy.deepcopy(module)
    handle = mk.patch(ours, strict=True, **options)
    assert isinstance(vars(ours)["forward"], Forward) and handle.replaced[0].verified
    return ours


def widened(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_()
    return torch.float64 if isinstance(value, torch.dtype) else value


def seeded(module, args, kwargs):
    """Its outputs; embeddings of labels drop some at random."""
    torch.manual_seed(0)
    return tree_leaves(module(*args, **kwargs))


def operator_calls(module, args, kwargs):
    with Called() as called:
        module(*args, **kwargs)
    return called.names.count("adaln")


def assert_same(found, expected, relative=1e-4, of_largest=1e-5):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            largest = float(b.detach().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a.double(), b.double(), rtol=relative, atol=of_largest * largest)
