"""The experts of a mixture's layer, each with packed weights of its own.

transformers 5 holds a layer's experts as two 3-D parameters and multiplies them by whatever means
suits the device. Packed, they are three linears an expert again, and only those that a token is
sent to are read: what a decode step is made of.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from unicomp.kernels.linear import PackedLinear


class PackedExperts(nn.Module):
    """Gated experts: `down(act(gate(x)) * up(x))`, weighted and summed over those of a token.

    experts  (gate, up, down) of each, in order
    act      the model's activation
    """

    def __init__(
        self,
        experts: Iterable[Sequence[PackedLinear]],
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        gate, up, down = zip(*experts, strict=True)
        self.gate, self.up, self.down = (nn.ModuleList(own) for own in (gate, up, down))
        self.act_fn = act
        self.num_experts = len(self.gate)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum over each token's experts.

        hidden_states  floating [tokens, hidden]
        top_k_index    int64 [tokens, k]; a number beyond the last expert stands for none
        top_k_weights  floating [tokens, k]
        """
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            x = hidden_states[token]
            inner = self.act_fn(self.gate[expert](x)) * self.up[expert](x)
            out = self.down[expert](inner) * top_k_weights[token, place, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total
