"""`trimtab eval` and `trimtab chat` on a tiny model: what they print, write and refuse."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Ran
from tests.data.kit import write_jsonl
from tests.engine import kit as engine_kit
from tests.train import kit
from trimtab.adapt.attach import attach, detach
from trimtab.cli.conversation import Conversation
from trimtab.data import RenderConfig, Renderer, load_examples
from trimtab.engine import Engine, SamplingParams
from trimtab.engine.sampling import end_ids
from trimtab.errors import DataError
from trimtab.evals import evaluate
from trimtab.models.load import load
from trimtab.train.events import read_events

MODEL = ("--model", "model")
BOTH = (*MODEL, "--adapter", "first", "--adapter", "second")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two adapters of one name, and data."""
    folder = tmp_path_factory.mktemp("home")
    kit.model_folder(folder / "model")
    kit.data_file(folder / "train.jsonl", 16)
    kit.data_file(folder / "held.jsonl", 8, seed=1)
    base = load(folder / "model", dtype="float32")
    for name, method in (("first", "lora(rank=2)"), ("second", "ia3")):
        adapter = attach(base.model, method, "small")
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                draw = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
        adapter.save(folder / name)
        detach(base.model, "small")
    return folder


@pytest.fixture
def run(run: Ran, monkeypatch: pytest.MonkeyPatch) -> Ran:
    monkeypatch.setenv("COLUMNS", "150")
    return run


# -- eval --------------------------------------------------------------------------------------------


