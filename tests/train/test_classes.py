"""A sequence classifier from labelled rows to a report: recipes, labels, resume, files, eval."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import trimtab as tt
from tests.data.kit import write_jsonl
from tests.train.kit import at_step, go, model_folder, steps_of
from trimtab.adapt.adapter import Adapter
from trimtab.data import ClassRenderer, PythonRows, labels_in, load_examples, preview
from trimtab.data.examples import ExampleConfig
from trimtab.engine import Engine
from trimtab.errors import ConfigError, DataError, ModelError
from trimtab.evals import evaluate
from trimtab.models.load import load, load_tokenizer
from trimtab.train.plan import plan
from trimtab.train.recipe import Recipe
from trimtab.train.recipe_file import make_recipe
from trimtab.train.run import Outcome
from trimtab.train.setup import with_head
from trimtab.train.sweep.api import sweep_recipe
from trimtab.train.sweep.config import SweepConfig
from trimtab.train.sweep.record import Asked

WORDS = [
    *("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
    *("sea", "ship", "deep", "turns", "fine"),
    *("not", "named", "two", "how", "lines"),
]
GOOD, BAD = WORDS[4:9], WORDS[9:14]


def encoder(path: Path) -> Path:
    """A BERT without a head, and its tokenizer, as a model folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=0, initializer_range=0.1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(path)  # fmt: skip
    return path


