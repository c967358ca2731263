"""Make the checkpoints of this folder: small random models, quantized by other people's tools.

    python make.py base --work W             # in our own environment: models and tokenizer
    python make.py gptqmodel --work W        # seen with gptqmodel 7.7.0
    python make.py llmcompressor --work W    # seen with 0.14.0.1, compressed-tensors 0.19.0
    python make.py llama_cpp --work W --library libllama.so    # in our own environment

Each tool but llama.cpp wants an environment of its own. It quantizes, opens what it wrote with its
own reader, and stores what that reader says of `TEXT` beside the checkpoint (`expected.json`): the
negative log-likelihood of every token after the first. llama.cpp's quantizer is called in a shared
library of its (seen with the npm package `@node-llama-cpp/linux-x64` 3.22.1, which has one), its
reader is that of `xllamacpp`. The weights are drawn here, so nobody's licence is in them.
`test_foreign.py` of `tests/end_to_end` compares.
"""

import argparse
import ctypes
import json
import math
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXT = (
    "the big red dog ran to the river and saw a little fish. then the sad girl said hello, "
    "because her friend was over the house again. 12 birds sing near the green tree."
)
CALIBRATION = [
    "a happy cat sat on the tree and the old man made a boat because the sun was near.",
    "the boy lost his red fish in the house, so mother said: play under the moon.",
    "rain ran over the river. 3 little birds took the very big ball to father again.",
    "day and night the dog and the cat jump, sing and help a friend with the boat.",
]
SIZE = {
    "vocab_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES = (
    ("gptq", True, False),
    ("gptq", False, False),
    ("gptq", True, True),
    ("gptq_v2", True, False),
    ("gptq_v2", False, True),
)
"""Version, symmetric, act order."""
NARROW = SIZE | {"hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": True}
"""Two to four groups of 16 in a row."""
WIDE = SIZE | {"hidden_size": 256, "intermediate_size": 32, "tie_word_embeddings": True}
"""Rows of one K-quant's block, and rows of 32 that no K-quant holds."""


def ids_of(folder: Path) -> list[int]:
    """Return the tokens of the text, the beginning-of-text token first."""
    from tokenizers import Tokenizer

    return [1, *Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids]


def base(work: Path) -> None:
    """Draw the two models, and build the tokenizer from a few merges."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    merges = [tuple(pair.split()) for pair in "t h|th e|Ġ the|Ġ a|h e|i n|e r|o n".split("|")]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "Ċ", "Ġ", *"abcdefghijklmnopqrstuvwxyz,.:0123456789"]
    tokens += ["".join(pair) for pair in merges]
    tokens += [f"<extra_{place}>" for place in range(64 - len(tokens))]
    own = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(tokens)}, merges=merges))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    for name, size in (("narrow", NARROW), ("wide", WIDE)):
        torch.manual_seed(len(name))
        model = LlamaForCausalLM(LlamaConfig(**size))
        with torch.no_grad():
            for own_name, weight in model.named_parameters():
                if weight.ndim == 1:
                    weight.copy_(1 + 0.2 * torch.randn(weight.shape))
                else:
                    weight.copy_(torch.randn(weight.shape) * (1.2 if "mlp" in own_name else 0.9))
                    weight /= (
                        weight.shape[1] ** 0.5 if "embed" not in own_name else weight.shape[1] / 8
                    )
        model.half().save_pretrained(work / "base" / name)
        fast.save_pretrained(work / "base" / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "base/narrow" / file, HERE / file)
    (HERE / "text.txt").write_text(TEXT)


def store(name: str, tool: str, folder: Path, files: list[str], logits: Any) -> None:
    """Copy a checkpoint here, with what its own reader says of the text.

    logits  float [tokens, vocab] of the text's tokens
    """
    import torch

    ids = ids_of(folder)
    logp = torch.as_tensor(logits).double().log_softmax(-1)
    nll = [-float(logp[at, token]) for at, token in enumerate(ids[1:])]
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in files:
        shutil.copy(folder / file, out / file)
    if "config.json" in files:  # all but the folder that GPTQModel worked in
        config = json.loads((out / "config.json").read_text("utf-8"))
        config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    said = {"tool": tool, "nll": [round(value, 5) for value in nll]}
    (out / "expected.json").write_text(json.dumps(said) + "\n")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{name}: perplexity {math.exp(sum(nll) / len(nll)):.4f}, {size} bytes")


def gptqmodel(work: Path) -> None:
    """Quantize by GPTQModel: both versions, with and without act order and zero points."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    source = work / "base/narrow"
    tokenizer = AutoTokenizer.from_pretrained(source)
    samples = [tokenizer(text, return_tensors="pt") for text in CALIBRATION]
    tool = f"gptqmodel {metadata.version('gptqmodel')}"
    for version, sym, desc_act in CASES:
        config = QuantizeConfig(
            bits=4,
            group_size=16,
            desc_act=desc_act,
            act_group_aware=False,
            sym=sym,
            format=version,
            device="cpu",
        )
        name = f"{version}-{'sym' if sym else 'asym'}{'-order' if desc_act else ''}"
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        model = GPTQModel.load(str(source), config, dtype=torch.float16)
        model.quantize([{k: v[0].tolist() for k, v in one.items()} for one in samples])
        model.save(str(folder))
        del model
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, folder / file)
        read = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        with torch.no_grad():
            logits = read.model(torch.tensor([ids_of(folder)])).logits[0]
        store(name, tool, folder, ["config.json", "model.safetensors"], logits)


