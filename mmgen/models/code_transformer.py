"""A causal transformer over a tokenizer's codes, row by row: VQGAN's second stage (Esser et al. 2021), with keys and values kept.

The distribution of a picture's codes is a product of K-way choices, each given the codes before it; its likelihood is exact.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen.models.dit import position_embedding

ROPE_THETA = 100.0  # a grid is tens of places wide, not thousands


@dataclass(frozen=True)
class CodeTransformerConfig:
    num_codes: int = 512  # K, the tokenizer's codebook_size
    code_dim: int = 8  # d, its codebook_dim
    grid_size: int = 16  # codes along a side
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0

    def __post_init__(self):
        for name in ("num_codes", "code_dim", "grid_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (8 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 8 times num_heads {self.num_heads}, got {self.hidden_size}"
            )

    @property
    def num_tokens(self) -> int:
        """T, the codes of a picture."""
        return self.grid_size**2


class CodeEmbedding(nn.Module):
    """Codes (B, T), row by row, or `num_codes`, which stands for none -> (B, T, D), each with its row and column.

    A code brings a vector of its own and a projection of its place in the codebook; likewise it is chosen, by a logit of its own
    and by the product of its place with what is predicted. So what is learnt of a code holds for those beside it: even the pairs
    of 512 codes are more than a short training sees.
    """

    def __init__(self, config: CodeTransformerConfig):
        super().__init__()
        self.codebook: Tensor
        self.register_buffer("codebook", torch.zeros(config.num_codes + 1, config.code_dim))  # the last stands for none
        self.table = nn.Embedding(config.num_codes + 1, config.hidden_size)
        self.of_code = nn.Linear(config.code_dim, config.hidden_size, bias=False)
        nn.init.normal_(self.table.weight, std=0.02)
        head_dim, side = config.hidden_size // config.num_heads, torch.arange(config.grid_size)
        places = torch.cartesian_prod(side, side)  # (T, 2): row, column
        cos, sin = mk.rope_table(places, (head_dim // 2, head_dim // 2), ROPE_THETA)  # (T, head_dim / 2)
        self.cos: Tensor
        self.sin: Tensor
        self.pos_embed: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("pos_embed", position_embedding(config.hidden_size, config.grid_size), persistent=False)

    def forward(self, codes: Tensor, start: int = 0) -> Tensor:
        """The first of the codes stands at place `start`."""
        each = self.table.weight + self.of_code(self.codebook)  # (K + 1, D)
        return F.embedding(codes, each) + self.pos_embed[start : start + codes.shape[1]]

    def logits(self, output: Tensor) -> Tensor:
        """(B, T, K) of (B, T, K + d): a logit for each code, and the place in the codebook that is looked for."""
        codebook = self.codebook[:-1]  # (K, d)
        own, place = output.split(codebook.shape, dim=2)
        return own + F.linear(place, codebook)

    def look_up_(self, codebook: Tensor) -> None:
        """Takes the places of the codes, (K, d), from a tokenizer."""
        self.codebook[:-1] = codebook.detach()


class Cache:
    """Keys and values (B, T, H, head_dim) of the places seen so far, for each block."""

    def __init__(self, config: CodeTransformerConfig, batch_size: int, like: Tensor):
        shape = (config.depth, 2, batch_size, config.num_tokens, config.num_heads, config.hidden_size // config.num_heads)
        self.store = like.new_empty(shape)
        self.length = 0

    def extended(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a block once those of the new places, (B, t, H, head_dim), are there."""
        end = self.length + k.shape[1]
        keys, values = self.store[block]
        keys[:, self.length : end], values[:, self.length : end] = k, v
        return keys[:, :end], values[:, :end]


class CausalBlock(nn.Module):
    """``x + proj(attention(norm(x)))`` of what came before, and ``x + mlp(norm(x))``."""

    def __init__(self, config: CodeTransformerConfig):
        super().__init__()
        D, M, head_dim = config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.hidden_size // config.num_heads
        self.num_heads = config.num_heads
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.fc1, self.fc2 = nn.Linear(D, M), nn.Linear(M, D)
        of_residual = 1 / math.sqrt(2 * config.depth)  # the residual stream keeps its size however many blocks add to it
        for linear, share in ((self.qkv, 1.0), (self.proj, of_residual), (self.fc1, 1.0), (self.fc2, of_residual)):
            nn.init.normal_(linear.weight, std=0.02 * share)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, block: int) -> Tensor:
        h = mk.adaln(x, None, None, weight=self.ln1.weight, bias=self.ln1.bias, eps=self.ln1.eps)  # (B, T, D)
        q, k, v = self.qkv(h).unflatten(2, (3, self.num_heads, -1)).unbind(2)  # (B, T, H, head_dim), views
        q, k = mk.qk_norm_rope(q, k, q_weight=self.q_norm.weight, k_weight=self.k_norm.weight, cos=cos, sin=sin)
        if cache is not None:
            k, v = cache.extended(block, k, v)
        x = x + self.proj(mk.attention(q, k, v, causal=q.shape[1] > 1).flatten(2))
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return mk.adaln_mlp(x, None, None, None, *weights, weight=self.ln2.weight, bias=self.ln2.bias, eps=self.ln2.eps)


