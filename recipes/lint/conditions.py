"""What can be the matter with an output, each as a function of it: the words of the rules' tables.

A condition returns the modules that meet it, or the words of the config that do.
"""

from collections.abc import Callable, Iterable, Iterator

from unicomp.kernels.loader_facts import FUSED, VLLM_HALF_WORDS, Fact
from unicomp.kernels.packed import words
from unicomp.recipes.lint.output import HEADS, SPARSE, Output, Stored, numbered

# Cut along the input by tensor parallelism, and along the output; all others are not cut.
BY_COLUMNS = ("o_proj", "down_proj", "w2")
BY_ROWS = tuple(name for names in FUSED for name in names)
FALSE_ORDERS = (None, "weight", "static", False)


def each(wrong: Callable[[Stored], bool]) -> Callable[[Output, int], Iterator[str]]:
    """Return the condition of all packed linears that are `wrong`."""
    return lambda output, _: (one.module for one in output.packed if wrong(one))


def of(fact: Fact) -> Callable[[Output, int], Iterator[str]]:
    """Return the condition of all packed linears of which a fact holds."""
    return each(lambda one: one.scheme is not None and fact.wrong(one.shape, one.scheme))


def version_one(wrong: Callable[[Stored], bool]) -> Callable[[Output, int], Iterator[str]]:
    """Return the condition of all linears that are `wrong` in a file of GPTQ version 1."""

    def met(output: Output, _: int) -> Iterator[str]:
        if output.quantization.get("checkpoint_format", "gptq") == "gptq":
            yield from (one.module for one in output.packed if wrong(one))

    return met


def said(wrong: Callable[[Output], bool], what: str) -> Callable[[Output, int], Iterable[str]]:
    """Return the condition of a config that is `wrong`; `what` names its words."""
    return lambda output, _: (what,) if wrong(output) else ()


def bits(one: Stored, *taken: int) -> bool:
    """Tell whether codes have other bits than those."""
    return one.scheme is not None and one.scheme.bits not in taken


def shifted(one: Stored) -> bool:
    """Tell whether codes have zero points."""
    return one.scheme is not None and not one.scheme.symmetric


def grouped(one: Stored) -> int:
    """Return the columns of a group; 0: a scale is for a whole row."""
    size = -1 if one.scheme is None else one.scheme.group_size
    return 0 if size == -1 else size


def in_blocks(one: Stored) -> bool:
    """Tell whether groups are written as blocks, of which the last may be shorter."""
    return one.way.get("strategy") == "block"


def undivided(one: Stored) -> bool:
    """Tell whether groups, not written as blocks, do not divide the columns."""
    return bool(grouped(one)) and not in_blocks(one) and one.shape[1] % grouped(one) != 0


def half_words(one: Stored) -> bool:
    """Tell whether a row of codes ends within a 32-bit word."""
    return one.scheme is not None and VLLM_HALF_WORDS.wrong(one.shape, one.scheme)


