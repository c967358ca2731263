"""Llama and Mixtral at a size that two CPU cores train in minutes.

Products are in bfloat16, weights in float32. The weights bear the names that `transformers` gives
them, so saving is a copy. Every layer is two functions of tensors, which `torch.compile` fuses;
attention takes the queries in blocks of 128 and so skips part of the masked half. Weights are
[out, in]; hidden states are [rows, tokens, hidden].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 1024
CONTEXT = 256
HEAD_DIM = 32
THETA = 10000.0
EPSILON = 1e-5
PAD, BOS, EOS = 0, 1, 2
QUERY_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a network; experts is 0 for a dense one."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    experts_per_token: int = 2


DENSE = Shape(hidden=128, ffn=352, layers=5, heads=4, kv_heads=2)
SPARSE = Shape(hidden=96, ffn=192, layers=3, heads=3, kv_heads=1, experts=4)


def normalise(x: Tensor, weight: Tensor) -> Tensor:
    """Return the RMS norm of x, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def attention(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    kv_groups: int,
) -> Tensor:
    """Add causal self-attention to x.

    cos, sin   float32 [tokens, head_dim / 2]
    mask       float32 [tokens, tokens]: 0 where a query may look, -inf elsewhere
    kv_groups  query heads for each key head
    """
    rows, tokens, _ = x.shape
    h = normalise(x, norm).bfloat16()
    c, s = cos[None, :, None], sin[None, :, None]

    def split(weight: Tensor) -> Tensor:
        return F.linear(h, weight.bfloat16()).view(rows, tokens, -1, HEAD_DIM)

    def rotate(t: Tensor) -> Tensor:
        first, second = t.float().chunk(2, -1)
        return torch.cat((first * c - second * s, second * c + first * s), -1).bfloat16()

    def spread(t: Tensor) -> Tensor:
        return t.transpose(1, 2).repeat_interleave(kv_groups, dim=1)

    queries = rotate(split(q)).transpose(1, 2)
    keys, values = spread(rotate(split(k))), spread(split(v))
    mixed = []
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        scores = queries[:, :, start:end] @ keys[:, :, :end].transpose(-1, -2)
        scores = scores.float() * HEAD_DIM**-0.5 + mask[start:end, :end]
        mixed.append(torch.softmax(scores, -1).bfloat16() @ values[:, :, :end])
    heads = torch.cat(mixed, 2).transpose(1, 2).reshape(rows, tokens, -1)
    return x + F.linear(heads, o.bfloat16())


