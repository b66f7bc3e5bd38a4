"""Stand-ins for diffusers' normalization layers, written from the formulas of their papers and the public facts of their
interface: names of attributes and arguments, order of the vectors and of the results. They bear the library's names."""

import torch
import torch.nn.functional as F
from torch import nn

FILE = "diffusers.models.normalization"


def named(name, module=FILE):
    def rename(cls):
        cls.__name__ = cls.__qualname__ = name
        cls.__module__ = module
        return cls

    return rename


def modulate(n, scale, shift=0):
    """Perez et al. 2017, with a vector (B, D) for each sample."""
    return n * (1 + scale.unsqueeze(1)) + (shift if isinstance(shift, int) else shift.unsqueeze(1))


def over_mean_square(x, eps):
    """Zhang and Sennrich 2019, the mean square in fp32."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


@named("FP32LayerNorm")
class FP32LayerNorm(nn.LayerNorm):
    def forward(self, inputs):
        affine = [None if p is None else p.float() for p in (self.weight, self.bias)]
        return F.layer_norm(inputs.float(), self.normalized_shape, *affine, self.eps).to(inputs.dtype)


class MeanSquareNorm(nn.Module):
    def __init__(self, dim, eps, elementwise_affine=True, bias=False):
        super().__init__()
        self.eps, self.elementwise_affine, self.dim = eps, elementwise_affine, torch.Size((dim,))
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine and bias else None


@named("RMSNorm")
class RMSNorm(MeanSquareNorm):
    """Where there is a weight, it decides on the dtype: a half one by rounding what comes before it, others by promotion."""

    def forward(self, hidden_states):
        n = over_mean_square(hidden_states, self.eps)
        if self.weight is None:
            return n.to(hidden_states.dtype)
        n = (n.to(self.weight.dtype) if self.weight.dtype.itemsize == 2 else n) * self.weight
        return n if self.bias is None else n + self.bias


@named("MochiRMSNorm")
class MochiRMSNorm(MeanSquareNorm):
    """With x's dtype in every case."""

    def forward(self, hidden_states):
        n = over_mean_square(hidden_states, self.eps)
        return (n if self.weight is None else n * self.weight).to(hidden_states.dtype)


class Conditioned(nn.Module):
    """linear(silu(conditioning)), in parts."""

    def __init__(self, cond_dim, width, bias=True):
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(cond_dim, width, bias=bias)

    def parts(self, cond, count, dim=1):
        return self.linear(self.silu(cond)).chunk(count, dim)


