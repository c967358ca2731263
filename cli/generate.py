"""`unicomp generate`: let a checkpoint go on from a prompt."""

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicomp.cli import show
from unicomp.cli.options import Json, Model, Quiet
from unicomp.errors import UnicompError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from unicomp.kernels.packed_model import Loaded

Prompt = Annotated[str, typer.Option("--prompt", metavar="S", help="What to go on from.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
]
NewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        min=1,
        metavar="N",
        show_default=False,
        help="Most tokens. Default: 128.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0,
        metavar="F",
        show_default=False,
        help="0: always the likeliest token; above: draw, the flatter the higher. Default: 0.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, metavar="N", show_default=False, help="Seed of the draws. Default: 0."
    ),
]

Compute = Annotated[
    str,
    typer.Option(
        "--compute",
        metavar="int8|exact",
        show_default=False,
        help="How packed weights multiply: with activations rounded to int8, or as they are. "
        "Default: int8.",
    ),
]


Delta = Annotated[
    Path | None,
    typer.Option(
        "--delta",
        metavar="DIR",
        help="A fine-tune of MODEL to put on top: a folder that `delta compress` made.",
    ),
]


def generate(
    model: Model,
    prompt: Prompt,
    chat: Chat = False,
    delta: Delta = None,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    compute: Compute = "int8",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text with a plain or quantized model, as it comes.

    Quantized linears run packed, as they lie on disk; see `unicomp bench model`.

    Example: unicomp generate builtin:tinyworld --chat --prompt "What is the opposite of hot?"
    """
    import torch

    from unicomp import text
    from unicomp.hub import resolve

    source = resolve(model)
    tokenizer = text.tokenizer(source.folder if delta is None else delta)
    ids = _encode(tokenizer, prompt, chat)
    network, how = load_packed(model, compute, delta)
    room = _room(network.config, ids, max_new_tokens)
    torch.manual_seed(seed)
    began = time.monotonic()
    words: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        words = {"do_sample": True, "temperature": temperature}
    with torch.inference_mode():
        output = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            pad_token_id=tokenizer.eos_token_id,
            streamer=None if json else _streamer(tokenizer),
            **words,
        )
    seconds = time.monotonic() - began
    made = output[0, ids.shape[1] :]
    if json:
        result = {
            "schema": "unicomp.generation/1",
            "id": source.id,
            "delta": None if delta is None else delta.name,
            "prompt": prompt,
            "text": tokenizer.decode(made, skip_special_tokens=True),
            "prompt_tokens": ids.shape[1],
            "tokens": len(made),
            "seconds": seconds,
            "loaded": how.to_json(),
        }
        show.json(result)
    else:
        show.note(f"{len(made)} tokens, {len(made) / max(seconds, 1e-9):.1f} tokens/s")


def load_packed(model: str, compute: str, delta: Path | None = None) -> tuple[Any, "Loaded"]:
    """Load a model to run, say on stderr what is slow or dense, and return it with how.

    compute  `int8` or `exact`
    delta    a fine-tune of it to put on top
    """
    from unicomp.kernels.backend import MissingKernelWarning
    from unicomp.kernels.deltas import load_deltas
    from unicomp.kernels.packed_model import load, loaded

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingKernelWarning)  # said below, in our words
        network: Any
        if delta is None:
            network = load(model, compute=compute)  # type: ignore[arg-type]
        else:
            network = load_deltas(model, [delta], compute=compute)  # type: ignore[arg-type]
    how = loaded(network)
    if how.missing is not None:
        show.note(f"note: packed weights are multiplied by torch, slowly: {how.missing}")
    for reason, count in how.dequantized.items():
        show.note(f"note: {count} quantized weights run dense: {reason}")
    return network, how


def _encode(tokenizer: Any, prompt: str, chat: bool) -> "Tensor":
    """Return int64 [1, tokens]."""
    if chat and not tokenizer.chat_template:
        raise UnsupportedError(
            "this model's tokenizer has no chat template", hint="leave out `--chat`"
        )
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    ids: Tensor = encoded["input_ids"]
    if not ids.numel():
        raise UnicompError("the prompt is empty", hint="give at least one word with `--prompt`")
    return ids.long()


def _room(config: Any, ids: "Tensor", wanted: int) -> int:
    """Return how many tokens still fit the model's context, at most those wanted."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return wanted
    room = int(context) - ids.shape[1]
    if room < 1:
        raise UnicompError(
            f"the prompt has {ids.shape[1]} tokens, but the model's context is {context}",
            hint="give a shorter prompt",
        )
    if room < wanted:
        show.note(f"note: only {room} of {wanted} tokens fit the model's context of {context}")
    return min(room, wanted)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show.text(text, end="\n" if stream_end else "")

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