def feed_forward(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Add the gated feed-forward layer to x."""
    h = normalise(x, norm).bfloat16()
    inner = F.silu(F.linear(h, gate.bfloat16())) * F.linear(h, up.bfloat16())
    return x + F.linear(inner, down.bfloat16())


def mixture(
    x: Tensor, norm: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, chosen: int
) -> tuple[Tensor, Tensor]:
    """Add the chosen experts of each token to x; every expert is computed, as they are tiny.

    gate_up  [experts, 2 * ffn, hidden]
    down     [experts, hidden, ffn]
    returns  the new hidden states, and the balance loss, 1 where all experts are used alike
    """
    experts = router.shape[0]
    h = normalise(x, norm).bfloat16().view(-1, x.shape[-1])
    probabilities = torch.softmax(F.linear(h, router.bfloat16()).float(), -1)
    weight, index = probabilities.topk(chosen, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    share = torch.zeros_like(probabilities).scatter(1, index, weight)
    mixed = torch.zeros(h.shape, dtype=x.dtype)
    for expert in range(experts):
        gate, up = F.linear(h, gate_up[expert].bfloat16()).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, down[expert].bfloat16())
        mixed = mixed + out * share[:, expert : expert + 1]
    used = (share > 0).float().mean(0)
    balance = experts * (used * probabilities.mean(0)).sum() / chosen
    return x + mixed.view(x.shape), balance


def cross_entropy(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the targets, in nats; the head is tied."""
    logits = F.linear(normalise(x, norm).bfloat16(), embedding.bfloat16())
    return F.cross_entropy(logits.view(-1, VOCAB).float(), targets.reshape(-1))


class Network:
    """A language model to train.

    weights   float32 leaves that require gradients, by the names of `transformers`
    compiled  fuse the layers; the first loss then takes a while
    """

    def __init__(self, shape: Shape, weights: dict[str, nn.Parameter], *, compiled: bool) -> None:
        self.shape = shape
        self.weights = weights
        angles = torch.outer(
            torch.arange(CONTEXT).float(),
            1 / THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM),
        )
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)

        def ready(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self._attention = ready(attention)
        self._feed_forward = ready(feed_forward)
        self._mixture = ready(mixture)
        self._cross_entropy = ready(cross_entropy)

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss in nats a token, and the balance loss of the experts (0 if dense).

        inputs, targets  int64 [rows, tokens], at most `CONTEXT` tokens
        """
        w, shape = self.weights, self.shape
        tokens = inputs.shape[1]
        cos, sin, mask = self.cos[:tokens], self.sin[:tokens], self.mask[:tokens, :tokens]
        x = F.embedding(inputs, w["model.embed_tokens.weight"])
        balance = torch.zeros(())
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}."
            q, k, v, o = (w[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo")
            norm = w[prefix + "input_layernorm.weight"]
            groups = shape.heads // shape.kv_heads
            x = self._attention(x, norm, q, k, v, o, cos, sin, mask, groups)
            norm = w[prefix + "post_attention_layernorm.weight"]
            if shape.experts:
                router = w[prefix + "mlp.gate.weight"]
                gate_up = w[prefix + "mlp.experts.gate_up_proj"]
                down = w[prefix + "mlp.experts.down_proj"]
                x, uneven = self._mixture(x, norm, router, gate_up, down, shape.experts_per_token)
                balance = balance + uneven / shape.layers
            else:
                gate, up, down = (
                    w[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
                )
                x = self._feed_forward(x, norm, gate, up, down)
        head = w["model.embed_tokens.weight"]
        return self._cross_entropy(x, w["model.norm.weight"], head, targets), balance


def initial(shape: Shape) -> dict[str, nn.Parameter]:
    """Draw new weights: 0.03 wide, those that add to the hidden states less so; norms are ones."""

    def drawn(*sizes: int, width: float = 0.03) -> nn.Parameter:
        return nn.Parameter(torch.randn(*sizes) * width)

    def ones() -> nn.Parameter:
        return nn.Parameter(torch.ones(shape.hidden))

    hidden, ffn, experts = shape.hidden, shape.ffn, shape.experts
    width_in, width_kv = shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
    added = 0.03 / math.sqrt(2 * shape.layers)
    weights = {"model.embed_tokens.weight": drawn(VOCAB, hidden, width=0.05)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = ones()
        weights[prefix + "self_attn.q_proj.weight"] = drawn(width_in, hidden)
        weights[prefix + "self_attn.k_proj.weight"] = drawn(width_kv, hidden)
        weights[prefix + "self_attn.v_proj.weight"] = drawn(width_kv, hidden)
        weights[prefix + "self_attn.o_proj.weight"] = drawn(hidden, width_in, width=added)
        weights[prefix + "post_attention_layernorm.weight"] = ones()
        if experts:
            weights[prefix + "mlp.gate.weight"] = drawn(experts, hidden)
            weights[prefix + "mlp.experts.gate_up_proj"] = drawn(experts, 2 * ffn, hidden)
            weights[prefix + "mlp.experts.down_proj"] = drawn(experts, hidden, ffn, width=added)
        else:
            weights[prefix + "mlp.gate_proj.weight"] = drawn(ffn, hidden)
            weights[prefix + "mlp.up_proj.weight"] = drawn(ffn, hidden)
            weights[prefix + "mlp.down_proj.weight"] = drawn(hidden, ffn, width=added)
    weights["model.norm.weight"] = ones()
    return weights