def sparse_words(one: Stored) -> bool:
    """Tell whether words hold whole codes, as before compressed-tensors 0.18."""
    if one.scheme is None or one.codes is None or one.way.get("strategy") == "block":
        return False
    count = 32 // one.scheme.bits
    before, now = -(-one.shape[1] // count), words(one.shape[1], one.scheme.bits)
    return before != now and one.codes[-1] == before


def loose_zero_points(output: Output, _: int) -> Iterator[str]:
    """Yield linears with packed zero points that nothing makes dense at load."""
    if output.quantization.get("dequantize"):
        return
    for one in output.packed:
        zero = output.tensors.get(f"{one.module}.weight_zero_point")
        if zero is not None and zero.dtype == "I32":
            yield one.module


def mixed_dequantized(output: Output, _: int) -> Iterator[str]:
    """Yield linears of another scheme than the first, where all are made dense at load."""
    first = next(output.packed, None)
    if first is not None and output.quantization.get("dequantize"):
        yield from (one.module for one in output.packed if one.scheme != first.scheme)


def packed_conv1d(output: Output, _: int) -> Iterator[str]:
    """Yield packed Conv1D that are not made dense at load."""
    if output.transposed and not output.quantization.get("dequantize"):
        yield from (one.module for one in output.packed)


def any_conv1d(output: Output, _: int) -> Iterator[str]:
    """Yield packed Conv1D."""
    if output.transposed:
        yield from (one.module for one in output.packed)


def tied_head(output: Output, _: int) -> Iterator[str]:
    """Yield a packed head that shares its weight with the embedding."""
    if output.tied:
        yield from (one.module for one in output.packed if one.module in HEADS)


def disagreeing(output: Output, _: int) -> Iterator[str]:
    """Yield linears that are packed and the config says plain, or the other way round."""
    router = "gate"
    for one in output.linears:
        linear = one.packed or one.leaf in (*BY_COLUMNS, *BY_ROWS) or one.module in HEADS
        if linear and one.leaf != router and one.packed != (one.scheme is not None):
            yield one.module


def experts_apart(output: Output, _: int) -> Iterator[str]:
    """Yield packed experts that differ from the first, or of a layer that is not all packed."""
    experts = [one for one in output.linears if one.expert]
    plain = {_layer(one) for one in experts if not one.packed}
    packed = [one for one in experts if one.packed]
    for one in packed:
        if shifted(one) or one.scheme != packed[0].scheme or _layer(one) in plain:
            yield one.module


def plain_experts(output: Output, _: int) -> Iterator[str]:
    """Yield plain experts, one by one on disk, beside packed linears."""
    if any(True for _ in output.packed):
        yield from (one.module for one in output.linears if one.expert and not one.packed)


def stacked_experts(output: Output, _: int) -> Iterator[str]:
    """Yield plain experts that are one 3-D tensor, beside packed linears."""
    if any(True for _ in output.packed):
        yield from (
            name
            for name, tensor in sorted(output.tensors.items(), key=lambda one: numbered(one[0]))
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
            and len(tensor.shape) == 3
        )


def unlike_neighbours(output: Output, _: int) -> Iterator[str]:
    """Yield linears stored otherwise than the first of those that a loader holds as one."""
    first: dict[tuple[str, int], Stored] = {}
    for one in output.linears:
        for number, names in enumerate(FUSED):
            if one.leaf in names:
                # All experts of a layer are held as one, whatever their number.
                place = _layer(one) if one.expert else one.parent
                other = first.setdefault((place, 0 if one.expert else number), one)
                if _stored_as(one) != _stored_as(other):
                    yield one.module


def groups_cut(output: Output, tp: int) -> Iterator[str]:
    """Yield linears of which a process would get a part of a group, or of a word of codes."""
    for one in output.packed:
        if tp > 1 and one.leaf in BY_COLUMNS and not undivided(one):
            columns, rest = divmod(one.shape[1], tp)
            codes = 32 if one.scheme is None else one.scheme.bits
            size = grouped(one)
            if rest or columns * codes % 32 or (size and columns % size):
                yield one.module


def rows_cut(output: Output, tp: int) -> Iterator[str]:
    """Yield linears whose rows the processes do not divide; of k and v, copies may be held."""
    for one in output.linears:
        if one.leaf in BY_ROWS and one.leaf not in ("k_proj", "v_proj") and one.shape[0] % tp:
            yield one.module


def heads_cut(output: Output, tp: int) -> Iterable[str]:
    """Yield the config's word for heads where the processes do not divide them."""
    heads = output.config.get("num_attention_heads", output.config.get("n_head"))
    return ("num_attention_heads",) if isinstance(heads, int) and heads % tp else ()


def ordered(output: Output) -> bool:
    """Tell whether groups follow the order of activations, by compressed-tensors' config."""
    groups = (output.quantization.get("config_groups") or {}).values()
    orders = [(group.get("weights") or {}).get("actorder") for group in groups]
    return any(order not in FALSE_ORDERS for order in orders)


def dropped_sparsity(output: Output) -> bool:
    """Tell whether weights are in a sparse format of compressed-tensors, all of which are gone."""
    sparsity = output.quantization.get("sparsity_config") or {}
    named = [output.quantization.get("format"), sparsity.get("format")]
    groups = (output.quantization.get("config_groups") or {}).values()
    named += [group.get("format") for group in groups]
    marked = any(str(name).startswith(("sparse-", "marlin-24")) for name in named)
    kept = any(name.rpartition(".")[2] in SPARSE for name in output.tensors)
    return marked or kept or bool(sparsity.get("targets"))


def wrong_scale(one: Stored) -> bool:
    """Tell whether a ternary weight's scale is the other class's.

    `bitlinear` divides by the inverse of the mean size of the weights, `autobitlinear` multiplies
    by that mean, which in a language model is far below 1.
    """
    if one.scale is None:
        return False
    divides = one.way.get("linear_class", "bitlinear") == "bitlinear"
    return one.scale < 1 if divides else one.scale > 1


def many_scales(one: Stored) -> bool:
    """Tell whether a ternary weight has another number of scales than one."""
    return one.scales != (1,)


def _layer(one: Stored) -> str:
    return one.module.rpartition(".experts.")[0]


def _stored_as(one: Stored) -> tuple[object, ...]:
    return (one.packed, one.scheme if one.packed else None, in_blocks(one))
