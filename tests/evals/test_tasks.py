"""lm-eval's tasks on the engine: equal to a direct computation, and to lm-eval's own model on the bare base."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import kit
from trimtab.adapt.acting import using
from trimtab.adapt.attach import attach
from trimtab.engine import Engine, SamplingParams
from trimtab.errors import ConfigError, DataError, UnknownNameError
from trimtab.evals import wilson
from trimtab.evals.tasks import evaluate_tasks
from trimtab.models.load import Base

WORDS = ["sea", "ship", "deep", "turns", "fine", "not", "named", "two", "how", "lines"]
TASKS = ["tiny_choice", "tiny_answer", "tiny_text"]
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
BODIES = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}} Answer:"
doc_to_choice: "{{options}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "Question: {{question}} Answer:"
doc_to_target: "{{options[gold]}}"
generation_kwargs: {until: ["e", "."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "tiny_beams": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], num_beams: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def documents() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "question": " ".join(draw.choices(WORDS, k=4)),
            "options": draw.sample(WORDS, 3),
            "gold": draw.randrange(3),
            "text": " ".join(draw.choices(WORDS, k=12 * (number + 1))),
        }
        for number in range(8)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with task files and their data."""
    pytest.importorskip("lm_eval")
    made = tmp_path_factory.mktemp("tasks")
    data = made / "documents.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents()))
    for name, body in BODIES.items():
        (made / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + body)
    (made / "tiny_lost.yaml").write_text(
        HEAD.format(name="tiny_lost", data=made / "nowhere.jsonl") + BODIES["tiny_text"]
    )
    (made / "both.yaml").write_text("group: both\ntask: [tiny_choice, tiny_answer]\n")
    return made


@pytest.fixture(autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def base() -> Base:
    made = kit.base(kit.llama(positions=64))
    adapter = attach(made.model, "lora(rank=2)", "a")
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            draw = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return made


@torch.no_grad()
def logprob(base: Base, context: list[int], answer: list[int]) -> float:
    """Σ log p of the answer's tokens, computed with nothing of ours."""
    ids = torch.tensor([[*context, *answer]])
    logits = base.model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, ids.shape[1] - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True))


def right_choices(base: Base) -> int:
    """How often the gold option is the likeliest."""
    hits = 0
    for one in documents():
        context = base.tokenizer(f"Question: {one['question']} Answer:")["input_ids"]
        scores = []
        for option in one["options"]:
            whole = base.tokenizer(f"Question: {one['question']} Answer: {option}")["input_ids"]
            scores.append(logprob(base, context, whole[len(context) :]))
        hits += scores.index(max(scores)) == one["gold"]
    return hits


def bits_per_byte(base: Base) -> float:
    """In windows of 64 tokens, each token predicted once with as much context as fits in its window."""
    total, size = 0.0, 0
    begin = base.tokenizer.bos_token_id
    for one in documents():
        ids = base.tokenizer(one["text"])["input_ids"]
        first = ids[:64]
        total += logprob(base, [begin], first)
        for start in range(64, len(ids), 64):
            answer = ids[start : start + 64]
            stop = start + len(answer)
            total += logprob(base, ids[stop - 65 : start], answer)
        size += len(one["text"].encode())
    return -total / size / math.log(2)


def right_answers(base: Base, adapter: str | None) -> int:
    params = SamplingParams(max_tokens=6, temperature=0, stop=("e", "."))
    hits = 0
    for one in documents():
        prompt = base.tokenizer(f"Question: {one['question']} Answer:")["input_ids"]
        (answer,) = Engine(base).sample([prompt], params, adapter)
        hits += answer.text == one["options"][one["gold"]]
    return hits


def test_each_adapters_numbers_are_those_computed_directly(base: Base, folder: Path) -> None:
    rows = evaluate_tasks(base, TASKS, (None, "a"), include=folder)
    assert [row.adapter for row in rows] == [None, "a"]
    values = []
    for row in rows:
        with using(base.model, row.adapter):
            assert row.metrics["tiny_choice acc"] == wilson(right_choices(base), 8)
            found = row.metrics["tiny_text bits_per_byte"]
            assert found.value == pytest.approx(bits_per_byte(base), rel=1e-5)
        assert row.metrics["tiny_answer exact_match"] == wilson(right_answers(base, row.adapter), 8)
        assert found.count == 8
        values.append(found.value)
    assert values[0] != pytest.approx(values[1], rel=1e-3)  # the adapter acted


@pytest.mark.filterwarnings("ignore")
def test_the_bare_base_scores_as_lm_evals_own_model(base: Base, folder: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with using(base.model, None):
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4),
            tasks=TASKS,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
    (ours,) = evaluate_tasks(base, TASKS, include=folder)
    for name, metric in zip(TASKS, ("acc", "exact_match", "bits_per_byte"), strict=True):
        value = theirs["results"][name][f"{metric},none"]
        assert ours.metrics[f"{name} {metric}"].value == pytest.approx(value, rel=1e-5), name


def test_groups_limits_and_the_second_of_two_is_as_alone(base: Base, folder: Path) -> None:
    (row,) = evaluate_tasks(base, ["both"], ("a",), include=folder, limit=3)
    assert {value.count for value in row.metrics.values()} == {3}
    assert set(row.metrics) == {"tiny_choice acc", "tiny_answer exact_match"}
    _, second = evaluate_tasks(base, ["both"], (None, "a"), include=folder, limit=3)
    assert second.metrics == row.metrics


def test_chat_prompts(base: Base, folder: Path) -> None:
    plain, chat = (
        evaluate_tasks(base, ["tiny_choice"], include=folder, chat=chat)[0]
        for chat in (False, True)
    )
    assert plain.metrics.keys() == chat.metrics.keys()


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (["tiny_chioce"], UnknownNameError, "Did you mean 'tiny_choice'"),
        (["tiny_lost"], DataError, "the data of tiny_lost cannot be read"),
        (["tiny_beams"], ConfigError, "generation option 'num_beams'"),
        ([], ConfigError, "at least one task"),
    ],
)
def test_what_cannot_be_run_is_a_typed_error(
    base: Base,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tasks: list[str],
    error: type[Exception],
    message: str,
) -> None:
    from lm_eval.tasks import TaskManager

    # Reading the index of lm-eval's own tasks takes half a minute.
    start = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda self, include_path=None, include_defaults=True: start(
            self, include_path=include_path, include_defaults=False
        ),
    )
    with pytest.raises(error, match=message):
        evaluate_tasks(base, tasks, include=folder)


def test_a_folder_that_is_none(base: Base, folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder of task files"):
        evaluate_tasks(base, ["x"], include=folder / "none")


def test_many_requests_are_asked_in_parts(
    base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = evaluate_tasks(base, TASKS, ("a",), include=folder)
    monkeypatch.setattr("trimtab.evals.harness.PART", 3)
    (parts,) = evaluate_tasks(base, TASKS, ("a",), include=folder)
    for name, value in whole.metrics.items():
        assert parts.metrics[name].value == pytest.approx(value.value, rel=1e-5), name


def test_an_encoder_has_no_likelihood_of_what_follows(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a causal model is needed"):
        evaluate_tasks(kit.base(kit.bert()), ["tiny_choice"], include=folder)


def test_without_lm_eval_the_extra_is_named(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.evals.tasks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[lm-eval\]'"):
        evaluate_tasks(base, ["arc_easy"])