class CodeTransformer(nn.Module):
    """Codes so far -> logits of the next one, at each place.

    Shape:
        codes (B, t), int64, row by row, t <= T. The result is (B, min(t + 1, T), K): logits of place 0 given nothing, of place i
        given codes 0 ... i - 1.

    Raises:
        ValueError: codes have another shape.
    """

    def __init__(self, config: CodeTransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = CodeEmbedding(config)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.num_codes + config.code_dim, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        if codes.dim() != 2 or codes.shape[1] > self.config.num_tokens:
            raise ValueError(f"codes must be (B, t) with t at most {self.config.num_tokens}, got {tuple(codes.shape)}")
        start = codes.new_full((len(codes), 1), self.config.num_codes)
        return self.logits(torch.cat([start, codes], dim=1)[:, : self.config.num_tokens])

    def logits(self, inputs: Tensor, cache: Cache | None = None) -> Tensor:
        """Of the codes that follow `inputs` (B, t): `num_codes` before the first place, then the codes; (B, t, K).

        With a cache the inputs go on where it ends, one by one unless it is empty.
        """
        place = cache.length if cache is not None else 0
        if place and inputs.shape[1] > 1:
            raise ValueError(f"inputs must be (B, 1) once the cache holds places, got {tuple(inputs.shape)}")
        x = self.embedding(inputs, place)  # (B, t, D)
        span = slice(place, place + inputs.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, self.embedding.cos[span], self.embedding.sin[span], cache, i)
        if cache is not None:
            cache.length = span.stop
        x = mk.adaln(x, None, None, weight=self.ln_f.weight, bias=self.ln_f.bias, eps=self.ln_f.eps)
        return self.embedding.logits(self.head(x))

    def nats(self, codes: Tensor) -> Tensor:
        """-log p of pictures (B, T), exact, (B,)."""
        logits = self(codes[:, :-1])  # (B, T, K)
        return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(dim=1)

    @torch.no_grad()
    def sample(self, key: Tensor, *, start: Tensor | None = None, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """One picture for each key, (B, T).

        Sample i depends on its key alone, but for rounding, and not on what is drawn beside it.

        Args:
            key: int64 (B, 2).
            start: (B, t), codes that are given; None is none.
            temperature: divides the logits; 0 takes the likeliest code.
            top_k: only so many likeliest codes may come; None: all.

        Raises:
            ValueError: temperature is negative or top_k not between 1 and K.
        """
        inputs = key.new_full((len(key), 1), self.config.num_codes)
        if start is not None:
            inputs = torch.cat([inputs, start], dim=1)
        drawn, cache = [inputs[:, 1:]], Cache(self.config, len(key), self.head.weight)
        for i in range(inputs.shape[1] - 1, self.config.num_tokens):
            logits = self.logits(inputs, cache)[:, -1]  # (B, K)
            inputs = choice(logits, mk.fold_in(key, i), temperature, top_k)[:, None]
            drawn.append(inputs)
        return torch.cat(drawn, dim=1)


def choice(logits: Tensor, key: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """A code for each row of logits (B, ..., K), by its sample's key (B, 2): the maximum of logits and Gumbel noise; (B, ...).

    A temperature of 0 takes the likeliest code; with top_k only so many likeliest ones may come.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    logits = likeliest(logits, top_k)
    if temperature == 0:
        return logits.argmax(dim=-1)
    uniform = mk.philox_uniform(logits.shape, key, dtype=torch.float64) + 2.0**-33  # the middle of each step: never 0, never 1
    return (logits.double() / temperature - torch.log(-torch.log(uniform))).argmax(dim=-1)


def likeliest(logits: Tensor, top_k: int | None) -> Tensor:
    """Logits (..., K), -inf but for the `top_k` greatest; None: all stay."""
    if top_k is None:
        return logits
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k must be between 1 and {logits.shape[-1]}, the codes, got {top_k}")
    return logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