def rows(count: int, *, seed: int = 0, labels: Sequence[Any] = ("bad", "good")) -> list[Any]:
    draw = random.Random(seed)
    made: dict[str, Any] = {}
    while len(made) < count:
        good = draw.random() < 0.5
        words = [draw.choice(GOOD if good else BAD) for _ in range(draw.randrange(2, 8))]
        made[" ".join(words)] = labels[good]
    return [{"text": text, "label": label} for text, label in made.items()]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, a decoder, and labelled texts."""
    folder = tmp_path_factory.mktemp("classes")
    encoder(folder / "bert")
    model_folder(folder / "llama")
    write_jsonl(folder / "train.jsonl", rows(64))
    write_jsonl(folder / "held.jsonl", rows(16, seed=1))
    return folder


def recipe(job: Path, out: Path, **options: Any) -> Recipe:
    values = {
        "model": str(job / "bert"),
        "task": "sequence-classification",
        "data": {"path": str(job / "train.jsonl"), "held_out": str(job / "held.jsonl")},
        "method": {"kind": "lora", "rank": 2, "dropout": 0.1},
        "dtype": "float32",
        "epochs": 3,
        "batch": {"size": 8},
        "optim": {"lr": 3e-3},
        "eval": {"every": 8, "samples": 2, "metric": ["choice", "f1"]},
        "checkpoint": {"every": 5},
        "out": str(out),
    }
    return make_recipe(values, {key.replace("__", "."): value for key, value in options.items()})


@pytest.fixture(scope="module")
def straight(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return go(recipe(job, tmp_path_factory.mktemp("runs") / "straight"))


# -- the run ---------------------------------------------------------------------------------------


def test_it_learns_and_says_what_it_learnt(straight: Outcome) -> None:
    before, after = straight.before, straight.after
    assert before is not None
    assert after is not None
    assert after.answers is not None
    assert after.answers.interval.value > 0.9
    assert after.held_out.loss.high < before.held_out.loss.low
    assert after.held_out.accuracy.value == after.answers.interval.value
    assert set(after.metrics) == {"choice", "f1_macro", "f1_micro"}
    assert {sample.answer for sample in after.samples} <= {"bad", "good"}
    saved = yaml.safe_load((straight.folder / "recipe.yaml").read_text())
    assert saved["data"]["labels"] == ["bad", "good"]
    assert saved["method"]["train"] == ["head"]
    page = (straight.folder / "report.html").read_text()
    for words in ("text accuracy", "nats per text", "share of texts", "2: bad, good", "[CLS]"):
        assert words in page, words
    assert "token accuracy" not in page


def test_the_adapter_folder_is_whole(straight: Outcome, job: Path) -> None:
    adapter = Adapter.load(straight.folder / "adapter")
    heads = [key for key in adapter.tensors if key.startswith("classifier.")]
    assert len(heads) == 2
    assert (
        json.loads((straight.folder / "adapter" / "adapter_config.json").read_text())["task_type"]
        == "SEQ_CLS"
    )
    base = load(
        job / "bert", dtype="float32", task="sequence-classification", labels=("bad", "good")
    )
    tt.attach(base.model, adapter)
    data = load_examples(job / "held.jsonl", ClassRenderer(base.tokenizer, Engine(base).labels))
    (found,) = evaluate(base, data, ["default"], metrics=["f1"])
    assert straight.after is not None
    assert found.held_out == straight.after.held_out
    assert found.metrics["f1_macro"] == straight.after.metrics["f1_macro"]


def test_an_interrupted_run_resumes_bitwise(job: Path, straight: Outcome, tmp_path: Path) -> None:
    def stop(run: Any) -> None:
        raise KeyboardInterrupt

    wanted = recipe(job, tmp_path / "broken")
    with at_step(8, stop), pytest.raises(KeyboardInterrupt):
        go(wanted)
    done = go(wanted, resume=True)
    assert Adapter.load(done.folder / "adapter") == Adapter.load(straight.folder / "adapter")
    assert steps_of(done.folder) == steps_of(straight.folder)


def test_a_decoder_and_labels_that_are_numbers(job: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "n.jsonl", rows(64, labels=(-1, 1)))
    done = go(
        recipe(
            job,
            tmp_path / "run",
            model=str(job / "llama"),
            data={"path": str(tmp_path / "n.jsonl"), "fraction": 0.3},
            method="ia3",
            optim__lr=5e-2,
        )
    )
    assert done.after is not None
    assert done.after.held_out.accuracy.value > 0.8
    saved = yaml.safe_load((done.folder / "recipe.yaml").read_text())
    assert saved["data"]["labels"] == ["-1", "1"]
    assert any(key.startswith("score.") for key in Adapter.load(done.folder / "adapter").tensors)


def test_a_stream(job: Path, tmp_path: Path) -> None:
    done = go(
        recipe(job, tmp_path / "run", data__stream=True, data__labels=["good", "bad"], steps=16)
    )
    assert done.after is not None
    assert done.after.held_out.accuracy.value > 0.8
    assert done.after.samples[0].reference in ("good", "bad")


def test_a_plan_of_it(job: Path, tmp_path: Path) -> None:
    found = plan(recipe(job, tmp_path / "unused"))
    assert found.steps == 24
    assert ("classes", "2: bad, good") in found.rows
    assert found.times is not None and found.times.measuring > 0


def test_from_python(job: Path, tmp_path: Path) -> None:
    base = load(
        job / "bert", dtype="float32", task="sequence-classification", labels=("bad", "good")
    )
    adapter = tt.attach(base.model, "lora(rank=2, train=('head',))", name="a")
    done = tt.train(
        base, adapter, rows(16), held_out=rows(8, seed=1), out=tmp_path / "run", lr=1e-2, quiet=True
    )
    assert done.after is not None
    shares = Engine(base).classify([base.tokenizer("fine sea ship")["input_ids"]], "a")
    assert sum(shares[0]) == pytest.approx(1)


# -- loading ---------------------------------------------------------------------------------------


def test_a_new_head_is_the_same_each_time_and_in_any_dtype(job: Path) -> None:
    kinds = ("float32", "float32", "bfloat16")
    heads = []
    for number, kind in enumerate(kinds):
        torch.manual_seed(number)
        base = load(
            job / "bert", dtype=kind, task="sequence-classification", labels=("a", "b", "c")
        )
        heads.append(base.model.classifier.weight)
        assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0].bfloat16(), heads[2])
    decoder = load(job / "llama", task="sequence-classification", labels=("a", "b"))
    assert decoder.model.config.pad_token_id == decoder.tokenizer.pad_token_id


def test_labels_that_do_not_fit_the_head(job: Path, tmp_path: Path) -> None:
    base = load(job / "bert", task="sequence-classification", labels=("a", "b", "c"))
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert Engine(load(tmp_path, task="sequence-classification")).labels == ("a", "b", "c")
    with pytest.raises(ModelError, match=r"2 tensors .*classifier.*leave the labels out"):
        load(tmp_path, task="sequence-classification", labels=("a", "b"))
    with pytest.raises(ConfigError, match="labels are for a classification head"):
        load(job / "bert", task="masked-lm", labels=("a", "b"))


# -- data ------------------------------------------------------------------------------------------


def test_texts_are_cut_within_their_special_tokens(job: Path) -> None:
    renderer = ClassRenderer(load_tokenizer(job / "bert"), ("bad", "good"))
    source = PythonRows([{"text": "sea ship deep turns", "label": "good"}])
    for side, kept in (("right", [4, 5]), ("left", [6, 7])):
        config = ExampleConfig(context=4, too_long=side)
        (datum,) = load_examples(source, renderer, config)
        assert datum.tokens == (1, *kept, 2)
        assert datum.targets[-1] == 1
        assert datum.weights == (0, 0, 0, 1)
        assert "⟦good⟧" in str(preview(datum, renderer.tokenizer, renderer.labels))
        assert datum.prompt == 4


def test_rows_that_are_no_labelled_texts(job: Path) -> None:
    renderer = ClassRenderer(load_tokenizer(job / "bert"), ("bad", "good"))

    def read(row: dict[str, Any]) -> None:
        load_examples(PythonRows([row]), renderer)

    with pytest.raises(DataError, match="the label 'fair' is not one of 0 \\(bad\\), 1 \\(good\\)"):
        read({"text": "sea", "label": "fair"})
    with pytest.raises(ConfigError, match="learns from labelled texts .* this is text"):
        read({"text": "sea"})
    with pytest.raises(ConfigError, match="label 0.5 is no class"):
        read({"text": "sea", "label": 0.5})
    with pytest.raises(DataError, match="token types"):
        read({"text": "sea", "text_pair": "ship", "label": "good"})
    with pytest.raises(ConfigError, match="two labels or more"):
        ClassRenderer(load_tokenizer(job / "bert"), ("good",))


def test_labels_are_found_in_order() -> None:
    found = [{"text": "a", "label": n} for n in (10, 2, 2, -1)]
    assert labels_in([PythonRows(found)]) == ("-1", "2", "10")
    named = [{"text": "a", "label": name} for name in ("b", "2", "a")]
    assert labels_in([PythonRows(named[:1]), PythonRows(named)]) == ("2", "a", "b")
    with pytest.raises(DataError, match="two labels or more; found b"):
        labels_in([PythonRows(named[:1])])


def test_recipes_that_cannot_be() -> None:
    values = {"model": "m", "task": "sequence-classification", "data": {"path": "d"}}
    with pytest.raises(ConfigError, match="sees the text alone"):
        make_recipe(values, {"data.instruction": "Good?"})
    with pytest.raises(ConfigError, match=r"set data\.labels"):
        make_recipe(values, {"data.stream": True, "steps": 3})


def test_the_head_is_trained_unless_the_method_says_otherwise(job: Path) -> None:
    from trimtab.adapt.tree import anatomy_of

    base = load(job / "bert", task="sequence-classification", labels=("a", "b"))
    anatomy = anatomy_of(base.model)
    assert with_head(tt.method("lora"), anatomy).train == ("head",)
    assert with_head(tt.method("houlsby(size=4)"), anatomy).train == ("norms", "head")
    chosen = tt.method("lora(train=('pooler', 'classifier'), targets='attention')")
    assert with_head(chosen, anatomy) == chosen
    assert with_head(tt.method("full(targets=('classifier',))"), anatomy).train == ()


def test_variants_of_a_classifier_are_trained_together(job: Path, tmp_path: Path) -> None:
    alone = go(recipe(job, tmp_path / "alone", method="lora(rank=2)", steps=6))
    values = recipe(job, tmp_path, method="lora(rank=2)", steps=6).model_dump(mode="json")
    asked = Asked(
        {key: value for key, value in values.items() if key != "out"},
        {"optim.lr": [1e-4, 3e-3]},
        SweepConfig(eta=1),
    )
    done = sweep_recipe(asked, out=tmp_path / "sweep", quiet=True)
    assert done.winner is not None and alone.after is not None
    assert done.entries[1].loss == pytest.approx(alone.after.held_out.loss.value, rel=1e-5)
    own, other = (
        Adapter.load(folder / "adapter").tensors
        for folder in (alone.folder, tmp_path / "sweep" / "variants" / "001")
    )
    assert any(key.startswith("classifier") for key in own)
    for key, tensor in own.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=2e-5)
    write_jsonl(job / "other.jsonl", rows(16, seed=4, labels=("no", "yes")))
    paths = {"data.path": [str(job / "train.jsonl"), str(job / "other.jsonl")]}
    with pytest.raises(ConfigError, match="different labels"):
        sweep_recipe(replace(asked, options=paths), out=tmp_path / "labels", quiet=True)