@named("AdaLayerNorm")
class AdaLayerNorm(Conditioned):
    """Of one timestep: scale, shift; with chunk_dim 1, of a timestep per sample: shift, scale."""

    def __init__(
        self, embedding_dim, num_embeddings=None, output_dim=None, norm_elementwise_affine=False, norm_eps=1e-5, chunk_dim=0
    ):
        width = output_dim or 2 * embedding_dim
        super().__init__(embedding_dim, width)
        self.chunk_dim = chunk_dim
        self.emb = None if num_embeddings is None else nn.Embedding(num_embeddings, embedding_dim)
        self.norm = nn.LayerNorm(width // 2, norm_eps, norm_elementwise_affine)

    def forward(self, x, timestep=None, temb=None):
        first, second = self.parts(temb if self.emb is None else self.emb(timestep), 2, self.chunk_dim)
        if self.chunk_dim == 1:
            return modulate(self.norm(x), second, first)
        return self.norm(x) * (1 + first) + second


class TimeAndLabel(nn.Module):
    """Stands for the embedding of timestep and label, with its random loss of labels in training."""

    def __init__(self, dim):
        super().__init__()
        self.labels, self.rates = nn.Embedding(11, dim), nn.Parameter(torch.randn(dim))

    def forward(self, timestep, class_labels, hidden_dtype=None):
        kept = torch.rand(len(class_labels)) > 0.1 if self.training else torch.ones(len(class_labels), dtype=torch.bool)
        labels = self.labels(class_labels.where(kept, 10))
        return ((timestep[:, None] * self.rates).cos() + labels).to(hidden_dtype or labels.dtype)


@named("AdaLayerNormZero")
class AdaLayerNormZero(Conditioned):
    def __init__(self, embedding_dim, num_embeddings=None, norm_type="layer_norm", bias=True):
        super().__init__(embedding_dim, 6 * embedding_dim, bias)
        self.emb = None if num_embeddings is None else TimeAndLabel(embedding_dim)
        layer_norm = norm_type == "layer_norm"
        self.norm = nn.LayerNorm(embedding_dim, 1e-6, False) if layer_norm else FP32LayerNorm(embedding_dim, 1e-5, False)

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        emb = emb if self.emb is None else self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.parts(emb, 6)
        return modulate(self.norm(x), scale, shift), *others


@named("AdaLayerNormZeroSingle")
class AdaLayerNormZeroSingle(Conditioned):
    def __init__(self, embedding_dim):
        super().__init__(embedding_dim, 3 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, 1e-6, False)

    def forward(self, x, emb=None):
        shift, scale, gate = self.parts(emb, 3)
        return modulate(self.norm(x), scale, shift), gate


@named("SD35AdaLayerNormZeroX")
class SD35AdaLayerNormZeroX(Conditioned):
    """Two modulated outputs of one norm, for two attentions."""

    def __init__(self, embedding_dim):
        super().__init__(embedding_dim, 9 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, 1e-6, False)

    def forward(self, hidden_states, emb=None):
        v, n = self.parts(emb, 9), self.norm(hidden_states)
        return modulate(n, v[1], v[0]), *v[2:6], modulate(n, v[7], v[6]), v[8]


@named("LuminaRMSNormZero")
class LuminaRMSNormZero(Conditioned):
    def __init__(self, embedding_dim, norm_eps, norm_elementwise_affine):
        super().__init__(min(embedding_dim, 1024), 4 * embedding_dim)
        self.norm = RMSNorm(embedding_dim, norm_eps)

    def forward(self, x, emb=None):
        scale, *others = self.parts(emb, 4)
        return modulate(self.norm(x), scale), *others


def norm_by_name(name, dim, eps, affine):
    return nn.LayerNorm(dim, eps, affine) if name == "layer_norm" else RMSNorm(dim, eps, affine)


@named("AdaLayerNormContinuous")
class AdaLayerNormContinuous(Conditioned):
    def __init__(
        self, embedding_dim, conditioning_embedding_dim, elementwise_affine=True, eps=1e-5, bias=True, norm_type="layer_norm"
    ):
        super().__init__(conditioning_embedding_dim, 2 * embedding_dim, bias)
        self.norm = norm_by_name(norm_type, embedding_dim, eps, elementwise_affine)

    def forward(self, x, conditioning_embedding):
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, 1)
        return modulate(self.norm(x), scale, shift)


@named("LuminaLayerNormContinuous")
class LuminaLayerNormContinuous(nn.Module):
    def __init__(
        self, embedding_dim, conditioning_embedding_dim, elementwise_affine=True, eps=1e-5, norm_type="layer_norm", out_dim=None
    ):
        super().__init__()
        self.silu, self.linear_1 = nn.SiLU(), nn.Linear(conditioning_embedding_dim, embedding_dim)
        self.norm = norm_by_name(norm_type, embedding_dim, eps, elementwise_affine)
        self.linear_2 = None if out_dim is None else nn.Linear(embedding_dim, out_dim)

    def forward(self, x, conditioning_embedding):
        x = modulate(self.norm(x), self.linear_1(self.silu(conditioning_embedding).to(x.dtype)))
        return x if self.linear_2 is None else self.linear_2(x)


@named("CogVideoXLayerNormZero")
class CogVideoXLayerNormZero(Conditioned):
    """One affine norm for video and text; the gates come as (B, 1, D)."""

    def __init__(self, conditioning_dim, embedding_dim, elementwise_affine=True, eps=1e-5):
        super().__init__(conditioning_dim, 6 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, eps, elementwise_affine)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        v = self.parts(temb, 6)
        video, text = modulate(self.norm(hidden_states), v[1], v[0]), modulate(self.norm(encoder_hidden_states), v[4], v[3])
        return video, text, v[2].unsqueeze(1), v[5].unsqueeze(1)


@named("CogView3PlusAdaLayerNormZeroTextImage")
class CogView3PlusAdaLayerNormZeroTextImage(Conditioned):
    def __init__(self, embedding_dim, dim):
        super().__init__(embedding_dim, 12 * dim)
        self.norm_x, self.norm_c = nn.LayerNorm(dim, 1e-5, False), nn.LayerNorm(dim, 1e-5, False)

    def forward(self, x, context, emb=None):
        v = self.parts(emb, 12)
        return modulate(self.norm_x(x), v[1], v[0]), *v[2:6], modulate(self.norm_c(context), v[7], v[6]), *v[8:]
