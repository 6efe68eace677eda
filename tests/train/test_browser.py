"""The pages in a real browser: laid out, in place, readable on a desk and on a telephone, loading nothing."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.train import kit
from trimtab.train.api import train_recipe
from trimtab.train.compare import Comparison
from trimtab.train.events import read_events

WIDTHS = (390, 1200)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome here")

LISTEN = """<script>
var troubles = [];
addEventListener("error", e => troubles.push(e.message || "cannot load " + e.target.outerHTML), true);
</script>"""

MEASURE = """<script>
addEventListener("load", () => {
  const all = (what, within) => [...(within || document).querySelectorAll(what)];
  const box = one => { const b = one.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const meet = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const shown = all(".labels span").map(one => [one, box(one)]);
  const crossed = [];
  shown.forEach(([one, a], n) => shown.slice(n + 1).forEach(([two, b]) => {
    if (one.parentNode === two.parentNode && meet(a, b)) crossed.push(one.textContent + "/" + two.textContent);
  }));
  const facts = {
    troubles, crossed,
    loaded: performance.getEntriesByType("resource").length,
    width: innerWidth, needed: document.documentElement.scrollWidth,
    sections: Object.fromEntries(all("section").map(one => [one.id || "tiles", one.offsetHeight])),
    charts: all(".chart").map(one => ({
      size: [one.offsetWidth, one.offsetHeight],
      lines: all("polyline", one).map(line => line.points.numberOfItems),
      dots: all(".dot", one).length,
      inside: all("svg :not(title)", one).every(part => {
        const a = box(part), b = box(one);
        return a[0] >= b[0] - 1 && a[1] >= b[1] - 1 && a[2] <= b[2] + 1 && a[3] <= b[3] + 1;
      }),
      smallest: Math.min(...all(".labels span", one).map(text => parseFloat(getComputedStyle(text).fontSize))),
    })),
    colours: [...new Set(all(".line").map(one => getComputedStyle(one).stroke))],
    paper: getComputedStyle(document.body).backgroundColor,
  };
  parent.document.getElementById("facts").textContent += JSON.stringify(facts) + "\\n";
});
</script>"""


def browse(page: Path, *options: str) -> list[dict[str, Any]]:
    """What the browser measures in a page at each of `WIDTHS`."""
    assert BROWSER is not None
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{LISTEN}") + MEASURE
    frames = "".join(
        f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in WIDTHS
    )
    frame = page.with_name(f"framed-{page.name}")
    frame.write_text(f'<meta charset="utf-8"><pre id="facts"></pre>{frames}', encoding="utf-8")
    profile = page.with_name("browser")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--window-size=1280,900", *options,
            "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    shutil.rmtree(profile, ignore_errors=True)
    found = re.search(r'<pre id="facts">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    facts = [json.loads(line) for line in html.unescape(found[1]).splitlines()]
    assert sorted(fact["width"] for fact in facts) == sorted(WIDTHS)
    return sorted(facts, key=lambda fact: fact["width"])


def check(facts: dict[str, Any]) -> None:
    """What holds of every page of ours at every width."""
    assert facts["troubles"] == []
    assert facts["loaded"] == 0
    assert facts["needed"] <= facts["width"], "it must be scrolled sideways"
    assert all(height > 40 for height in facts["sections"].values()), facts["sections"]
    assert facts["crossed"] == [], "labels of a chart cover each other"
    for chart in facts["charts"]:
        assert chart["inside"]
        assert chart["size"][0] > 150
        assert chart["size"][1] > 100
        assert chart["smallest"] >= 11


@pytest.fixture(scope="module")
def runs(job: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny runs of 12 steps."""
    home = tmp_path_factory.mktemp("browsed")
    return [
        train_recipe(
            kit.recipe(job, "x", out=str(home / f"run-{rank}"), method__rank=rank, eval__metric="choice"),
            quiet=True,
        ).folder
        for rank in (2, 4)
    ]  # fmt: skip


def test_the_report(runs: list[Path]) -> None:
    events = read_events(runs[0] / "events.jsonl")
    count = {kind: sum(e["event"] == kind for e in events) for kind in ("step", "eval")}
    phone, desk = browse(runs[0] / "report.html")
    for facts in (phone, desk):
        check(facts)
        assert facts["sections"].keys() >= {
            "tiles", "metrics", "loss", "gap", "forgetting", "samples", "data", "plan", "repeat"
        }  # fmt: skip
        loss, *small = facts["charts"]
        assert loss["lines"] == [count["step"], count["eval"]]
        assert loss["dots"] == count["eval"]
        assert [chart["lines"] for chart in small] == [[count["step"]]] * 3
    assert phone["sections"]["loss"] > desk["sections"]["loss"]  # the small charts are stacked


def test_the_comparison(runs: list[Path], tmp_path: Path) -> None:
    page = Comparison.of(runs).write(tmp_path / "compare.html")
    for facts in browse(page):
        check(facts)
        assert facts["sections"].keys() == {"curves", "table"}
        training, held_out = facts["charts"]
        assert training["lines"] == [12, 12]
        assert held_out["dots"] == sum(held_out["lines"]) > 2
        assert len(facts["colours"]) == 2


def test_the_dark(runs: list[Path]) -> None:
    light, dark = (
        browse(runs[0] / "report.html", *options)[1]
        for options in ((), ("--blink-settings=preferredColorScheme=0",))
    )
    check(dark)
    assert brightness(light["paper"]) > 200
    assert brightness(dark["paper"]) < 50
    assert not set(light["colours"]) & set(dark["colours"])


def brightness(colour: str) -> float:
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    return sum(parts) / 3
