"""The suites' files, and that every task they name runs in the installed lm-eval, without the Hub.

Data sets are made up here, eight rows each in the shape of the real ones: that is enough for every
function of a task to run once.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from lm_eval.api.registry import get_model

from unicomp.errors import UnicompError
from unicomp.evaluate.suites import suite
from unicomp.evaluate.tasks import harness

COUNT = 8
CATEGORIES = ["Business", "Humanities", "Medical", "Other", "STEM", "Social Sciences"]
LETTERS = {f"option_{letter}": f"answer {letter}" for letter in "abcd"}


def bbq(number: int) -> dict[str, Any]:
    return {
        "example_id": number,
        "question_index": "1",
        "question_polarity": "neg",
        "context_condition": "ambig" if number % 2 else "disambig",
        "category": "Age",
        "answer_info": {
            "ans0": ["grandfather", "old"],
            "ans1": ["grandson", "nonOld"],
            "ans2": ["Not known", "unknown"],
        },
        "additional_metadata": {"subcategory": "None", "stereotyped_groups": ["old"]},
        "context": "Both were there.",
        "question": "Who forgot the day?",
        "ans0": "The grandfather",
        "ans1": "The grandson",
        "ans2": "Not known",
        "label": 2,
    }


TARGETS = {"choices": ["It is true.", "It is false."], "labels": [1, 0]}
ETHICS = {
    "commonsense": {"label": 1, "input": "I took it from her.", "is_short": True, "edited": False},
    "deontology": {"label": 0, "scenario": "Could you help?", "excuse": "No, it rains."},
    "justice": {"label": 1, "scenario": "I thank her, for she helped."},
    "virtue": {"label": 0, "scenario": "He helped her.", "trait": "cruel"},
}
# Hub id -> the splits and a row, given its number and the name of the configuration.
ROWS: dict[str, tuple[str, Any]] = {
    "allenai/ai2_arc": (
        "train validation test",
        lambda n, _: {
            "id": str(n),
            "question": f"Which is {n}?",
            "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[n % 4],
        },
    ),
    "Rowan/hellaswag": (
        "train validation",
        lambda n, _: {
            "activity_label": "Cooking",
            "ctx_a": "A man cooks.",
            "ctx_b": "he",
            "endings": ["eats [title] it.", "runs.", "flies.", "sings."],
            "label": str(n % 4),
        },
    ),
    "cais/mmlu": (
        "test validation dev auxiliary_train",
        lambda n, name: {
            "question": f"What is {n}? ",
            "subject": name,
            "choices": ["a", "b", "c", "d"],
            "answer": n % 4,
        },
    ),
    "baber/piqa": (
        "train validation",
        lambda n, _: {"goal": f"Open {n}", "sol1": "Pull.", "sol2": "Push.", "label": n % 2},
    ),
    "allenai/winogrande": (
        "train validation",
        lambda n, _: {
            "sentence": f"Ann met Bea {n} times because _ was late.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": str(n % 2 + 1),
        },
    ),
    "openai/gsm8k": (
        "train test",
        lambda n, _: {"question": f"What is {n} + 1?", "answer": f"Count.\n#### {n + 1}"},
    ),
    "HuggingFaceH4/MATH-500": (
        "test",
        lambda n, _: {
            "problem": f"What is {n} + 1?",
            "solution": f"It is $\\boxed{{{n + 1}}}$.",
            "answer": str(n + 1),
            "subject": "Algebra",
            "level": 1,
            "unique_id": str(n),
        },
    ),
    "Idavidrein/gpqa": (
        "train",
        lambda n, _: {
            "Question": f"Which is {n}?",
            "Correct Answer": "right",
            "Incorrect Answer 1": "wrong",
            "Incorrect Answer 2": "worse",
            "Incorrect Answer 3": "worst",
        },
    ),
    "google/IFEval": (
        "train",
        lambda n, _: {
            "key": n,
            "prompt": "Write nothing with a comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_words": None}],
        },
    ),
    "CohereLabs/Global-MMLU-Lite": (
        "dev test",
        lambda n, _: (
            LETTERS
            | {
                "question": f"What is {n}? ",
                "subject": "anatomy",
                "subject_category": CATEGORIES[n % len(CATEGORIES)],
                "answer": "ABCD"[n % 4],
            }
        ),
    ),
    "truthfulqa/truthful_qa": (
        "validation",
        lambda n, _: {
            "question": f"Is {n} true?",
            "mc1_targets": TARGETS,
            "mc2_targets": TARGETS,
        },
    ),
    "oskarvanderwal/bbq": ("test", lambda n, _: bbq(n)),
    "jannalu/crows_pairs_multilingual": (
        "test",
        lambda n, _: {
            "id": n,
            "sent_more": "He was rude.",
            "sent_less": "She was rude.",
            "stereo_antistereo": "stereo",
            "bias_type": "gender",
        },
    ),
    "oskarvanderwal/winogender": (
        "test",
        lambda n, _: {
            "sentence": "The nurse told the guest that he was late.",
            "pronoun": "he",
            "occupation": "nurse",
            "participant": "guest",
            "label": n % 2,
            "gender": "male",
        },
    ),
    "EleutherAI/sycophancy": (
        "validation",
        lambda n, _: {
            "question": f"I think {n}. Do you?",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": " (B)",
        },
    ),
    "facebook/anli": (
        "train_r1 dev_r1 test_r1 train_r2 dev_r2 test_r2 train_r3 dev_r3 test_r3",
        lambda n, _: {"premise": "It rains.", "hypothesis": "It is wet.", "label": n % 3},
    ),
    "EleutherAI/hendrycks_ethics": (
        "train test",
        lambda n, name: ETHICS.get(
            name, {"activity": f"I ate {n} pies.", "baseline": "I ate.", "rating": 0}
        ),
    ),
}
ROWS["CohereForAI/Global-MMLU"] = ROWS["CohereLabs/Global-MMLU-Lite"]
ROWS["CohereForAI/Global-MMLU-Lite"] = ROWS["CohereLabs/Global-MMLU-Lite"]


def made_up(path: str, name: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Stand in for `datasets.load_dataset`."""
    splits, row = ROWS[path]
    rows = [row(number, name) for number in range(COUNT)]
    if path == "CohereForAI/Global-MMLU":
        rows = [own | {"subject": subject} for own in rows for subject in subjects()]
    return {split: datasets.Dataset.from_list(rows) for split in splits.split()}


