"""What a model makes of its last hidden states: the final norm, the head, the loss.

The head is read a piece of the vocabulary at a time, so that a large one needs little memory.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from unicomp.compress.calibrate import Weights
from unicomp.compress.counted import PIECE
from unicomp.models import Model


class Readout:
    """The final norm and the head of a model.

    head  name of the tensor that makes logits: the head's, or the embedding's where it is tied
    """

    def __init__(self, model: Model, config: Mapping[str, Any], weights: Weights) -> None:
        """Load the norm; the head stays on disk."""
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        settings = CONFIG_MAPPING[model.type].from_dict(dict(config))
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        self._weights = weights
        self._softcap = config.get("final_logit_softcapping")
        paths = set()
        outside = model.architecture.layers + "."
        for name, canonical in model.names.items():
            path, _, leaf = canonical.rpartition(".")
            final = "norm" in path or path.endswith("ln_f")
            if canonical.startswith(outside) or not final:
                continue
            paths.add(path)
            value = weights.read(name).float()
            owner = skeleton.get_submodule(path)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        [path] = paths
        self._norm = skeleton.get_submodule(path)
        words = {role: name for name, role in model.roles.items() if name.endswith("weight")}
        tables = [
            name
            for name, canonical in model.names.items()
            if model.roles[name] == "embedding" and _is_table(canonical)
        ]
        self.head = tables[0] if model.tied else words["head"]
        self.vocab = skeleton.config.vocab_size

    @torch.no_grad()
    def norm(self, states: Tensor) -> Tensor:
        """Return what the head reads, float32."""
        return cast(Tensor, self._norm(states.float()))

    def pieces(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the head's rows in pieces, float32 [rows, hidden]."""
        step = max(1, PIECE // width)
        for start in range(0, self.vocab, step):
            rows = slice(start, min(start + step, self.vocab))
            yield rows, self._weights.read(self.head, rows).float()

    def logits(self, seen: Tensor, rows: Tensor) -> Tensor:
        """Return what rows of the head [rows, hidden] make of normed states [tokens, hidden]."""
        logits = seen @ rows.T
        return self._softcap * torch.tanh(logits / self._softcap) if self._softcap else logits

    @torch.no_grad()
    def loss(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of every next token, in nats: [windows, seq_len - 1].

        states  last hidden states [windows, seq_len, hidden]
        ids     int64 [windows, seq_len]
        """
        seen = self.norm(states)[:, :-1].flatten(0, 1)
        wanted = ids[:, 1:].flatten()
        total = torch.full((len(seen),), -torch.inf)
        own = torch.zeros(len(seen))
        for rows, weight in self.pieces(seen.shape[1]):
            for part in torch.arange(len(seen)).split(max(1, PIECE // len(weight))):
                logits = self.logits(seen[part], weight)
                total[part] = torch.logaddexp(total[part], logits.logsumexp(-1))
                at = wanted[part] - rows.start
                inside = (at >= 0) & (at < len(weight))
                found = logits.gather(1, at.clamp(0, len(weight) - 1)[:, None])[:, 0]
                own[part] = torch.where(inside, found, own[part])
        return (total - own).view(len(ids), -1)


def _is_table(name: str) -> bool:
    return not any(word in name for word in ("position", "wpe"))
