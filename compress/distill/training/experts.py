"""Experts of a student as linears of their own, as files name them.

transformers holds the experts of a layer in two three-dimensional parameters. Files have a matrix
for each, packed or pruned on its own, and so they learn: each through its own rounding, its zeros
staying. An expert that no token of a batch chose has a gradient of zeros, so that several
processes, who see other tokens, take one step.
"""

from typing import cast

from torch import nn

from unicomp.compress.calibrate import Experts
from unicomp.errors import UnsupportedError
from unicomp.kernels.dense import DenseSource
from unicomp.models import ARCHITECTURES, describe


def separate(model: nn.Module, source: DenseSource) -> dict[str, str]:
    """Give each expert of a model linears of its own; return name on disk -> parameter's name.

    All tensors of a layer with experts are named; a model without has none.

    Raises UnsupportedError for a checkpoint that has the experts of a layer in one tensor.
    """
    row = ARCHITECTURES.get(str(source.config["model_type"]))
    if row is None or row.experts is None:
        return {}
    found: dict[str, str] = {}
    for layer in describe(source.config, source.tensors).layers:
        routed = [linear for linear in layer.linears() if linear.expert is not None]
        if not routed:
            continue
        stacked = next((own.part.tensor for own in routed if own.part.expert is not None), None)
        if stacked is not None:
            raise UnsupportedError(
                f"cannot train experts of `{source.config['model_type']}`: `{stacked}` holds all "
                "experts of a layer in one tensor",
                hint="quantize it first, symmetric: packed experts have tensors of their own; or "
                "save it with a tensor for each expert",
            )
        root = f"{row.layers}.{layer.index}"
        parent, _, leaf = f"{root}.{row.experts.path}".rpartition(".")
        owner = model.get_submodule(parent)
        count = 1 + max(cast(int, linear.expert) for linear in routed)
        apart = Experts(count, row.experts.names, getattr(owner, leaf).act_fn)
        setattr(owner, leaf, apart)
        for linear in layer.linears():
            path = f"{root}.{linear.inner}"
            found[linear.part.tensor] = f"{path}.weight"
            if linear.expert is not None:
                place = cast(nn.Linear, model.get_submodule(path))
                place.out_features, place.in_features = linear.shape
                place.weight = nn.Parameter(source.read(linear.part.tensor).float())
        found |= {part.tensor: f"{root}.{inner}" for inner, part in layer.others.items()}
    return found
