"""`unicomp bench`: how fast a model, or one product, runs on this machine."""

import re
import warnings
from typing import Annotated, Any

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.generate import Compute
from unicomp.cli.options import Json, Model, Quiet
from unicomp.errors import UnicompError

app = typer.Typer(
    name="bench",
    help="Measure the speed of a model, or of single products.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=256,
        metavar="N",
        show_default=False,
        help="Threads to compute on. Default: as many as torch uses.",
    ),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds",
        min=1,
        metavar="N",
        show_default=False,
        help="Times to measure each; the median and the range are shown. Default: 5.",
    ),
]
PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        min=1,
        metavar="N",
        show_default=False,
        help="Random tokens to begin with. Default: 128.",
    ),
]
NewTokens = Annotated[
    int,
    typer.Option(
        "--new-tokens",
        min=2,
        metavar="N",
        show_default=False,
        help="Tokens to generate after them. Default: 32.",
    ),
]
Shapes = Annotated[
    str,
    typer.Option(
        "--shapes",
        metavar="OUTxIN,...",
        show_default=False,
        help="Sizes of weights. Default: 4096x4096,14336x4096,4096x14336.",
    ),
]
Kinds = Annotated[
    str,
    typer.Option(
        "--kinds",
        metavar="KIND,...",
        show_default=False,
        help="Of int8, int4, int2, trit5 (1.6 bits a weight). Default: all.",
    ),
]
Tokens = Annotated[
    str,
    typer.Option(
        "--tokens",
        metavar="N,...",
        show_default=False,
        help="Tokens multiplied at once. Default: 1,16.",
    ),
]


@app.command("model")
def model(
    model: Model,
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 32,
    rounds: Rounds = 5,
    threads: Threads = None,
    compute: Compute = "int8",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure prefill and decode in tokens per second, loading, memory, and GB/s of weights.

    Example: unicomp bench model builtin:tinyworld --rounds 3
    """
    from unicomp.evaluate.cost import speed
    from unicomp.kernels.backend import MissingKernelWarning
    from unicomp.recipes.stage.progress import Progress

    with show.progress() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingKernelWarning)  # the result says it
        found = speed.model(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            compute=compute,  # type: ignore[arg-type]
            progress=lambda done, total: progress(Progress("bench", done, total, "rounds")),
        )
    if json:
        show.json(found)
        return
    how, memory = found["loaded"], found["peak_rss_bytes"]
    show.facts(
        [
            ("prefill", f"{_spread(found['prefill_tokens_per_s'])} tokens/s"),
            ("decode", f"{_spread(found['decode_tokens_per_s'])} tokens/s"),
            (
                "weights read",
                f"{found['decode_gb_per_s']:.3g} GB/s in decode, {found['share_of_read']:.0%} of "
                f"a plain read, {_spread(found['read']['gb_per_s'])} GB/s",
            ),
            ("loading", f"{how['seconds']:.1f}s"),
            ("peak memory", f"{size.show(memory['run'])}, {size.show(memory['load'])} to load"),
            ("packed", f"{how['packed']} linears, {size.show(how['packed_bytes'])}"),
            ("dense", ", ".join(f"{n}: {why}" for why, n in how["dequantized"].items()) or "none"),
            ("runs on", _runs_on(how["backend"], how["isa"], how["missing"], found["threads"])),
        ]
    )


@app.command("kernels")
def kernels(
    shapes: Shapes = "4096x4096,14336x4096,4096x14336",
    kinds: Kinds = "int8,int4,int2,trit5",
    tokens: Tokens = "1,16",
    rounds: Rounds = 5,
    threads: Threads = None,
    compute: Compute = "int8",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure products with random packed weights that come from memory, in GB/s and GFLOP/s.

    Example: unicomp bench kernels --shapes 256x1024 --kinds int4 --rounds 2
    """
    from unicomp.evaluate.cost import speed
    from unicomp.kernels.backend import MissingKernelWarning
    from unicomp.recipes.stage.progress import Progress

    wanted = [_shape(word) for word in _words(shapes)]
    amounts = [_count(word) for word in _words(tokens)]
    with show.progress() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingKernelWarning)
        found = speed.kernels(
            wanted,
            _words(kinds),  # type: ignore[arg-type]
            amounts,
            rounds=rounds,
            threads=threads,
            compute=compute,  # type: ignore[arg-type]
            progress=lambda done, total: progress(Progress("bench", done, total, "weights")),
        )
    if json:
        show.json(found)
        return
    show.table(
        None,
        ["weight", "kind", "tokens", "ms", "from", "to", "GB/s", "of a read", "GFLOP/s"],
        [
            [
                f"{row['out']}x{row['in']}",
                row["kind"],
                row["tokens"],
                *(1e3 * row["seconds"][key] for key in ("median", "min", "max")),
                row["gb_per_s"],
                f"{row['share_of_read']:.0%}",
                row["gflop_per_s"],
            ]
            for row in found["products"]
        ],
    )
    read = f"a plain read: {_spread(found['read']['gb_per_s'])} GB/s; runs on "
    where = _runs_on(found["backend"], found["isa"], found["missing"], found["threads"])
    show.text(read + where)


def _runs_on(backend: str | None, isa: str | None, missing: str | None, threads: int) -> str:
    name = "torch" if backend is None else backend
    why = f", since {missing}" if backend == "torch" and missing else ""
    return f"{name}{f' ({isa})' if isa else ''}, {threads} threads{why}"


def _spread(values: dict[str, Any]) -> str:
    return f"{values['median']:.4g} ({values['min']:.4g} to {values['max']:.4g})"


def _words(text: str) -> list[str]:
    found = [word for part in text.split(",") if (word := part.strip())]
    if not found:
        raise UnicompError("an empty list measures nothing", hint="leave the option out for all")
    return found


def _shape(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", word)
    if not found:
        raise UnicompError(f"not a shape: `{word}`", hint="write OUTxIN, as `4096x4096`")
    return int(found[1]), int(found[2])


def _count(word: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", word):
        raise UnicompError(f"not a number of tokens: `{word}`", hint="write `1,4,16`")
    return int(word)
