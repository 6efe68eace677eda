"""The walks of CONTRIBUTING.md, walked: its code blocks become packages that another process finds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).parents[1]
SOURCES = Path(trimtab.__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()

METHOD = """
import torch
import trimtab as tt
from pathlib import Path
from tests import tiny as models
from tests.laws.cells import shaken
from tests.tiny import output
from trimtab.adapt.probe import bare_state

assert "ssf" in tt.methods()
model, ids = models.llama(), {"input_ids": torch.arange(3, 19).reshape(2, 8)}
base = output(model, ids)
a = tt.attach(model, "ssf(targets='attention')", "a")
assert torch.equal(output(model, ids), base) and a.count == 2 * 3 * (32 + 16 + 16 + 32)

before = {name: tensor.clone() for name, tensor in bare_state(model).items()}
optimiser = torch.optim.AdamW(a.parameters(), lr=0.05)
losses = []
for _ in range(5):
    loss = model(**ids, labels=ids["input_ids"]).loss
    loss.backward()
    losses.append(float(loss.detach()))
    optimiser.step()
    optimiser.zero_grad()
assert losses[-1] < losses[0]
assert all(torch.equal(tensor, before[name]) for name, tensor in bare_state(model).items())

expected = output(model, ids)
assert torch.allclose(output(tt.merge(model, "a"), ids), expected, atol=1e-5)
a.save("a")
fresh = models.llama()
tt.attach(fresh, tt.Adapter.load("a"))
assert torch.equal(output(fresh, ids), expected)

shaken(tt.attach(model, "lora(rank=2)", "b"))
with tt.rows(model, ["b", "a"]):
    mixed = output(model, ids)
for row, name in enumerate("ba"):
    with tt.using(model, name):
        assert torch.allclose(mixed[row], output(model, ids)[row], atol=1e-5)
twice = tt.add([a, a], name="twice")
assert torch.allclose(twice.tensors["model.layers.0.self_attn.q_proj.ssf_scale"],
                      2 * a.tensors["model.layers.0.self_attn.q_proj.ssf_scale"])
"""

BACKEND = """
import torch
import trimtab as tt
from torch import nn
from tests import tiny as models
from tests.laws.cells import shaken
from tests.tiny import output
from trimtab.frozen import view
from trimtab_int8 import Int8Layer, Int8Linear

dense, model = models.llama(attention_bias=True), models.llama(attention_bias=True)
for module in list(model.model.layers.modules()):
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
assert type(view(model.model.layers[0].self_attn.q_proj)) is Int8Layer
ids = {"input_ids": torch.arange(3, 19).reshape(2, 8)}
base = output(model, ids)
for method in ("lora(rank=2)", "dora(rank=2)", "ia3"):
    adapter = shaken(tt.attach(model, method, "a"), 0.03)
    expected = output(model, ids)
    assert not torch.allclose(expected, base, atol=1e-3)
    merged = tt.merge(model, "a")
    assert torch.allclose(output(merged, ids), expected, atol=1e-4), method
    assert type(merged.model.layers[0].self_attn.k_proj) is nn.Linear
    expected.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    tt.detach(model, "a")
    tt.attach(dense, adapter.detached(), "a")   # the same weights, stored otherwise
    assert (output(dense, ids) - expected).norm() < 0.05 * expected.norm()
    tt.detach(dense, "a")
assert torch.equal(output(model, ids), base)
"""


def blocks(language: str) -> dict[str, str]:
    """Code blocks by the name in their first line."""
    found = re.findall(rf"^```{language}\n# (\S+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return dict(found)


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of both walks, as an installer leaves them."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name, code in blocks("python").items():
        (folder / name).write_text(code)
    for name, text in blocks("toml").items():
        groups = tomllib.loads(text)["project"]["entry-points"]
        info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        lines = [
            line
            for group, points in groups.items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def python(site_packages: Path, cwd: Path, *arguments: str) -> str:
    path = os.pathsep.join(map(str, (site_packages, SOURCES, ROOT)))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_both_walks_are_there() -> None:
    assert blocks("python").keys() == {"trimtab_ssf.py", "trimtab_int8.py"}
    assert blocks("toml").keys() == {"trimtab-ssf", "trimtab-int8"}


def test_a_method_is_about_sixty_lines() -> None:
    assert len(blocks("python")["trimtab_ssf.py"].splitlines()) <= 60


def test_the_method_merges_saves_loads_mixes_and_trains(
    site_packages: Path, tmp_path: Path
) -> None:
    python(site_packages, tmp_path, "-W", "error", "-c", METHOD)


def test_every_method_works_on_the_backend(site_packages: Path, tmp_path: Path) -> None:
    python(site_packages, tmp_path, "-W", "error", "-c", BACKEND)


def test_the_laws_find_the_method(site_packages: Path) -> None:
    printed = python(
        site_packages, ROOT, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
        "tests/laws/test_laws.py", "-k", "ssf and llama",
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None and int(passed[1]) >= 12, printed


def test_the_code_is_in_our_style(site_packages: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    files = [str(site_packages / name) for name in blocks("python")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *command, "--config", str(ROOT / "pyproject.toml"), *files],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