def test_eval_measures_the_base_and_each_adapter(run: Ran, home: Path) -> None:
    code, out, err = run(
        "eval", *BOTH, "--data", "held.jsonl", "--metric", "f1", "--metric", "chrf",
        "--max-tokens", 3, "--out", "results.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    for text in ("base", "small", "second", "loss", "token accuracy", "f1_macro", "chrf", "n = 8"):
        assert text in out, text
    assert "second, by class" in out and "unreadable" in out
    assert "Always answering 'yes' would be right" in out
    found = json.loads((home / "results.json").read_text())
    assert found["adapters"] == {"small": "first", "second": "second"}  # a name twice
    assert [row["adapter"] for row in found["results"]] == [None, "small", "second"]
    base = load(home / "model")
    (bare,) = evaluate(base, list(load_examples(home / "held.jsonl", Renderer(base.tokenizer))))
    assert bare.held_out is not None
    assert found["results"][0]["loss"]["value"] == bare.held_out.loss.value
    assert set(found["results"][1]["metrics"]) == {"f1_macro", "f1_micro", "chrf"}
    assert len(found["references"]) == len(found["results"][2]["answers"]) == 8
    assert f"{bare.held_out.loss.value:.4g}" in out


def test_a_narrow_terminal_gets_the_table_on_its_side(
    run: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    options = ("--data", "held.jsonl", "--metric", "rouge", "--max-tokens", 2, "--no-base")
    code, out, _ = run("eval", *BOTH, *options)
    assert code == 0
    assert "token accuracy, n = 8" in out
    assert all(len(line) <= 70 for line in out.splitlines())
    assert "base" not in out


def test_eval_of_a_run_repeats_its_last_measurement(run: Ran, home: Path) -> None:
    code, _, _ = run(
        "train", *MODEL, "--data", "train.jsonl", "--held-out", "held.jsonl", "--method",
        "lora(rank=2)", "--out", "made", "--quiet", "eval.metric=[choice, f1]", "eval.limit=6",
        "optim.lr=1e-3", "batch.size=4", "data.max_tokens=60",
    )  # fmt: skip
    assert code == 0
    code, out, err = run("eval", "made", "--out", "made.json")
    assert (code, err) == (0, "")
    events = [e for e in read_events(home / "made" / "events.jsonl") if e["event"] == "eval"]
    rows = json.loads((home / "made.json").read_text())["results"]
    for row, event in zip(rows, (events[0], events[-1]), strict=True):
        for key in ("loss", "accuracy", "metrics"):
            assert row[key] == event[key], key
    assert rows[1]["metrics"]["choice"]["count"] == 6
    code, out, _ = run("eval", "made", "--data", "train.jsonl", "--limit", 8, "--adapter", "first")
    assert code == 0
    assert "n = 8" in out and "small" in out and "default" in out


def test_eval_of_tasks(run: Ran, home: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = home / "tasks"
    folder.mkdir(exist_ok=True)
    rows = [{"q": row["prompt"], "gold": row["completion"]} for row in kit.rows(5)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: ['yes', 'no']\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    code, out, _ = run(
        "eval", *BOTH, "--tasks", "mine", "--include", "tasks", "--data", "held.jsonl",
        "--out", "tasks.json", "--limit", 4,
    )  # fmt: skip
    assert code == 0
    assert "mine acc" in out and "loss" in out
    for row in json.loads((home / "tasks.json").read_text())["results"]:
        assert row["metrics"]["mine acc"]["count"] == row["loss"]["count"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run's folder, or give --model"),
        ([*MODEL], "give --data, or --tasks"),
        ([*MODEL, "--tasks", "x", "--metric", "f1"], "give --data as well"),
        (["model"], "model is not a run's folder"),
        ([*MODEL, "--adapter", "nowhere", "--data", "held.jsonl"], "nowhere is not an adapter"),
        ([*MODEL, "--data", "none.jsonl"], "none.jsonl"),
        ([*MODEL, "--data", "held.jsonl", "--metric", "rogue"], "Did you mean 'rouge'"),
        ([*MODEL, "--data", "held.jsonl", "--metric", "json"], "compares JSON objects"),
        ([*MODEL, "--data", "one.jsonl", "--metric", "f1"], "all 3 references are 'yes'"),
        ([*MODEL, "--data", "held.jsonl", "--no-base"], "--no-base leaves nothing"),
        ([*MODEL, "--data", "held.jsonl", "--out", "none/r.json"], "cannot be written"),
        ([*MODEL, "--tasks", "x", "--include", "none"], "'none' is not a folder of task files"),
    ],
)
def test_bad_input_is_one_line(run: Ran, home: Path, arguments: list[str], message: str) -> None:
    if "--include" in arguments:
        pytest.importorskip("lm_eval")
    write_jsonl(home / "one.jsonl", [row | {"completion": "yes"} for row in kit.rows(3)])
    code, out, err = run("eval", *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("trimtab: ") and err.count("\n") == 1
    assert out == ""


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['trimtab', *sys.argv[1:]]\n"
        "from trimtab.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('heavy', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    for command in ("eval", "chat"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True
        )
        assert "heavy []" in done.stdout


# -- chat --------------------------------------------------------------------------------------------

QUIET = ("--max-tokens", 6, "--temperature", 0)


def answers(run: Ran, *lines: str, options: tuple[object, ...] = QUIET) -> tuple[str, str]:
    code, out, err = run("chat", *BOTH, *options, lines="\n".join(lines))
    assert code == 0, err
    return out, err


def expected(home: Path, *turns: str, adapter: str | None, system: str | None = None) -> str:
    """A greedy answer of the library to a conversation."""
    talk = conversation(home, adapter)
    talk.system = system
    for place, turn in enumerate(turns):
        stream, _ = talk.ask(turn)
        said = "".join(stream)
        if place < len(turns) - 1:
            talk.keep(said.strip())
    return said


def conversation(home: Path, adapter: str | None = None) -> Conversation:
    base = load(home / "model")
    attach(base.model, __import__("trimtab").Adapter.load(home / "first"), "small")
    params = SamplingParams(max_tokens=6, temperature=0)
    return Conversation(Engine(base), Renderer(base.tokenizer, RenderConfig()), params, adapter)


def test_a_conversation_has_a_history_and_adapters_switch_inside(run: Ran, home: Path) -> None:
    out, err = answers(run, "Is it deep?", "/adapter none", "Is it fine?")
    talk = conversation(home, "small")
    first = "".join(talk.ask("Is it deep?")[0])
    talk.keep(first.strip())
    talk.adapter = None
    second = "".join(talk.ask("Is it fine?")[0])
    assert out == f"{first}\n{second}\n"
    assert "adapter 'small' answers" in err and "the base answers" in err
    alone, _ = answers(run, "/adapter none", "Is it fine?")
    assert alone != f"{second}\n"  # without the history it is another answer


def test_commands(run: Ran, home: Path) -> None:
    out, err = answers(
        run, "Hi", "/retry", "/reset", "Hi", "/adapters", "/system Be brief.", "/reset", "Hi",
        "//Hi", "/max 2", "/temperature 1.5", "/help", "/quit", "never read",
    )  # fmt: skip
    first, again, anew, brief, *rest = out.splitlines()
    assert first == again == anew
    assert "\n".join([brief]) == expected(home, "Hi", adapter="small", system="Be brief.")
    assert len(rest) == 1
    for text in ("* small", "  second", "none (the base)", "at most 2 tokens", "/save FILE"):
        assert text in err
    assert "never read" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adaptor x", "unknown command /adaptor. Did you mean 'adapter'"),
        ("/adapter smal", "no adapter 'smal'. Did you mean 'small'?"),
        ("/retry", "no question to answer again"),
        ("/save x.jsonl", "nothing to save yet"),
        ("/save", "takes a file name"),
        ("/temperature hot", "takes a number, found 'hot'"),
        ("/temperature -1", "temperature"),
        ("/max 0", "max_tokens"),
        ("word " * 200, "shorten it"),
    ],
)
def test_a_mistake_is_said_and_the_chat_goes_on(run: Ran, line: str, message: str) -> None:
    out, err = answers(run, line, "Hi")
    assert message in err
    assert len(out.splitlines()) == 1


def test_a_saved_conversation_trains(run: Ran, home: Path) -> None:
    path = home / "saved.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}')  # no line break at its end
    system = ("/system Be brief.", "Hi", "/save saved.jsonl", "And?", "/save saved.jsonl")
    _, err = answers(run, *system)
    assert "record 2 of saved.jsonl" in err and "record 3 of saved.jsonl" in err
    base = load(home / "model")
    renderer = Renderer(base.tokenizer)
    examples = load_examples(path, renderer)
    assert len(examples) == 3
    record = json.loads(path.read_text().splitlines()[2])
    assert [turn["role"] for turn in record["messages"]] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    code, _, _ = run(
        "train", *MODEL, "--data", "saved.jsonl", "--out", "from-chat", "--quiet", "steps=1"
    )
    assert code == 0


def test_a_seed_repeats_a_conversation(run: Ran) -> None:
    options = ("--max-tokens", 6, "--temperature", 1.2, "--seed", 5)
    lines = ("Hi", "Hi", "/retry")
    first, second = (answers(run, *lines, options=options)[0] for _ in range(2))
    assert first == second
    said = first.rstrip("\n").split("\n")  # a random answer may hold what else ends lines
    assert len(set(said)) == len(said) == 3  # each answer has its own draws


def test_the_oldest_turns_go_when_the_context_is_full(run: Ran, home: Path) -> None:
    talk = conversation(home)
    dropped = 0
    for number in range(6):
        stream, gone = talk.ask(f"This is question {number}, is it deep?")
        talk.keep("".join(stream).strip() or "yes")
        dropped += gone
        assert talk.history[-2].content.startswith(f"This is question {number}")
    assert dropped > 0
    assert len(talk.history) == 12 - dropped
    assert talk.history[0].role == "user"
    before = list(talk.history)
    with pytest.raises(DataError, match="shorten it"):
        talk.ask("word " * 200)
    assert talk.history == before
    _, err = answers(run, *(f"This is question {n}, is it deep?" for n in range(6)))
    assert "The context is full: the oldest 2 messages are forgotten." in err


def test_without_a_template_a_text_is_continued(run: Ran, home: Path) -> None:
    plain = home / "plain"
    base = load(home / "model", dtype="float32")
    base.tokenizer.chat_template = None
    base.model.save_pretrained(plain)
    base.tokenizer.save_pretrained(plain)
    lines = "The sea\nThe ship\n/save plain.jsonl\n/system x"
    code, out, err = run("chat", "--model", "plain", *QUIET, lines=lines)
    assert code == 0
    assert err.count("no chat template") == 1
    assert "no place for a system text" in err
    record = json.loads((home / "plain.jsonl").read_text())
    first, second = out.rstrip("\n").split("\n")
    assert record == {"prompt": f"The sea{first}\nThe ship", "completion": second}
    code, out, _ = run("generate", "--model", "plain", "--max-tokens", 6, "--plain", "The sea")
    assert out.strip() == first.strip()


# -- in a terminal -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that talks for long: thousands of positions, and no end token in reach."""
    folder = tmp_path_factory.mktemp("long")
    base = engine_kit.base(engine_kit.llama(positions=8192))
    with torch.no_grad():  # every other token is likelier than those that end an answer
        base.model.lm_head.weight *= 10
        base.model.lm_head.weight[end_ids(base.model, base.tokenizer)] = 0
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


class Terminal:
    """The real command in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from trimtab.cli import main; main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.shown = ""

    def until(self, text: str, *, seconds: float = 60) -> str:
        """What is shown from here to ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.shown[-500:]!r}"
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(long_model: Path) -> Iterator[Terminal]:
    made = Terminal("chat", "--model", str(long_model), "--max-tokens", "8000", "--seed", "1")
    yield made
    made.close()


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.until("[base] > ")
    terminal.type("Tell me more\n")
    terminal.until("Tell me more\r\n")
    time.sleep(1.0)
    terminal.process.send_signal(signal.SIGINT)
    said = terminal.until("Stopped; the conversation goes on from here.", seconds=20)
    assert len(said) > 20
    assert not set(said) & set("\x07\x08")  # what a model says does not command the terminal
    terminal.until("[base] > ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("Ctrl-D or /quit leaves.")
    terminal.type("/max 3\n")
    terminal.until("at most 3 tokens")
    terminal.type("And now?\n")
    terminal.until("Cut after 3 tokens")
    terminal.until("[base] > ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=20) == 0