def llmcompressor(work: Path) -> None:
    """Quantize by llm-compressor's GPTQ to W4A16, symmetric and not, with static act order."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import CompressedTensorsConfig

    source = work / "base/narrow"
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [tokenizer(text)["input_ids"] for text in CALIBRATION]
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    tool = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("llmcompressor", "compressed-tensors")
    )
    for symmetric in (True, False):
        name = f"compressed-tensors-{'sym' if symmetric else 'asym'}"
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group",
            "group_size": 16,
            "actorder": "static",
        }
        recipe = GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["lm_head"],
        )
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=128,
            num_calibration_samples=len(rows),
        )
        model.save_pretrained(folder, save_compressed=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, folder / file)
        # Without `dequantize` transformers takes no zero points.
        read = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float16,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
        with torch.no_grad():
            logits = read(torch.tensor([ids_of(folder)])).logits[0]
        store(name, tool, folder, ["config.json", "model.safetensors"], logits)


def llama_cpp(work: Path, library: Path) -> None:
    """Quantize by llama.cpp: a mixture of K-quants, with rows that they do not hold."""
    from unicomp.recipes.publish.export import export

    plain = work / "wide.gguf"
    export(str(work / "base/wide"), "gguf", plain, overwrite=True)
    for kind in ("Q4_K_M",):
        folder = work / f"gguf-{kind.lower()}"
        folder.mkdir(exist_ok=True)
        shutil.copy(work / "base/wide/tokenizer.json", folder)
        quantize(library, plain, folder / "model.gguf", kind)
        tool = f"llama.cpp of @node-llama-cpp/linux-x64 3.22.1, {kind}"
        store(folder.name, tool, folder, ["model.gguf"], read(folder / "model.gguf"))


FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15,
    "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ3_S": 26, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip
"""`enum llama_ftype` of llama.h."""


class _Params(ctypes.Structure):
    """The head of `llama_model_quantize_params`, with room for whatever follows it."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("rest", ctypes.c_byte * 504),
    )


def quantize(library: Path, source: Path, out: Path, kind: str) -> None:
    """Call `llama_model_quantize` with its own defaults."""
    llama = ctypes.CDLL(str(library))
    llama.llama_backend_init()
    llama.llama_model_quantize_default_params.restype = _Params
    params = llama.llama_model_quantize_default_params()
    params.threads, params.file_type = 1, FILE_TYPES[kind]
    names = (ctypes.c_char_p(str(own).encode()) for own in (source, out))
    if llama.llama_model_quantize(*names, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp does not make {kind} of {source}")


def read(path: Path) -> list[list[float]]:
    """Return the log probabilities that llama.cpp gives after each token of the text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    ids, found = ids_of(path.parent), []
    for count in range(1, len(ids) + 1):
        wanted = {"prompt": ids[:count], "n_predict": 1, "temperature": 0, "logprobs": 64}
        answer = server.handle_completions(wanted | {"cache_prompt": False})
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        row = [-math.inf] * 64
        for entry in top:
            row[entry["id"]] = entry["logprob"]
        found.append(row)
    return found


def main() -> None:
    """Run one part."""
    parts = {"base": base, "gptqmodel": gptqmodel, "llmcompressor": llmcompressor}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*parts, "llama_cpp"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--library", type=Path, help="llama.cpp's libllama, for its quantizer")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.part == "llama_cpp":
        llama_cpp(given.work, given.library)
    else:
        parts[given.part](given.work)


if __name__ == "__main__":
    main()
