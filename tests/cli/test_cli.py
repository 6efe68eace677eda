"""The command line: each command on a tiny model, and errors as one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Ran
from tests.data.kit import write_jsonl
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach
from trimtab.models.load import load


@pytest.fixture(scope="module")
def adapter(home: Path) -> Path:
    """An adapter whose edits are not zero."""
    base = load(home / "model", dtype="float32")
    made = attach(base.model, "lora(rank=2)", "small")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05)
    return made.save(home / "small")


def test_help_is_quick_and_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['trimtab', *sys.argv[1:]]\n"
        "from trimtab.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('code', end.code)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy))\n"
    )
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["data", "preview", "--help"],
        ["compare", "--help"],
        ["sweep", "--help"],
        ["--version"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert "code 0" in done.stdout
        assert "heavy []" in done.stdout


def test_train_resume_and_generate(run: Ran, home: Path) -> None:
    options = [
        "--model",
        "model",
        "--data",
        "train.jsonl",
        "--held-out",
        "held.jsonl",
        "--method",
        "lora(rank=2)",
    ]
    code, out, err = run("train", *options, "--out", "made", "optim.lr=1e-3", "batch.size=4")
    assert (code, err) == (0, "")
    assert "adapter: made/adapter" in out
    assert "lora(rank=2, alpha=32)" in out
    code, out, _ = run("train", "made", "--resume")
    assert code == 0
    code, out, _ = run(
        "generate",
        "--model",
        "model",
        "--adapter",
        "made/adapter",
        "--max-tokens",
        "4",
        "sea",
        "ship",
    )
    assert code == 0
    assert "--- 2" in out
    (home / "recipe.yaml").write_text(
        "model: model\ndata: {path: train.jsonl}\nmethod: ia3\nbatch: {size: 8}\nout: other\n"
    )
    assert run("train", "recipe.yaml", "steps=1", "--quiet") == (0, "", "")
    assert Adapter.load(home / "other" / "adapter").method.kind == "ia3"


def test_merge(run: Ran, home: Path, adapter: Path) -> None:
    code, out, _ = run("merge", "model", adapter, "merged")
    assert code == 0
    assert "merged small into model: merged" in out
    merged = load(home / "merged", dtype="float32")
    base = load(home / "model", dtype="float32")
    ids = torch.arange(4, 20)[None]
    bare = base.model(input_ids=ids).logits
    attach(base.model, Adapter.load(adapter))
    with torch.no_grad():
        want = base.model(input_ids=ids).logits
        torch.testing.assert_close(merged.model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert float((want - bare).abs().max()) > 0.05
    code, _, err = run("merge", "model", adapter, "merged")
    assert code == 2
    assert "merged exists already" in err


def test_export(run: Ran, home: Path, adapter: Path) -> None:
    sizes = {}
    for bits in (None, 8, 4):
        out = home / f"shared-{bits}"
        code, shown, _ = run("export", adapter, "--out", out, *(["--bits", bits] if bits else []))
        assert code == 0 and str(out.name) in shown
        assert (f"{bits} bits, off by " in shown) == bool(bits)
        sizes[bits] = (out / "adapter_model.safetensors").stat().st_size
        code, shown, _ = run("inspect", out)
        assert code == 0 and ("rounded.error.rms" in shown) == bool(bits)
    assert sizes[4] < sizes[8] < sizes[None]
    assert run("export", adapter, "--out", home / "shared-8")[0] == 2
    code, _, error = run("export", adapter, "--out", home / "shared-3", "--bits", 3)
    assert code == 2 and "4 or 8 bits" in error


def test_inspect(run: Ran, adapter: Path) -> None:
    code, out, _ = run("inspect", adapter)
    assert code == 0
    for text in (
        "small",
        "rank=2",
        "2 × q_proj",
        "lora_A.weight",
        "2×64",
        "float32",
        "LlamaForCausalLM",
    ):
        assert text in out, text


def test_data_preview(run: Ran) -> None:
    code, out, _ = run("data", "preview", "train.jsonl", "--model", "model", "--rows", "2")
    assert code == 0
    assert out.startswith("train.jsonl: JSONL")
    assert out.count("⟦") == 2
    assert "of the first rows: 2 rows of prompt/completion: 2 used." in out
    everything = run("data", "preview", "train.jsonl", "train=all", "-m", "model", "-n", "1")[1]
    assert "⟦system" in everything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "model", "made"], "holds no run that has started"),
        (
            ["train", "--model", "model", "--data", "train.jsonl", "--track", "tensorbord"],
            "unknown tracker 'tensorbord'. Did you mean 'tensorboard'",
        ),
        (["train"], "name a recipe, or give --model and --data"),
        (["train", "missing.yaml"], "cannot read the recipe 'missing.yaml'"),
        (["train", "model"], "model is a folder; name a recipe file, or add --resume"),
        (
            ["train", "--model", "model", "--data", "train.jsonl", "optim.lrr=1"],
            "Did you mean 'lr'?",
        ),
        (
            ["train", "--model", "model", "--data", "train.jsonl", "--method", "lorra"],
            "Did you mean 'lora'",
        ),
        (
            ["train", "--model", "model", "--data", "train.jsonl", "--method", "lora(rnk=2)"],
            "Did you mean 'rank'",
        ),
        (
            ["train", "--model", "model", "--data", "none.jsonl"],
            "there is no file or folder 'none.jsonl'. Did you mean 'held.jsonl'",
        ),
        (
            ["train", "--model", "none/none", "--data", "train.jsonl"],
            "neither a folder here nor a model",
        ),
        (["inspect", "model"], "adapter_config.json"),
        (
            ["generate", "--model", "model", "--adapter", "nowhere", "hi"],
            "nowhere is not an adapter folder",
        ),
        (
            ["generate", "--model", "model", "--schema", "none.json", "hi"],
            "cannot read the schema 'none.json'",
        ),
        (["generate", "--model", "model", "--schema", "train.jsonl", "hi"], "is no JSON"),
        (["data", "preview", "train.jsonl", "train=al", "--model", "model"], "data.train"),
        (["data", "stats", "train.jsonl"], "name the model whose tokenizer"),
        (
            ["recipe", "init", "-m", "m", "-d", "train.jsonl", "-t", "chta", "-o", "-"],
            "Did you mean 'chat'",
        ),
        (
            ["recipe", "init", "-m", "m", "-d", "train.jsonl", "-t", "text", "-o", "-"],
            "is for plain text",
        ),
        (["recipe", "check", "train.jsonl"], "train.jsonl"),
        (["recipe", "schema", "-o", "none/s.json"], "cannot write none/s.json: No such file"),
        (
            ["recipe", "init", "-m", "m", "-d", "train.jsonl", "-o", "none/r.yaml"],
            "cannot write none/r.yaml: No such file",
        ),
        (["plan", "--model", "model"], "data: Field required"),
    ],
)
def test_errors_are_one_line_and_code_2(run: Ran, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("trimtab: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_command_cleanly(
    run: Ran, home: Path, which: signal.Signals
) -> None:
    out = f"signalled-{which.name}"
    options = ["--model", "model", "--data", "train.jsonl", "steps=4000", f"out={out}"]
    options += ["checkpoint.every=2000", "eval.forgetting=false"]
    child = subprocess.Popen(
        [sys.executable, "-m", "trimtab", "train", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    events = home / out / "events.jsonl"
    while not (events.exists() and '"event": "step"' in events.read_text()):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(which)
    said, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "resume the run to go on" in said
    assert "Traceback" not in errors
    noted = [json.loads(line) for line in events.read_text().splitlines()]
    (stopped,) = [event["step"] for event in noted if event["event"] == "interrupted"]
    kept = [path.name for path in (home / out / "checkpoints").iterdir()]
    assert kept == [f"step-{stopped:06d}"]
    assert "Not finished" in (home / out / "report.html").read_text()


def test_all_bad_rows_are_listed(run: Ran, home: Path) -> None:
    write_jsonl(home / "bad.jsonl", ["{", {"prompt": "a", "completion": " "}, {"messages": []}])
    code, _, err = run("train", "--model", "model", "--data", "bad.jsonl")
    assert code == 2
    assert "3 of 3 rows of bad.jsonl cannot be used" in err
    for number in (1, 2, 3):
        assert f"bad.jsonl:{number}" in err


def test_chat_rows_need_a_template(run: Ran, home: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(home / "chat.jsonl", [{"messages": turns}])
    plain = home / "plain"
    if not plain.exists():
        base = load(home / "model", dtype="float32")
        base.tokenizer.chat_template = None
        base.model.save_pretrained(plain)
        base.tokenizer.save_pretrained(plain)
    code, _, err = run("train", "--model", "plain", "--data", "chat.jsonl")
    assert code == 2
    assert "the tokenizer has no chat template" in err


def test_other_errors_keep_their_traceback(run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("trimtab.train.api"), "train_recipe", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("train", "--model", "model", "--data", "train.jsonl")
