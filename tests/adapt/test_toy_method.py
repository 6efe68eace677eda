"""A new method in one file of another package, about twenty lines, gets every feature there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import trimtab
from tests.train import kit

ROOT = Path(__file__).parents[2]
SOURCES = Path(trimtab.__file__).parents[1]

TOY = '''"""Gain (ours): a learned gain on each output channel of frozen layers.

    y' = (1 + g) ⊙ y,   g starts at 0

A toy: what it does not say follows from the edit.
"""
from typing import ClassVar

from trimtab.adapt.contract import Method, Spec, zeros


class Gain(Method):
    """``gain(targets="mlp_down")``."""

    kind: ClassVar[str] = "gain"
    lr: ClassVar[float] = 0.02
    weight_decay: ClassVar[float] = 0.125
    short_names: ClassVar = {"gain": "g"}
    targets: str | tuple[str, ...] = "all-linear"

    def tensors(self, layer, role):
        return {"g": Spec("gain", (layer.out_features,), zeros)}

    def leave(self, p, y, at):
        return y * at.layer.over_out(1 + p["g"])

    def scaled(self, p, weight, role):
        return {"g": weight * p["g"]}
'''

FEATURES = """
import torch

import trimtab as tt
from tests import tiny as models
from tests.laws.cells import attached, shaken, Cell
from tests.tiny import CASES, output, pick
from trimtab.adapt.probe import bare_state
from trimtab.errors import UnknownNameError

# the string form, a mapping, a value; and a mistake
assert "gain" in tt.methods()
gain = tt.method("gain(targets='mlp')")
assert gain == tt.method("gain(targets=['mlp'])").replace(targets="mlp") and gain.lr == 0.02
try:
    tt.method("gain(target='mlp')")
    raise AssertionError
except UnknownNameError as error:
    assert "Did you mean 'targets'" in str(error)

# attach, on every kind of layer; merge, one in a mixed batch, disabled, detached; the base as it was
for name in ("llama", "gpt2", "bert", "t5", "mixtral", "mixed"):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    targets = "re:[a-z_0-9]+" if name == "mixed" else "all-linear"
    before = {key: tensor.clone() for key, tensor in bare_state(model).items()}
    with torch.no_grad():
        base = output(model, inputs)
        adapter = tt.attach(model, {"kind": "gain", "targets": targets}, "a")
        assert torch.equal(output(model, inputs), base), name  # it starts as the identity
        shaken(adapter)
        expected = output(model, inputs)
        assert not torch.allclose(expected, base), name
        assert torch.allclose(output(tt.merge(model, "a"), inputs), expected, atol=1e-6), name
        if name in ("llama", "bert", "mixed"):
            attached(Cell("lora", name), model, "b", seed=2)
            with tt.rows(model, ["b", "a", None, "a"]):
                mixed = output(model, inputs)
            for row, who in enumerate(["b", "a", None, "a"]):
                with tt.using(model, who):
                    assert torch.allclose(mixed[row], output(model, pick(inputs, [row]))[0]), name
        tt.disable(model, "a")
        with tt.using(model, None):
            assert torch.equal(output(model, inputs), base), name
    tt.detach(model, "a")
    assert all(torch.equal(tensor, before[key]) for key, tensor in bare_state(model).items())

# saved and loaded, scaled by value and by number, stacked
model, inputs = models.llama(), CASES["llama"].inputs()
a = shaken(tt.attach(model, gain, "a"))
expected = output(model, inputs)
a.save("saved")
again = tt.Adapter.load("saved")
assert again == a and again.method == gain
fresh = models.llama()
tt.attach(fresh, again)
assert torch.equal(output(fresh, inputs), expected)
tt.scale(model, "a", 0.5)
half = models.llama()
tt.attach(half, tt.scaled(a, 0.5))
assert torch.allclose(output(half, inputs), output(model, inputs), atol=1e-6)
tt.scale(model, "a", 1.0)
assert f"{a.count:,} parameters" in tt.describe(model) and "gain: " in tt.resolve(fresh, gain)

