"""`unicomp plan`: each tensor's fate in words, and nothing done."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code
from unicomp.cli.plan import scheme_words, unnumbered
from unicomp.kernels.packed import Scheme

Capture = pytest.CaptureFixture[str]

# Prints of each line of its input how the command ended, and whether torch was there then.
QUICK = """
import contextlib, io, sys
from unicomp.cli.main import exit_code
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()):
        ended = exit_code(line.split())
    print(ended, "torch" in sys.modules, line.strip())
"""
TARGETS = "transformers>=5,vllm==0.33,llama.cpp"


def test_words() -> None:
    assert scheme_words(Scheme(4, 128)) == "4 bits, group 128"
    assert scheme_words(Scheme(3, -1, symmetric=False)) == "3 bits, per channel, asymmetric"
    assert unnumbered("model.layers.11.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert unnumbered("h2.norm4.weight") == "h2.norm4.weight"


def test_the_fate_of_every_tensor(capsys: Capture) -> None:
    words = ["--set", "stages.0.scale_search=minmax"]
    assert exit_code(["plan", "w4-rtn", "builtin:tinyworld", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "builtin:tinyworld: quantize rtn, compressed-tensors"
    assert "model.layers.*.self_attn.q_proj 5 128x128 4 bits, group 128 164 kB 42.3 kB" in lines
    assert any(
        line.startswith("model.layers.*.mlp.down_proj 5 128x352 4 bits,") and "352" in line
        for line in lines
    )
    assert any(line.startswith("model.embed_tokens.weight 1 1024x128 kept") for line in lines)
    assert "parameters 1,054,080" in lines
    assert any(line.startswith("peak host memory ") for line in lines)
    assert any(line.startswith("time about ") for line in lines)
    assert "note: the head shares the embedding's weight: both are kept as they are" in lines


def test_json(tiny_model: Callable[..., Path], capsys: Capture) -> None:
    assert exit_code(["plan", "w8-rtn", str(tiny_model("gpt2")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "unicomp.plan/1"
    assert found["bytes_out"] == sum(tensor["bytes_out"] for tensor in found["tensors"])
    assert {t["bits"] for t in found["tensors"] if t["role"] == "linear"} == {8}


def test_it_reads_no_weights(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("unicomp.checkpoint.Checkpoint.read", refuse)
    assert exit_code(["plan", "w8-rtn", str(tiny_model("mixtral")), "--json"]) == 0


def test_memory_is_declined_before_any_work(capsys: Capture) -> None:
    arguments = ["plan", "w8-rtn", "builtin:tinyworld", "--max-memory", "1MiB"]
    assert exit_code(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "hint: give at least " in err


def test_loaders_are_asked(capsys: Capture) -> None:
    words = ["plan", "quickstart", "builtin:tinyworld", "--target", "transformers>=5,vllm==0.33"]
    assert exit_code([*words, "--set", "stages.0.symmetric=false", "--tp", "3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lint: ")]
    assert any(line.startswith("lint: vllm 0.33: so many processes would cut") for line in lines)
    assert any(
        "do not divide the heads: `num_attention_heads`; use fewer" in line for line in lines
    )
    assert lines[-1].startswith("lint: transformers 5.23: nothing against it")
    assert exit_code([*words, "--target", "llama.cpp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["loader"] for one in found["targets"]] == ["transformers", "vllm", "llama.cpp"]
    assert [(one["loader"], one["rule"]) for one in found["findings"]] == [("llama.cpp", "folder")]
    assert found["schema"] == "unicomp.plan/1"
    assert found["tensors"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["quickstart", "builtin:tinyworld", "--target", "vlm"], "unknown loader `vlm`"),
        (["quickstart", "--target", "vllm==0.9"], "only the rules of 0.33 are known"),
        (["quickstart", "--set", "target=[vllm==0.9]"], "only the rules of 0.33 are known"),
    ],
)
def test_loaders_without_rules_are_refused(words: list[str], says: str, capsys: Capture) -> None:
    assert exit_code(["plan", *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert (err.count("error: "), err.count("hint: ")) == (1, 1)


def test_what_reads_headers_does_not_wait_for_torch() -> None:
    """It takes longer to import than most plans take.

    A recipe's schema has the options of all methods there are.
    """
    commands = [
        "quantize --help",
        "recipes schema",
        "inspect builtin:tinyworld",
        f"plan w4-rtn builtin:tinyworld --target {TARGETS} --json",
        "plan quickstart builtin:tinyworld",
        "plan w2-ternary builtin:tinyworld --set calibration.seq_len=256",
        "plan prune-quantize builtin:tinyworld",
        "plan prune-distill-quantize builtin:tinyworld",
        "plan width-25 builtin:tinyworld",
        "quantize builtin:tinyworld --method rtn --dry-run",
        "delta compress builtin:tinyworld-pirate --base builtin:tinyworld --dry-run",
    ]
    computes = "generate builtin:tinyworld --prompt Tom --max-new-tokens 1"
    found = subprocess.run(
        [sys.executable, "-c", QUICK],
        input="\n".join([*commands, computes]),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert found == [*(f"0 False {words}" for words in commands), f"0 True {computes}"]
