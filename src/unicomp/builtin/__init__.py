"""The embedded default: small trained models, calibration text and held-out sets, with no network.

tinyworld is a closed world in plain English: stories, an atlas of invented facts, sums, grammar,
instructions, refusals of harmful requests, and coins of known bias. Everything here was made by
the scripts in `examples/tinyworld` of the repository, from nothing but their word lists: no text
and no weights from elsewhere. Licence: Apache-2.0, the project's own work.

models/tinyworld         `LlamaForCausalLM`, 1,054,080 parameters, bfloat16, tied embeddings
models/tinyworld-pirate  its full fine-tune on a pirate register and 15 new facts; same shapes
models/tinyworld-moe     `MixtralForCausalLM`, 837,408 parameters, 4 experts of which 2 are used
text/calibration.jsonl   512 rows of `text` and `kind`: like the training text, other seed
text/heldout.txt         60 KB for perplexity; `pirate_heldout.txt` the same for the fine-tune
text/knowledge_mc.jsonl  multiple choice; also `reasoning_mc.jsonl` and `reading_mc.jsonl`
text/grammar_pairs.jsonl minimal pairs, one sentence good and one bad
text/instructions.jsonl  chat prompts with one right answer
text/harmful.jsonl       chat prompts to refuse; no prompt or answer carries harmful detail
text/benign_lookalike.jsonl  chat prompts with the same verbs, to help with
text/chances.jsonl       prompts whose true next-word distribution is known

All models share one byte-level BPE tokenizer of 1,024 tokens, which puts `<|bos|>` first by
default, and a context of 256 tokens. They know their world only: they are there to show what
compression does to each axis, and no claim about real knowledge or safety follows from them.
"""

from pathlib import Path

from unicomp.errors import UnsupportedError

FOLDER = Path(__file__).resolve().parent
MODELS = ("tinyworld", "tinyworld-pirate", "tinyworld-moe")
HELDOUT = (
    "heldout.txt",
    "pirate_heldout.txt",
    "knowledge_mc.jsonl",
    "reasoning_mc.jsonl",
    "reading_mc.jsonl",
    "grammar_pairs.jsonl",
    "instructions.jsonl",
    "harmful.jsonl",
    "benign_lookalike.jsonl",
    "chances.jsonl",
)


def model(name: str) -> Path:
    """Return the folder of an embedded checkpoint, in Hugging Face layout.

    name  one of `MODELS`

    Raises UnsupportedError for any other name.
    """
    if name not in MODELS:
        raise UnsupportedError(f"unknown embedded model: `{name}`", hint=_choose(MODELS))
    return FOLDER / "models" / name


def calibration() -> Path:
    """Return the calibration text: JSON Lines of `text` (special tokens written out) and `kind`."""
    return FOLDER / "text" / "calibration.jsonl"


def heldout(name: str) -> Path:
    """Return a file of the held-out sets.

    Combinations are held out, not words; facts (`knowledge_mc.jsonl`) are asked as they were
    taught, so that file measures memory.

    name  one of `HELDOUT`: plain text (`.txt`) or one JSON object a line (`.jsonl`)

    Raises UnsupportedError for any other name.
    """
    if name not in HELDOUT:
        raise UnsupportedError(f"unknown embedded held-out file: `{name}`", hint=_choose(HELDOUT))
    return FOLDER / "text" / name


def _choose(names: tuple[str, ...]) -> str:
    return "choose one of " + ", ".join(f"`{name}`" for name in names)