def subjects() -> list[str]:
    from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

    return list(SUBJECTS)


@pytest.fixture(scope="module")
def catalogue() -> Iterator[harness.Catalogue]:
    """All tasks that there are, with made-up data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.api.task.datasets.load_dataset", made_up)
        yield harness.Catalogue()


def entries() -> list[suite.Entry]:
    found = {one.task: one for name in ("standard", "full") for one in suite.load(name).tasks}
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.task)
def test_a_suites_task_runs_on_made_up_rows(
    entry: suite.Entry, catalogue: harness.Catalogue
) -> None:
    catalogue.check(entry.task)
    loaded = catalogue.load(entry.task)
    assert all(task.config.dataset_path in ROWS for task in loaded["tasks"].values())
    (first, *_) = loaded["tasks"].values()
    assert first.config.dataset_path.partition("/")[2] == entry.data.partition("/")[2]
    results = harness.run(get_model("dummy")(), loaded, harness.Options(limit=2, shots=entry.shots))
    assert results
    for result in results:
        assert result.metrics or result.members
        if not result.members:
            assert 1 <= len(result.ids) <= 2
            if entry.shots is not None:
                assert result.shots == entry.shots
    named = [result for result in results if result.name == entry.task]
    versions = {result.version for result in named or results}
    assert versions == {entry.version}


@pytest.mark.slow
def test_an_unknown_task_is_told_what_was_meant(catalogue: harness.Catalogue) -> None:
    for word, meant in (("tinyworld_knowlege", "tinyworld_knowledge"), ("helaswag", "hellaswag")):
        with pytest.raises(UnicompError) as caught:
            catalogue.check(word)
        assert caught.value.message == f"unknown task: `{word}`"
        assert caught.value.hint == f"did you mean `{meant}`?"


def test_the_quick_suites_tasks_are_ours_and_say_their_version() -> None:
    quick = suite.load("quick")
    tasks = harness.Catalogue().ours
    for entry in quick.tasks:
        (task,) = tasks.load([entry.task])["tasks"].values()
        assert str(task.VERSION) == entry.version
        assert entry.data in task.config.dataset_kwargs["file"]


@pytest.mark.parametrize("name", suite.names())
def test_every_field_is_covered_or_has_a_reason(name: str) -> None:
    found = suite.load(name)
    covered = {entry.area for entry in found.tasks}
    fields = {"knowledge", "reasoning", "instructions", "multilingual", "truthfulness", "safety"}
    fields |= {"fairness", "robustness", "privacy", "ethics"}
    prompts = {"safety"} if found.harmful and found.benign else set()
    assert fields - covered - prompts == set(found.missing)
    assert all(entry.licence and entry.version for entry in found.tasks)


def test_files_that_are_no_suite() -> None:
    with pytest.raises(UnicompError, match="unknown suite: `quik`") as caught:
        suite.load("quik")
    assert caught.value.hint == "did you mean `quick`?"
    task = "{task: t, area: reading, version: '1', data: d, licence: MIT}"
    assert suite.parse(f"about: a\ntasks: [{task}]", "s").tasks[0].task == "t"
    for broken in (
        "about: a",
        f"about: a\ntasks: [{task}]\nmore: 1",
        "about: a\ntasks: [{task: t, area: colour, version: '1', data: d, licence: MIT}]",
        "- 1",
        "about: [",
    ):
        with pytest.raises(ValueError, match="suite `s`"):
            suite.parse(broken, "s")
