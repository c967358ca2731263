"""`unicomp inspect`: what a checkpoint holds, from its headers only."""

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

from unicomp import size
from unicomp.cli import show
from unicomp.cli.options import Json, Model, Quiet
from unicomp.cli.plan import scheme_words, unnumbered

if TYPE_CHECKING:
    from unicomp.checkpoint import Checkpoint
    from unicomp.kernels.inventory import Inventory, Weight


def inspect_checkpoint(model: Model, json: Json = False, quiet: Quiet = False) -> None:
    """Show what a checkpoint holds: weights by kind, bytes, codes.

    Example: unicomp inspect builtin:tinyworld
    """
    from unicomp.checkpoint import Checkpoint
    from unicomp.hub import resolve
    from unicomp.kernels.inventory import take

    source = resolve(model)
    checkpoint = Checkpoint.open(source.folder)
    found = take(checkpoint)
    if json:
        name = {"schema": "unicomp.inspect/1", "id": source.id, "revision": source.revision}
        show.json(name | _values(checkpoint, found))
    else:
        _show(source.id, checkpoint, found)


def _values(checkpoint: "Checkpoint", found: "Inventory") -> dict[str, Any]:
    """Return everything that is found as plain JSON values."""
    return {
        "model_type": checkpoint.config["model_type"],
        "architectures": checkpoint.config.get("architectures") or [],
        "shards": _shards(checkpoint),
        "params": found.params,
        "bytes": found.bytes,
        "bits_per_weight": 8 * found.bytes / found.params if found.params else None,
        "tied_head": found.tied,
        "quantization": found.quantization,
        "weights": [
            {
                "name": weight.name,
                "kind": weight.kind,
                "shape": list(weight.shape),
                "bits": weight.scheme.bits if weight.scheme else None,
                "group_size": weight.scheme.group_size if weight.scheme else None,
                "symmetric": weight.scheme.symmetric if weight.scheme else None,
                "dtypes": list(weight.dtypes),
                "bytes": weight.bytes,
            }
            for weight in found.weights
        ],
    }


def _show(name: str, checkpoint: "Checkpoint", found: "Inventory") -> None:
    config, shards = checkpoint.config, _shards(checkpoint)
    facts = [
        ("architecture", ", ".join([config["model_type"], *(config.get("architectures") or [])])),
        ("parameters", "unknown" if found.params is None else f"{found.params:,}"),
        ("bytes", f"{size.show(found.bytes)} in {len(checkpoint.tensors)} tensors"),
        ("shards", ", ".join(f"{shard} ({size.show(n)})" for shard, n in shards.items())),
        ("quantization", _quantization(found)),
    ]
    if found.params:
        facts.insert(2, ("bits per weight", f"{8 * found.bytes / found.params:.3f}"))
    if found.tied is not None:
        facts.append(("head", "shares the embedding's weight" if found.tied else "its own"))
    for key in ("vocab_size", "max_position_embeddings"):
        if key in config:
            facts.append((key, str(config[key])))
    show.text(name)
    show.facts(facts)
    for title, rows in (("by kind", _by_kind(found)), ("by module", _by_module(found))):
        show.text("")
        show.table(None, (title, "count", "shape", "stored as", "parameters", "bytes"), rows)


def _quantization(found: "Inventory") -> str:
    if found.quantization is None:
        return "none"
    counts = Counter(scheme_words(w.scheme) for w in found.weights if w.scheme is not None)
    schemes = ", ".join(f"{count} weights of {words}" for words, count in counts.items())
    if not schemes:
        schemes = "read as plain weights" if found.params else "not one that unicomp reads"
    return f"{found.quantization}: {schemes}"


def _shards(checkpoint: "Checkpoint") -> dict[str, int]:
    return {name: (checkpoint.folder / name).stat().st_size for name in checkpoint.shards}


def _by_kind(found: "Inventory") -> list[tuple[object, ...]]:
    groups: dict[str, list[Weight]] = {}
    for weight in found.weights:
        groups.setdefault(weight.kind, []).append(weight)
    return [_row(kind, None, weights) for kind, weights in groups.items()]


def _by_module(found: "Inventory") -> list[tuple[object, ...]]:
    groups: dict[tuple[str, tuple[int, ...], str], list[Weight]] = {}
    for weight in found.weights:
        groups.setdefault((unnumbered(weight.name), weight.shape, _how(weight)), []).append(weight)
    return [_row(name, shape, weights) for (name, shape, _), weights in groups.items()]


def _row(name: str, shape: tuple[int, ...] | None, weights: "list[Weight]") -> tuple[object, ...]:
    return (
        name,
        len(weights),
        "" if shape is None else "x".join(map(str, shape)),
        "; ".join(dict.fromkeys(map(_how, weights))),
        sum(prod(weight.shape) for weight in weights),
        size.show(sum(weight.bytes for weight in weights)),
    )


def _how(weight: "Weight") -> str:
    return "+".join(weight.dtypes) if weight.scheme is None else scheme_words(weight.scheme)
