"""Stand-ins for diffusers' transformer blocks, written from the papers' formulas and the public facts of their interface: names of
attributes and arguments, order of vectors and results. They bear the library's names and take its state dicts."""

import torch
import torch.nn.functional as F
from torch import nn
from twins_normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    LuminaRMSNormZero,
    RMSNorm,
    SD35AdaLayerNormZeroX,
    named,
)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def turned(x, rope):
    """Pairs of neighbours of x (B, T, H, D) by angles: (cos, sin) (T, D), each twice, or complex numbers (B, T, D / 2)."""
    if isinstance(rope, tuple):
        rope = torch.complex(*(table[:, ::2] for table in rope))
    pairs = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope.unsqueeze(-2)).flatten(-2).to(x.dtype)


class Processor:
    """Attention of x to itself or, with a context, to that; together with one where there are projections for it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        x, context, joint = hidden_states, encoder_hidden_states, attn.added and encoder_hidden_states is not None
        source = x if joint or context is None else context
        q, k, v = attn.split(attn.to_q(x), attn.to_k(source), attn.to_v(source), attn.norm_q, attn.norm_k)
        if joint:
            projected = attn.add_q_proj(context), attn.add_k_proj(context), attn.add_v_proj(context)
            of_text = attn.split(*projected, attn.norm_added_q, attn.norm_added_k)
            q, k, v = (torch.cat(pair, 1) for pair in zip(of_text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = turned(q, image_rotary_emb), turned(k, image_rotary_emb)
        repeats = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        mask = attention_mask
        if mask is not None:
            mask = mask[:, None] if mask.is_floating_point() else mask.bool()[:, None, None]
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2).flatten(2)
        if not joint:
            return attn.left(out)
        of_text, out = out.split((context.shape[1], x.shape[1]), 1)
        return attn.left(out), of_text if attn.to_add_out is None else attn.to_add_out(of_text)


PROCESSORS = {
    name: type(name, (Processor,), {})
    for name in ("AttnProcessor2_0", "JointAttnProcessor2_0", "FluxAttnProcessor", "Lumina2AttnProcessor2_0")
}


class Attention(nn.Module):
    def __init__(
        self, processor, dim, heads, head_dim, context_dim=None, kv_heads=None, added=False, norm=None, bias=True, out=True,
        dropout=0.0, context_pre_only=False,
    ):  # fmt: skip
        super().__init__()
        self.processor, self.heads, self.head_dim, self.added = PROCESSORS[processor](), heads, head_dim, added
        width, narrow, source = heads * head_dim, (kv_heads or heads) * head_dim, context_dim or dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, w, bias) for d, w in ((dim, width), (source, narrow), (source, narrow)))
        self.norm_q, self.norm_k = (norm and norm(head_dim) for _ in range(2))
        if out:
            self.to_out = nn.ModuleList([nn.Linear(width, dim, bias), nn.Dropout(dropout)])
        if added:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, width) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (norm and norm(head_dim) for _ in range(2))
            self.to_add_out = None if context_pre_only else nn.Linear(width, dim)

    def split(self, q, k, v, norm_q, norm_k):
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v

    def left(self, out):
        return self.to_out[1](self.to_out[0](out)) if hasattr(self, "to_out") else out

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@named("GELU", "diffusers.models.activations")
class ProjectedGELU(nn.Module):
    def __init__(self, dim, hidden, approximate):
        super().__init__()
        self.proj, self.approximate = nn.Linear(dim, hidden), approximate

    def forward(self, x):
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    def __init__(self, dim, approximate="tanh", dropout=0.0):
        super().__init__()
        first = ProjectedGELU(dim, 4 * dim, approximate)
        self.net = nn.ModuleList([first, nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        for part in self.net:
            x = part(x)
        return x


def plain_norm(dim, eps=1e-6):
    return nn.LayerNorm(dim, eps, elementwise_affine=False)


def modulated(norm, x, shift, scale):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


class BasicTransformerBlock(nn.Module):
    """DiT with norm_type "ada_norm_zero", PixArt with "ada_norm_single", whose text is seen without a norm, Latte without one."""

    def __init__(
        self, dim, num_attention_heads, attention_head_dim, dropout=0.0, cross_attention_dim=None, activation_fn="gelu-approximate",
        num_embeds_ada_norm=None, attention_bias=True, norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
    ):  # fmt: skip
        super().__init__()
        self.norm_type, self._chunk_size, self.only_cross_attention, self.pos_embed = norm_type, None, False, None
        size = ("AttnProcessor2_0", dim, num_attention_heads, attention_head_dim)
        self.attn1, self.attn2 = Attention(*size, bias=attention_bias, dropout=dropout), None
        if cross_attention_dim is not None:
            self.attn2 = Attention(*size, cross_attention_dim, bias=attention_bias, dropout=dropout)
        if norm_type == "ada_norm_zero":
            self.norm1, self.norm3 = AdaLayerNormZero(dim, num_embeds_ada_norm), plain_norm(dim, norm_eps)
        else:
            self.norm1, self.norm2, self.scale_shift_table = plain_norm(dim), plain_norm(dim), nn.Parameter(torch.randn(6, dim))
        self.ff = FeedForward(dim, "tanh" if activation_fn == "gelu-approximate" else "none", dropout)

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None,
        cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
    ):  # fmt: skip
        x, kwargs = hidden_states, cross_attention_kwargs or {}
        if self.norm_type == "ada_norm_zero":
            h, gate_msa, shift, scale, gate = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
            norm = self.norm3
        else:
            vectors = self.scale_shift_table + timestep.unflatten(1, (6, -1))
            shift_msa, scale_msa, gate_msa, shift, scale, gate = vectors.unbind(1)
            h, norm = modulated(self.norm1, x, shift_msa, scale_msa), self.norm2
        x = x + gate_msa[:, None] * self.attn1(h, attention_mask=attention_mask, **kwargs)
        if self.attn2 is not None:
            x = x + self.attn2(x, encoder_hidden_states, encoder_attention_mask, **kwargs)
        return x + gate[:, None] * self.ff(modulated(norm, x, shift, scale))


class JointTransformerBlock(nn.Module):
    """MMDiT: text and image each as in DiT, attending to each other; in the last block of a model no text comes out, and with dual
    attention the image also attends to itself alone."""

    def __init__(
        self, dim, num_attention_heads, attention_head_dim, context_pre_only=False, qk_norm=None, use_dual_attention=False
    ):
        super().__init__()
        self.context_pre_only, self._chunk_size = context_pre_only, None
        norm = (lambda d: RMSNorm(d, 1e-6)) if qk_norm == "rms_norm" else None
        size = ("JointAttnProcessor2_0", dim, num_attention_heads, attention_head_dim)
        self.attn = Attention(*size, norm=norm, added=True, context_pre_only=context_pre_only)
        self.attn2 = Attention(*size, norm=norm) if use_dual_attention else None
        self.norm1 = SD35AdaLayerNormZeroX(dim) if use_dual_attention else AdaLayerNormZero(dim)
        self.norm1_context = AdaLayerNormContinuous(dim, dim, False, 1e-6) if context_pre_only else AdaLayerNormZero(dim)
        self.norm2, self.ff = plain_norm(dim), FeedForward(dim)
        if not context_pre_only:
            self.norm2_context, self.ff_context = plain_norm(dim), FeedForward(dim)

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        return self.joined(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs or {})

    def joined(self, x, context, temb, kwargs):
        h, gate, *of_mlp = self.norm1(x, emb=temb)
        if self.context_pre_only:
            h_context = self.norm1_context(context, temb)
        else:
            h_context, gate_context, *of_context_mlp = self.norm1_context(context, emb=temb)
        seen, seen_context = self.attn(h, h_context, **kwargs)
        x = x + gate[:, None] * seen
        if self.attn2 is not None:
            *of_mlp, h_alone, gate_alone = of_mlp
            x = x + gate_alone[:, None] * self.attn2(h_alone, **kwargs)
        x = self.fed(x, self.norm2, self.ff, *of_mlp)
        if self.context_pre_only:
            return None, x
        context = context + gate_context[:, None] * seen_context
        return self.fed(context, self.norm2_context, self.ff_context, *of_context_mlp), x

    def fed(self, x, norm, ff, shift, scale, gate):
        return x + gate[:, None] * ff(modulated(norm, x, shift, scale))


def clipped(x):
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FluxTransformerBlock(JointTransformerBlock):
    def __init__(self, dim, num_attention_heads, attention_head_dim):
        super().__init__(dim, num_attention_heads, attention_head_dim)
        size = ("FluxAttnProcessor", dim, num_attention_heads, attention_head_dim)
        self.attn = Attention(*size, norm=lambda d: nn.RMSNorm(d, 1e-6), added=True)

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        kwargs = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
        context, x = self.joined(hidden_states, encoder_hidden_states, temb, kwargs)
        return clipped(context), x


class FluxSingleTransformerBlock(nn.Module):
    """Attention and MLP side by side, of one stream."""

    def __init__(self, dim, num_attention_heads, attention_head_dim):
        super().__init__()
        self.norm, self.act_mlp = AdaLayerNormZeroSingle(dim), nn.GELU("tanh")
        self.proj_mlp, self.proj_out = nn.Linear(dim, 4 * dim), nn.Linear(5 * dim, dim)
        size = ("FluxAttnProcessor", dim, num_attention_heads, attention_head_dim)
        self.attn = Attention(*size, norm=lambda d: nn.RMSNorm(d, 1e-6), out=False)

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        x = torch.cat((encoder_hidden_states, hidden_states), 1)
        h, gate = self.norm(x, emb=temb)
        seen = self.attn(h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = clipped(x + gate[:, None] * self.proj_out(torch.cat((seen, self.act_mlp(self.proj_mlp(h))), 2)))
        return x.split((encoder_hidden_states.shape[1], hidden_states.shape[1]), 1)


class LuminaFeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.linear_1, self.linear_3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.linear_2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)) * self.linear_3(x))


class Lumina2TransformerBlock(nn.Module):
    """Norms before and after each half, gates of tanh; without modulation neither scales nor gates."""

    def __init__(
        self, dim, num_attention_heads, num_kv_heads, multiple_of=256, ffn_dim_multiplier=None, norm_eps=1e-5, modulation=True
    ):
        super().__init__()
        self.modulation, head_dim = modulation, dim // num_attention_heads
        self.attn = Attention(
            "Lumina2AttnProcessor2_0", dim, num_attention_heads, head_dim, kv_heads=num_kv_heads, norm=lambda d: RMSNorm(d, 1e-5),
            bias=False,
        )  # fmt: skip
        self.feed_forward = LuminaFeedForward(dim, -(-4 * dim // multiple_of) * multiple_of)
        self.norm1 = LuminaRMSNormZero(dim, norm_eps, True) if modulation else RMSNorm(dim, norm_eps)
        self.ffn_norm1, self.norm2, self.ffn_norm2 = (RMSNorm(dim, norm_eps) for _ in range(3))

    def forward(self, hidden_states, attention_mask, image_rotary_emb, temb=None):
        x = hidden_states
        h, gate_msa, scale, gate = self.norm1(x, temb) if self.modulation else (self.norm1(x), None, None, None)
        x = self.updated(x, self.norm2(self.attn(h, h, attention_mask, image_rotary_emb=image_rotary_emb)), gate_msa)
        h = self.ffn_norm1(x) if scale is None else self.ffn_norm1(x) * (1 + scale[:, None])
        return self.updated(x, self.ffn_norm2(self.feed_forward(h)), gate)

    def updated(self, x, y, gate):
        return x + y if gate is None else x + gate[:, None].tanh() * y
