"""A tokenizer as a GGUF file holds it: tokens, scores, merges and the name of a way of cutting.

llama.cpp has two kinds that matter here. `llama` merges the pair whose joined token scores best,
starting from characters, as SentencePiece does; a tokenizer.json in that style has merges instead,
whose ranks are the order of those scores. `gpt2` is byte-level BPE with merges; before it, text is
cut by regular expressions that the file only names. Which name is right is found by trial: the
tokenizer is run with each known way of cutting, over a text made of what they treat differently.
A name under which one token differs is not written.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from unicomp.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types, as llama.cpp numbers them."""

SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CUTS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "llama-bpe": ((_WORDS + r"\p{N}{1,3}" + _REST,), True),
    "dbrx": ((_WORDS + r"\p{N}{1,3}" + _REST,), False),
    "qwen2": ((_WORDS + r"\p{N}" + _REST,), False),
    "starcoder": ((r"\p{N}", _GPT2), False),
}
"""`tokenizer.ggml.pre` -> expressions that cut one after another; whole tokens go before merges."""

CHECK = (
    "It's we'll WE'RE don't 'tis 'n' rock, she'd I'M they've o'clock '' 'quote'\n"
    "7 42 123 1234 12345 3.14159 1,000,000 2026-11-22 10:30 $5.00 50% #1 a1b2 x10\n"
    "  two   three    four\t\ttabs \n\n\nlines \r\n windows\n  indented:\n\treturn x\n"
    "(a+b)*c/d-e=f != g <= h; [i] {j} k_l m@n.org /path/to http://o.p?q=r&s ... --- !!! ?!\n"
    "na\u00efve \u00c9cole stra\u00dfe \u4f60\u597d\u4e16\u754c "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f600\U0001f680 \u00bd \u0661\u0662\u0663 \u2014 \u201cx\u201d\n"
    "CamelCase snake_case UPPER lower MiXeD end. Once upon a time, the cat sat.  The end.   "
)
"""What the ways of cutting treat differently: contractions, digits, spaces, line ends, scripts."""


@dataclass(frozen=True, slots=True)
class Words:
    """A tokenizer's keys of a GGUF file, and what the reader must hear."""

    fields: dict[str, Any]
    notes: tuple[str, ...]