# trained in one batch with others ≡ trained alone
b = shaken(tt.attach(model, "bottleneck(size=4)", "b"))
def gradients(rows, who):
    for parameter in model.parameters():
        parameter.grad = None
    with who:
        output(model, pick(inputs, rows)).tanh().flatten(1).sum(1).sum().backward()
    return {key: tensor.grad for key, tensor in a.tensors.items()}
together = gradients([0, 1, 2, 3], tt.rows(model, ["a", "b", None, "a"]))
alone = gradients([0, 3], tt.using(model, "a"))
assert all(torch.allclose(together[key], alone[key], atol=1e-5) for key in alone)
assert any(bool(gradient.any()) for gradient in alone.values())

# inside a gate, and beside a module that is trained in full
gated = tt.attach(models.llama(), "spottune(inner=gain(targets='mlp'), hidden=4)", "gated")
assert any(key.endswith(".gain") for key in gated.tensors)
headed = tt.attach(models.llama_classifier(), "gain(train=['score'])", "headed")
assert any("score" in key for key in headed.tensors)
"""


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from trimtab.cli import app

done = [CliRunner().invoke(app, command, catch_exceptions=False) for command in json.loads(sys.argv[1])]
print(json.dumps([(one.exit_code, one.stdout) for one in done]))
"""


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as an installer leaves it."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "toy_gain.py").write_text(TOY, encoding="utf-8")
    info = folder / "toy_gain-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-gain\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[trimtab.methods]\ngain = toy_gain:Gain\n")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    kit.model_folder(folder / "model")
    kit.data_file(folder / "train.jsonl", 12)
    return folder


def python(site_packages: Path, cwd: Path, *arguments: str) -> str:
    path = os.pathsep.join(map(str, (site_packages, SOURCES, ROOT)))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "140"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_it_is_about_twenty_lines() -> None:
    code = TOY.split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20


def test_it_gets_every_feature_of_the_library(site_packages: Path, tmp_path: Path) -> None:
    python(site_packages, tmp_path, "-W", "error", "-c", FEATURES)


def test_the_command_line_lists_shows_trains_and_merges_it(site_packages: Path, home: Path) -> None:
    (home / "recipe.yaml").write_text(
        "model: model\ndata: {path: train.jsonl}\nmethod: gain(targets='mlp')\nout: run\nsteps: 2\n"
    )
    commands = [
        ["methods"],
        ["methods", "show", "gain(targets='mlp')", "--model", "model", "--json"],
        ["train", "recipe.yaml", "--quiet"],
        ["inspect", "run/adapter"],
        ["merge", "model", "run/adapter", "merged"],
    ]
    printed = json.loads(
        python(site_packages, home, "-W", "error", "-c", COMMANDS, json.dumps(commands))
    )
    assert [code for code, _ in printed] == [0] * len(commands), printed
    listed, sheet, _, held, _ = (text for _, text in printed)
    assert "a learned gain on each output channel" in " ".join(listed.split()) and "gain" in held
    facts = json.loads(sheet)
    assert (facts["title"], facts["source"]) == ("Gain", "ours")
    assert (facts["lr"], facts["weight_decay"], facts["merges"]) == (0.02, 0.125, True)
    assert facts["edits"] == ["leave"] and facts["first_values"] == {"gain": "All zeros"}
    recipe = yaml.safe_load((home / "run" / "recipe.yaml").read_text())
    assert recipe["method"]["kind"] == "gain"  # and its own defaults are used
    assert (recipe["optim"]["lr"], recipe["optim"]["weight_decay"]) == (0.02, 0.125)
    trained = load_file(home / "run" / "adapter" / "adapter_model.safetensors")
    assert facts["size"]["parameters"] == sum(tensor.numel() for tensor in trained.values())
    assert all(bool(tensor.any()) for tensor in trained.values())
    assert (home / "merged" / "config.json").is_file()
