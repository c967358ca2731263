"""Our figures are lm-eval's to the last digit, and an independent scorer agrees with both.

By hand means `lm_eval.simple_evaluate` with lm-eval's own `hf` model, as its command calls it, on
the same task files: 200 documents a task, and in the exhaustive tests every document, in shards
that take minutes each.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from unicomp import builtin
from unicomp.evaluate.score import score
from unicomp.evaluate.tasks import harness
from unicomp.evaluate.tasks.model import Unicomp
from unicomp.evaluate.tasks.result import Result
from unicomp.kernels.load import load
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

TINYWORLD = [f"tinyworld_{name}" for name in "knowledge reasoning reading grammar".split()]
GENERATED = ["tinyworld_instructions", "tinyworld_heldout"]
LOCAL = [
    pytest.param("local_blimp", marks=pytest.mark.slow),
    "local_hellaswag",
    "local_arc_easy",
    "local_arc_challenge",
    "local_bbq_age",
    "local_crows_pairs",
    # Six questions stand in front of each of its own.
    pytest.param("local_truthfulqa_mc1", marks=pytest.mark.slow),
    pytest.param("local_truthfulqa_mc2", marks=pytest.mark.slow),
]
# (task, part) of every document that is local: (0, 1) is the whole. One with 40,000 requests
# is cut into three, so that each part takes minutes.
WHOLE = (0, 1)
EVERY = [
    *((task, WHOLE) for task in (*TINYWORLD, *GENERATED)),
    ("local_blimp", WHOLE),
    *(("local_hellaswag", (part, 3)) for part in range(3)),
    ("local_arc_easy", WHOLE),
    ("local_arc_challenge", WHOLE),
    ("local_bbq_age", WHOLE),
    ("local_bbq_religion", WHOLE),
    ("local_crows_pairs", WHOLE),
    ("local_truthfulqa_mc1", WHOLE),
    ("local_truthfulqa_mc2", WHOLE),
]
HELLASWAG = "hellaswag/hellaswag_val.jsonl"
SCORED = ["local_blimp_causative", "local_arc_easy", "local_hellaswag", "local_truthfulqa_mc1"]
BATCH = 16
LIMIT = 200


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep results of interrupted scores out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # What simple_evaluate says of the machine takes seconds, and is no result.
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
        yield


@pytest.fixture
def benchmarks(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmarks' own files."""
    monkeypatch.setenv("UNICOMP_BENCHMARKS", str(assets / "benchmarks"))
    return assets


