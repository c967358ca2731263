"""Manifest + report -> model card: what was done, from what, what it cost, how to load it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from unicomp.evaluate.cost.gain import Gain
from unicomp.evaluate.cost.stages import costs
from unicomp.evaluate.verdicts.gates import OUTCOMES, Outcome
from unicomp.manifest import CalibrationPart, Manifest, Stage
from unicomp.recipes.lint.output import Output
from unicomp.recipes.lint.rules import refusals, refused
from unicomp.recipes.publish import card_fields

PLAIN = """```python
# pip install transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```"""
LOAD = {
    "compressed-tensors": """```python
# pip install transformers compressed-tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```""",
    "gptq": """```python
# pip install transformers optimum gptqmodel; not run by unicomp's tests
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```""",
    "bitnet": PLAIN,
}
OURS = """```python
# pip install unicomp
import unicomp
from transformers import AutoTokenizer

model = unicomp.load("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```"""
VLLM = """```sh
# not run by unicomp's tests: what vLLM's code (0.33) reads was compared, see docs/formats.md
vllm serve PATH_OR_ID
```"""
LLAMA_CPP = """```sh
unicomp export PATH_OR_ID --format gguf --out model.gguf
llama-cli -m model.gguf -p "Once upon a time"  # not run by unicomp's tests: the library is
```"""


def write(
    output: Output,
    manifest: Manifest,
    report: dict[str, Any] | None = None,
    gain: Gain | None = None,
) -> str:
    """Return the text of `README.md` for an output folder.

    output  what a loader finds there
    report  `report.json` as plain values, where the model was scored
    gain    how much faster than its source it runs, where that was measured
    """
    stage = manifest.stages[-1]
    totals = manifest.totals
    kept = [module for module in stage.modules.values() if module.bits is None]
    fallbacks: dict[str, int] = {}
    for module in stage.modules.values():
        if module.fallback is not None:
            fallbacks[module.fallback] = fallbacks.get(module.fallback, 0) + 1
    sparse = [module for module in stage.modules.values() if module.sparsity is not None]
    lines = [
        card_fields.front(card_fields.fields(manifest, report)),
        f"# {manifest.source.id.split('/')[-1]}, " + ", ".join(map(_done, manifest.stages)),
        "",
        f"Made by unicomp {manifest.versions['unicomp']} from `{manifest.source.id}`"
        + (f" at `{manifest.source.revision}`." if manifest.source.revision else "."),
        "",
        "| | before | after |",
        "|---|---:|---:|",
        *_sizes(manifest),
        f"| tensors, bytes | {totals.bytes_in:,} | {totals.bytes_out:,} |",
        f"| bits per weight | {8 * totals.bytes_in / (totals.params_in or totals.params):.2f} "
        f"| {totals.bits_per_weight:.2f} |",
        "",
        f"Of {len(stage.modules)} linears {len(stage.modules) - len(kept)} are quantized, "
        f"{_pruned(manifest, len(sparse))}. Options: "
        + ", ".join(f"{one.verb}: `{json.dumps(one.options)}`" for one in manifest.stages)
        + ".",
    ]
    if manifest.calibration is not None:
        text = manifest.calibration
        lines += [
            "",
            f"Calibrated on `{text.source}` (sha256 `{text.sha256}`): {text.samples} windows of "
            f"{text.seq_len} tokens, seed {text.seed}.",
        ]
        if len(text.parts) > 1:
            lines += ["", *(_part(part) for part in text.parts)]
    if any(one.shape is not None for one in manifest.stages):
        lines += ["", _speed(gain)]
    if any(one.training is not None for one in manifest.stages):
        lines += ["", "## Training", "", *_training(manifest)]
    if report is not None:
        lines += ["", "## Scores", "", *_scores(report)]
        if report.get("gates"):
            lines += ["", "## Gates", "", *_gates(report["gates"])]
    if fallbacks or manifest.notes:
        lines += ["", "## Notes", ""]
        lines += [f"- {count} linears: {why}" for why, count in sorted(fallbacks.items())]
        lines += [f"- {note}" for note in manifest.notes]
    lines += ["", "## Load", ""]
    loaders = refusals(output)
    lines += [f"- {sentence}" for sentence in refused(loaders)]
    if loaders["transformers"] is None:
        lines += [PLAIN if output.method is None else LOAD[output.method], ""]
        if loaders["vllm"] is None:
            lines += ["In vLLM:", "", VLLM, ""]
    else:
        lines += [
            "",
            "`unicomp generate` runs it; `--target transformers` makes one that loads.",
            "",
        ]
    lines += ["On unicomp's kernels:", "", OURS, ""]
    if manifest.stages[-1].verb == "quantize":
        lines += ["In llama.cpp:", "", LLAMA_CPP, ""]
    lines += [
        "`unicomp.json` holds every module's error, the hashes of the source files and of these;",
        "`unicomp verify` compares them. `recipe.yaml` made it. The licence is that of the source.",
        "",
    ]
    return "\n".join(lines)


def _sizes(manifest: Manifest) -> list[str]:
    """Return the rows of what became smaller: parameters, and the sizes that changed."""
    totals = manifest.totals
    shapes = [one.shape for one in manifest.stages if one.shape is not None]
    if not shapes:
        return []
    rows = [f"| parameters | {totals.params_in or totals.params:,} | {totals.params:,} |"]
    for name, size in shapes[0].before.items():
        after = shapes[-1].after.get(name, size)
        if after != size:
            rows.append(f"| {name.replace('_', ' ')} | {size:,} | {after:,} |")
    return rows


def _pruned(manifest: Manifest, sparse: int) -> str:
    shapes = [one for one in manifest.stages if one.shape is not None]
    if not shapes:
        return f"{sparse} pruned"
    refitted = sum(one.error_after is not None for one in shapes[-1].modules.values())
    return f"{sparse} have zeros, {refitted} are refitted to a smaller shape"


def _speed(gain: Gain | None) -> str:
    """Say what the smaller shape gains at run time: what was measured, or that nothing was."""
    if gain is None:
        return "Speed: not measured; `unicomp bench model` measures one model after the other."
    said = []
    for word, rates in (("prefill", gain.prefill), ("decode", gain.decode)):
        found, (middle, least, most) = rates.to_json(), rates.gain
        said.append(
            f"{word} {found['model']:.4g} tokens/s, the base {found['baseline']:.4g}: "
            f"{middle:.2f} times ({least:.2f} to {most:.2f})"
        )
    return (
        f"Speed, measured in turn on the machine that made it, {gain.prompt_tokens} tokens in and "
        f"{gain.new_tokens} out: {'; '.join(said)}."
    )


def _training(manifest: Manifest) -> list[str]:
    """Return what each stage cost and each training won back, in KL, and held-out figures.

    All of them are of the windows that the training holds out.
    """
    lines = ["| after | KL to the teacher, nats a token of held-out text |", "|---|---:|"]
    lines += [f"| {own.after} | {own.kl:.4g}{own.less} |" for own in costs(manifest.stages)]
    trained = [stage.training for stage in manifest.stages if stage.training is not None]
    figures, last, heat = trained[-1].before, trained[-1].after, trained[-1].temperature
    lines += ["", "| held out | before training | after |", "|---|---:|---:|"]
    lines += [
        f"| {name.replace('_', ' ')} | {figures[name]:.4g} | {last[name]:.4g} |"
        for name in ("nll", "brier", "accuracy", "ece", "gap", "entropy_ratio")
        if name in last and name in figures
    ]
    if heat is not None:
        lines += [
            "",
            f"Logits divided by {heat['temperature']:.3f}, fitted on one half of that text, take "
            f"the likelihood of the other from {heat['before']:.4f} to {heat['after']:.4f} nats.",
        ]
    return lines


def _part(part: CalibrationPart) -> str:
    return (
        f"- {part.samples} windows ({part.share:.0%}) of `{part.source}` (sha256 `{part.sha256}`)"
    )


def _done(stage: Stage) -> str:
    past = {"distill": "distilled", "export": "exported"}.get(stage.verb, f"{stage.verb}d")
    return f"{past} {'to' if stage.verb == 'export' else 'with'} {stage.method}"


def _scores(report: dict[str, Any]) -> list[str]:
    lines = ["| score | base | this model | 95% interval | n |", "|---|---:|---:|---|---:|"]
    for score in report["scores"]:
        if score["status"] != "measured":
            continue
        lines.append(
            f"| {score['name']} ({score['unit']}) | {_number(score['baseline'])} "
            f"| {_number(score['value'])} "
            f"| {_span(score['ci95'])} "
            f"| {score['n'] if score['n'] is not None else ''} |"
        )
    return lines


SAID: Mapping[Outcome, str] = {
    "pass": "passed",
    "fail": "failed",
    "inconclusive": "had too little evidence",
    "not applied": "did not apply",
}
"""Outcome of a gate -> how a card says it."""


def _gates(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each bound that the model was held against what became of it, the worst first."""
    found = [own["outcome"] for own in verdicts]
    counts = [f"{found.count(own)} {SAID[own]}" for own in OUTCOMES if own in found]
    lines = [
        f"Of {len(found)} bounds {', '.join(counts)}.",
        "",
        "| score | bound | verdict | found | interval | would have seen | why |",
        "|---|---|---|---:|---|---:|---|",
    ]
    for own in sorted(verdicts, key=lambda verdict: OUTCOMES.index(verdict["outcome"])):
        bound = f"{own['check'].replace('_', ' ')} {_number(own['limit'])}" if own["check"] else ""
        lines.append(
            f"| `{own['score']}` | {bound} | {SAID[own['outcome']]} | {_number(own['value'])} "
            f"| {_span(own['interval'])} | {_number(own['detectable'])} | {own['reason'] or ''} |"
        )
    return lines


def _span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