def describe(tokenizer: Any, folder: Path, vocab: int) -> Words:
    """Return what a GGUF file says of the tokenizer of a checkpoint folder.

    tokenizer  as transformers loads it from there
    vocab      rows of the embedding; ids beyond the tokenizer's are filled with unused tokens

    Raises UnsupportedError for a tokenizer that llama.cpp would cut otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(folder, "it has no `tokenizer.json`")
    data = json.loads(backend.to_str())
    if data["model"].get("type") != "BPE":
        raise _refused(folder, f"its model is {data['model'].get('type')}, not BPE")
    ranks = {token: rank for token, rank in data["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in data.get("added_tokens") or []}
    tokens = [f"[PAD{number}]" for number in range(vocab)]
    types = [UNUSED] * vocab
    for token, number in ranks.items():
        if number < vocab:
            tokens[number], types[number] = token, NORMAL
    for number, entry in added.items():
        if number < vocab:
            tokens[number] = entry["content"]
            types[number] = CONTROL if entry["special"] else USER_DEFINED
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in _merges(data)]
    fields: dict[str, Any]
    notes: list[str] = []
    if data["model"].get("byte_fallback"):
        fields = _pieces(folder, data, tokens, types, merges)
    else:
        fields = _bytes(folder, backend, data, merges, notes)
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    for own, theirs in names.items():
        number = getattr(tokenizer, f"{own}_token_id")
        if number is not None:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = int(number)
            if own == "unk" and data["model"].get("byte_fallback"):
                types[number] = UNKNOWN
    ids = list(tokenizer("a")["input_ids"])
    fields["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    fields["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return Words(fields, tuple(notes))


_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")
"""Tokens that llama.cpp looks up, and ends without, in a file whose name says Phi 3."""


def file_name(name: str, tokens: Collection[str]) -> tuple[str, str | None]:
    """Return `general.name` for a model, and what the reader must hear where it is not `name`.

    llama.cpp knows what strips spaces in Phi 3 by `phi-3` or `phi3` in that name alone, and ends
    with an exception where one of its tokens is not there.
    """
    missing = [token for token in _PHI3 if token not in tokens]
    plain = re.sub(r"phi-?3", "phi 3", name, flags=re.IGNORECASE)
    if plain == name or not missing:
        return name, None
    return plain, (
        f"the file names the model `{plain}`: of one that is named Phi-3 llama.cpp wants the "
        f"tokens {', '.join(f'`{token}`' for token in missing)}, which this one has not"
    )


def _merges(data: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = data["model"].get("merges") or []
    return found


def _pieces(
    folder: Path,
    data: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    merges: list[tuple[str, ...]],
) -> dict[str, Any]:
    """Return the keys of a tokenizer in SentencePiece's style; a score is minus a merge's rank."""
    if data.get("pre_tokenizer") not in (None, {}) and "Metaspace" not in str(
        data["pre_tokenizer"]
    ):
        raise _refused(folder, "it cuts text before it merges")
    best: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        best.setdefault(left + right, rank)
    scores = [-float(best[token]) if token in best else -1e6 for token in tokens]
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and types[number] == NORMAL:
            types[number] = BYTE
    shown = json.dumps(data.get("normalizer")) + json.dumps(data.get("pre_tokenizer"))
    prefix = '"Prepend"' in shown or '"prepend_scheme": "first"' in shown
    prefix = prefix or '"prepend_scheme": "always"' in shown
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _bytes(
    folder: Path,
    backend: Tokenizer,
    data: Mapping[str, Any],
    merges: list[tuple[str, ...]],
    notes: list[str],
) -> dict[str, Any]:
    """Return the keys of a byte-level tokenizer, with a name whose cuts give the same tokens."""
    if "ByteLevel" not in json.dumps(data.get("pre_tokenizer")):
        raise _refused(folder, "it is neither byte-level nor has tokens for bytes")
    normal = data.get("normalizer")
    if normal is not None and normal.get("type") != "NFC":
        raise _refused(folder, f"its normalizer {normal.get('type')} is not llama.cpp's")
    if normal is not None:
        notes.append("llama.cpp does not compose accents (NFC): give it composed text")
    whole = bool(data["model"].get("ignore_merges"))
    wanted = [backend.encode(line, add_special_tokens=False).ids for line in _check()]
    trial = Tokenizer.from_str(backend.to_str())
    alike = []
    for cut, (expressions, direct) in CUTS.items():
        trial.pre_tokenizer = _cutter(expressions)
        given = [trial.encode(line, add_special_tokens=False).ids for line in _check()]
        if direct == whole and given == wanted:
            alike.append(cut)
    if not alike:
        raise _refused(
            folder, f"no way of cutting that llama.cpp has ({', '.join(CUTS)}) gives its tokens"
        )
    name = alike[0]
    regexes = [
        part["pattern"].get("Regex")
        for part in (data["pre_tokenizer"].get("pretokenizers") or [data["pre_tokenizer"]])
        if part.get("type") == "Split"
    ]
    if regexes and tuple(regexes) != CUTS[name][0]:
        notes.append(
            f"llama.cpp cuts text as `{name}` does: it has no other name for this tokenizer, and "
            f"{len(CHECK)} characters of differing cases gave the same tokens"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _check() -> list[str]:
    return [CHECK, *CHECK.splitlines(), *CHECK.split(" ")]


def _cutter(expressions: tuple[str, ...]) -> Any:
    splits: list[Any] = [pre_tokenizers.Split(Regex(own), "isolated") for own in expressions]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(splits)


def rebuild(fields: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer that a GGUF file describes into a checkpoint folder.

    Raises UnsupportedError for a kind or a way of cutting that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type") or []
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError("gguf: the file has no tokenizer", hint="make it again with one")
    if kind == "gpt2":
        built = _byte_level(fields, tokens)
    elif kind == "llama":
        built = _sentence_pieces(fields, tokens)
    else:
        raise UnsupportedError(
            f"gguf: tokenizer `{kind}` is not read yet", hint="`gpt2` and `llama` are"
        )
    special = [
        AddedToken(token, special=own != USER_DEFINED, normalized=False)
        for token, own in zip(tokens, types, strict=False)
        if own in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    built.add_tokens(special)
    names = {}
    for own, theirs in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        number = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None and number < len(tokens):
            names[f"{own}_token"] = tokens[number]
    first = fields.get("tokenizer.ggml.add_bos_token", kind == "llama")
    if first and "bos_token" in names:
        number = fields["tokenizer.ggml.bos_token_id"]
        built.post_processor = processors.TemplateProcessing(
            single=f"{names['bos_token']} $A",
            pair=f"{names['bos_token']} $A {names['bos_token']} $B",
            special_tokens=[(names["bos_token"], number)],
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=built, **names)
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        fast.chat_template = template
    fast.save_pretrained(folder)


def _byte_level(fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    name = fields.get("tokenizer.ggml.pre")
    if name not in CUTS:
        raise UnsupportedError(
            f"gguf: a tokenizer that cuts text as `{name}` is not read yet",
            hint=f"these are: {', '.join(CUTS)}",
        )
    expressions, whole = CUTS[str(name)]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    vocab = {token: number for number, token in enumerate(tokens)}
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    built.pre_tokenizer = _cutter(expressions)
    built.decoder = decoders.ByteLevel()
    return built


def _sentence_pieces(fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    vocab = {token: number for number, token in enumerate(tokens)}
    ranked = []
    for token, number in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[number], vocab[left], vocab[right], (left, right)))
    merges = [pair for *_, pair in sorted(ranked)]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    built = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
        ends.append(decoders.Strip(content=" ", left=1, right=0))
    built.normalizer = normalizers.Sequence(steps)
    built.decoder = decoders.Sequence(ends)
    return built


def _refused(folder: Path, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"gguf: the tokenizer of `{folder.name}` cannot be written: {why}",
        hint="llama.cpp would read text otherwise; use `--format compressed-tensors`",
    )