@pytest.fixture
def shard(benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give HellaSwag's file fewer rows: `shard(part, parts)`."""

    def cut(part: int, parts: int) -> None:
        if parts == 1:
            return
        rows = (benchmarks / "benchmarks" / HELLASWAG).read_text("utf-8").splitlines(True)
        file = tmp_path / HELLASWAG
        file.parent.mkdir()
        ends = [len(rows) * at // parts for at in (part, part + 1)]
        file.write_text("".join(rows[slice(*ends)]), "utf-8")
        monkeypatch.setenv("UNICOMP_BENCHMARKS", str(tmp_path))

    return cut


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tinyworld in 4 bits."""
    out = tmp_path_factory.mktemp("packed") / "w4"
    recipe = from_options("quantize", "rtn", {"bits": 4, "group_size": 32})
    run(plan(recipe, model="builtin:tinyworld"), out)
    return out


def by_hand(
    model: str, arguments: dict[str, Any], task: str, limit: int | None, batch: int
) -> dict[str, Any]:
    """Return lm-eval's figures of a task and, for a group, of the group."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(harness.FOLDER), include_defaults=False),
        batch_size=batch,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert found is not None
    return {
        f"accuracy/{name}/{key.removesuffix(',none')}": value
        for name, figures in found["results"].items()
        for key, value in figures.items()
        if key.endswith(",none") and "stderr" not in key and not isinstance(value, str)
    }


def same_as_by_hand(
    folder: Path, task: str, limit: int | None, *, batch: int = BATCH, **how: Any
) -> dict[str, float]:
    """Check every figure of a task, and return them."""
    report = score(
        folder, axes=["accuracy"], tasks=[task], limit=limit, batch_size=batch, text=None, **how
    )
    ours = {one.name: one.value for one in report.scores if one.name.count("/") == 2}
    if compute := how.get("compute"):
        model, arguments = "unicomp", {"compute": compute}
    else:
        model, arguments = "hf", {}
    arguments |= {"pretrained": str(folder), "dtype": "float32"}
    hand = by_hand(model, arguments, task, limit, batch)
    assert ours == hand
    return hand


@pytest.mark.parametrize("task", TINYWORLD + GENERATED)
def test_tinyworld_as_by_hand(task: str) -> None:
    assert same_as_by_hand(builtin.model("tinyworld"), task, LIMIT)


@pytest.mark.parametrize("task", LOCAL)
def test_benchmarks_as_by_hand(task: str, benchmarks: Path) -> None:
    found = same_as_by_hand(benchmarks / "models/stories260K", task, LIMIT)
    if task == "local_blimp":
        assert len(found) == 11
        assert found["accuracy/local_blimp/acc"] > 0.6  # 0.5 is chance


def label(value: Any) -> str | None:
    """Name a part of a task."""
    if not isinstance(value, tuple):
        return None
    return "all" if value == WHOLE else f"{value[0] + 1}of{value[1]}"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("task", "part"), EVERY, ids=label)
def test_every_document_as_by_hand(
    task: str, part: tuple[int, int], benchmarks: Path, shard: Callable[..., None]
) -> None:
    own = task.startswith("tinyworld")
    folder = builtin.model("tinyworld") if own else benchmarks / "models/stories260K"
    shard(*part)
    same_as_by_hand(folder, task, None, batch=128)


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", [*TINYWORLD, *GENERATED])
def test_every_document_of_a_packed_model_as_by_hand(packed: Path, task: str) -> None:
    same_as_by_hand(packed, task, None, batch=128)
    same_as_by_hand(packed, task, None, batch=128, compute="int8")


@pytest.mark.parametrize("compute", ["int8", "exact"])
@pytest.mark.parametrize("task", ["tinyworld_knowledge", "tinyworld_heldout"])
def test_a_packed_model_as_by_hand(packed: Path, task: str, compute: str) -> None:
    same_as_by_hand(packed, task, LIMIT, compute=compute)


@pytest.mark.parametrize("task", [*TINYWORLD, *GENERATED])
def test_a_quantized_model_with_dequantized_weights_as_by_hand(packed: Path, task: str) -> None:
    """lm-eval's `hf` reads the same folder through compressed-tensors."""
    same_as_by_hand(packed, task, LIMIT)


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_a_group_on_a_quantized_model_as_by_hand(packed: Path) -> None:
    assert len(same_as_by_hand(packed, "local_blimp", LIMIT)) == 11


@torch.no_grad()
def loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Return log p(continuation | context), one request at a time, in float64.

    Written from the definition: the tokens of the whole text, of which those after the context's
    own are predicted; a text without context starts from the BOS token.
    """
    while context.endswith(" "):  # a space belongs to the word that follows
        context, continuation = context[:-1], " " + continuation
    if context:
        whole = tokenizer(context + continuation).input_ids
        start = len(tokenizer(context).input_ids)
    else:
        whole = tokenizer(continuation, add_special_tokens=False).input_ids
        whole, start = [tokenizer.bos_token_id, *whole], 1
    room = model.config.max_position_embeddings + 1
    start -= max(0, len(whole) - room)  # what is too long loses its beginning
    ids = torch.tensor(whole[-room:])
    log_p = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
    return float(sum(log_p[at - 1, ids[at]] for at in range(start, len(ids))))


def requests_of(task: Any, document: Any) -> list[tuple[str, str]]:
    """Return (context, continuation) of each choice, from the task's own words."""
    context = task.doc_to_text(document)
    delimiter = task.config.target_delimiter
    return [(context, delimiter + choice) for choice in task.doc_to_choice(document)]


def independent(
    folder: Path, task: str, limit: int | None, model: Any = None
) -> tuple[list[Any], float]:
    """Return log-likelihoods and accuracy of the first documents, or all, by the scorer above."""
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (loaded,) = harness.Catalogue().load(task)["tasks"].values()
    found, right = [], 0
    documents = loaded.eval_docs if limit is None else loaded.eval_docs.select(range(limit))
    for document in documents:
        pairs = requests_of(loaded, document)
        values = torch.tensor([loglikelihood(model, tokenizer, *pair) for pair in pairs])
        found.append(values.double())
        right += int(values.argmax()) == int(loaded.doc_to_target(document))
    return found, right / len(documents)


def run_ours(folder: Path, task: str, limit: int | None, batch: int = BATCH, **how: Any) -> Result:
    lm = Unicomp(str(folder), batch_size=batch, **how)
    catalogue = harness.Catalogue()
    (result,) = harness.run(lm, catalogue.load(task), harness.Options(limit=limit))
    return result


def check(found: list[Any], accuracy: float, result: Result, tolerance: float) -> None:
    assert result.choices is not None
    close = 0
    for ours, theirs in zip(result.choices.loglikelihoods, found, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance
        first, second = theirs.topk(2).values
        close += int(first - second <= 2 * tolerance)
    # Only where the two best are as near as that may another of them be the answer.
    assert abs(result.metrics["acc"].value - accuracy) * len(found) <= close + 1e-9


@pytest.mark.parametrize("task", TINYWORLD)
def test_an_independent_scorer_agrees(task: str) -> None:
    folder = builtin.model("tinyworld")
    result = run_ours(folder, task, 50, compute="dequantized")
    found, accuracy = independent(folder, task, 50)
    check(found, accuracy, result, 1e-4)
    found[7] = found[7] + 1e-2
    with pytest.raises(AssertionError):
        check(found, accuracy, result, 1e-4)
    with pytest.raises(AssertionError):
        check(found[::-1], accuracy, result, 1e-4)
    with pytest.raises(AssertionError):
        check(independent(folder, task, 50)[0], accuracy - 0.5, result, 1e-4)


@pytest.mark.parametrize("task", SCORED)
def test_an_independent_scorer_agrees_on_benchmarks(task: str, benchmarks: Path) -> None:
    folder = benchmarks / "models/stories260K"
    limit = 5 if "truthful" in task else 40
    result = run_ours(folder, task, limit, compute="dequantized")
    check(*independent(folder, task, limit), result, 1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TINYWORLD)
def test_an_independent_scorer_agrees_on_every_document(packed: Path, task: str) -> None:
    """On the base model, and on the packed one through its dequantized twin."""
    folder = builtin.model("tinyworld")
    result = run_ours(folder, task, None, 128, compute="dequantized")
    check(*independent(folder, task, None), result, 1e-4)
    result = run_ours(packed, task, None, 128, compute="exact", dtype="float32")
    check(*independent(packed, task, None, load(packed)), result, 1e-3)


PARADIGMS = sorted(path.stem for path in (harness.FOLDER / "local/blimp").glob("[!_]*.yaml"))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("task", "part"),
    [
        *((f"local_blimp_{name}", WHOLE) for name in PARADIGMS),
        *((task, WHOLE) for task in ("local_arc_easy", "local_arc_challenge")),
        ("local_truthfulqa_mc1", WHOLE),
        *(("local_hellaswag", (part, 3)) for part in range(3)),
    ],
    ids=label,
)
def test_an_independent_scorer_agrees_on_every_document_of_benchmarks(
    task: str, part: tuple[int, int], benchmarks: Path, shard: Callable[..., None]
) -> None:
    folder = benchmarks / "models/stories260K"
    shard(*part)
    result = run_ours(folder, task, None, 128, compute="dequantized")
    check(*independent(folder, task, None), result, 1e-3)


@torch.no_grad()
def log_p_of_text(model: Any, tokenizer: Any, text: str) -> float:
    """Return log p(text) from the BOS token on, in pieces as long as the model's context.

    The last piece is preceded by as many tokens as there is room for; the others by one. As in
    lm-eval, a BOS token that the tokenizer puts first by itself is predicted too, from that one.
    """
    ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    room, total = model.config.max_position_embeddings, 0.0
    for start in range(1, len(ids), room):
        end = min(start + room, len(ids))
        first = start - 1 if end - start == room or start == 1 else max(0, end - 1 - room)
        log_p = model(torch.tensor([ids[first : end - 1]])).logits[0].double().log_softmax(-1)
        total += float(sum(log_p[at - 1 - first, ids[at]] for at in range(start, end)))
    return total


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("tinyworld", "builtin"),
        ("packed", "builtin"),
        pytest.param("stories260K", "text/tinystories/valid.txt", marks=pytest.mark.slow),
    ],
)
def test_perplexity_of_a_local_text_as_by_hand_and_by_the_definition(
    which: str, text: str, packed: Path, assets: Path, tmp_path: Path
) -> None:
    """A text of one's own, through `--tasks FILE`; whole documents, longer than the context too."""
    file = builtin.heldout("heldout.txt") if text == "builtin" else assets / text
    folder = {"packed": packed, "tinyworld": builtin.model("tinyworld")}.get(
        which, assets / "models" / which
    )
    words = file.read_text("utf-8")
    if text == "builtin":  # one document that does not fit the context, and some that do
        parts = words.split("\n\n")
        words = "\n\n".join([" ".join(parts[:30]), *parts[30:60]])
    own = tmp_path / "mine.txt"
    own.write_text(words, "utf-8")
    report = score(folder, axes=["accuracy"], tasks=[str(own)], batch_size=BATCH)
    found = report.score("accuracy/mine/bits_per_byte").value
    task = tmp_path / "mine.yaml"
    task.write_text(
        f"include: {harness.FOLDER / 'own/text.yaml'}\ntask: mine\n"
        f"dataset_kwargs: {{file: '{own}'}}\n",
        "utf-8",
    )
    hand = by_hand("hf", {"pretrained": str(folder), "dtype": "float32"}, str(task), None, BATCH)
    ours = {one.name: one.value for one in report.scores if one.name.count("/") == 2}
    assert ours == hand
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [part.strip("\n") for part in words.split("\n\n") if part.strip()]
    total = sum(log_p_of_text(model, tokenizer, document) for document in documents)
    size = sum(len(document.encode()) for document in documents)
    expected = -total / math.log(2) / size
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(-total / math.log(2) / (size + len(documents)), rel=1e-5)


@pytest.mark.parametrize(("compute", "tolerance"), [("exact", 1e-3), ("int8", 1.0)])
def test_an_independent_scorer_agrees_on_a_packed_model(
    packed: Path, compute: str, tolerance: float
) -> None:
    """Through its dequantized twin; int8 activations are rounded, so that it is a little off."""
    result = run_ours(packed, "tinyworld_knowledge", 50, compute=compute, dtype="float32")
    found, _ = independent(packed, "tinyworld_knowledge", 50, load(packed))
    assert result.choices is not None
    far = [
        float((ours - theirs).abs().max())
        for ours, theirs in zip(result.choices.loglikelihoods, found, strict=True)
    ]
    assert max(far) < tolerance
    if compute == "int8":
        assert max(far) > 1e-3  # it does compute in another way
