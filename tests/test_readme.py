"""What the README shows is run; what it claims in numbers is in a committed result."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import side_by_side
from benchmarks.qlora_quality import means
from tests.shown import run_commands, run_example, shown
from trimtab.train import devices

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs(here: Path) -> None:
    (example,) = shown(README, "python")
    run_example(example, "README.md")
    assert (here / "adapters/support/adapter_model.safetensors").is_file()
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 17


def test_the_commands_run(here: Path) -> None:
    run_commands(shown(README, "bash")[1])


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", shown(README, "bash")[0], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tree_is_the_tree() -> None:
    tree = re.findall(r"^      ([a-z_/ .]+?)(?:   .*)?$", README, re.MULTILINE)
    for line in tree:
        for name in line.split():
            assert (ROOT / "src/trimtab" / name).exists(), name


def test_the_numbers_are_those_of_the_committed_demonstration() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    for side in ("before", "after"):
        assert f"{result[side]['accuracy']:.3f}" in README, side
    assert result["after"]["low"] > result["before"]["high"]
    assert result["after"]["accuracy"] - result["before"]["accuracy"] >= 0.25
    assert result["count"] >= 300 and result["train_seconds"] < 480


def test_the_ratios_are_those_of_the_committed_benchmark() -> None:
    table = (ROOT / "benchmarks/results/lora_step.md").read_text(encoding="utf-8")
    ratios = re.findall(r"\*\*ratio\*\* \| \*\*([\d.]+) \([^|]*\*\* \| \*\*([\d.]+) \(", table)
    assert len(ratios) == 2
    for pair in ratios:
        for ratio in pair:
            assert f"{ratio} ×" in README, ratio


def test_the_table_of_speed_and_memory_is_that_of_the_results() -> None:
    """`python -m benchmarks side_by_side` prints it."""
    assert "\n".join(side_by_side.table()) in README


def test_growth_is_told_as_it_was_measured() -> None:
    table = (ROOT / "benchmarks/results/growth.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| \w+ \| ([^|]+) \|.*\| (✔|✗) \|", table, re.MULTILINE)
    near = sum(mark == "✔" for _, mark in found)
    assert f"within 0.1 of theory on {near} of {len(found)} slopes" in " ".join(README.split())
    assert all(mark == "✔" for what, mark in found if what.startswith("tensors"))


def test_a_step_in_few_bits_is_told_as_it_was_measured() -> None:
    said = " ".join(README.split()).partition("base in NF4, with the allocator as it comes: ")[2]
    told = re.findall(r"(\d\.\d\d) ×", said)[:6]
    measured = []
    for name in ("qlora_step", "qlora_step_plain"):
        table = (ROOT / f"benchmarks/results/{name}.md").read_text(encoding="utf-8")
        (dense,) = re.findall(r"default \| \*\*nf4 / bf16\*\* \| \*\*([\d.]+) ", table)
        peer = r"default \| \*\*nf4 / peft\*\* \| \*\*([\d.]+) [^|]*\| \*\*([\d.]+) "
        measured += [dense, *re.findall(peer, table)[0]]
    assert told == measured


def test_attention_is_told_as_it_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/attention.json").read_text())["rows"]
    *plain, packed = (statistics.median(row["ratio"]) for row in rows.values())
    assert (
        f"{min(plain):.1f} to {max(plain):.1f} times as fast as torch's, and {packed:.1f} times on ten documents"
        in " ".join(README.split())
    )


def test_a_big_base_is_told_as_it_was_measured() -> None:
    table = (ROOT / "benchmarks/results/big_base.md").read_text(encoding="utf-8")
    fast, plain = (
        [float(cell) for cell in row.split("|")[4:-1]]
        for row in re.findall(r"^\| (?:bitsandbytes|plain torch) (\|.*)$", table, re.MULTILINE)
    )
    text = " ".join(README.split())
    assert f"in {max(fast[0], plain[0]):.1f} GB of anonymous memory" in text
    assert f"in {fast[1]:.0f} seconds each, and {plain[1]:.0f} without bitsandbytes" in text


def test_quality_in_four_bits_is_told_as_it_was_measured() -> None:
    runs = json.loads((ROOT / "benchmarks/results/qlora_quality.json").read_text())["runs"]
    some, more = (
        {base: values["held_out_loss"] for base, values in means(runs_of).items()}
        for runs_of in ([r for r in runs if r["rows"] == rows] for rows in (640, 1280))
    )
    text = " ".join(README.split())
    started = more["NF4, LoftQ's start"]
    assert abs(more["NF4"] - more["bf16"]) < 0.02
    assert (
        f"{more['NF4']:.3f} on NF4, {started:.3f} there with LoftQ's start, and {more['bf16']:.3f} on bf16"
        in text
    )
    assert f"after 640 it is {some['NF4']:.3f} instead of {some['bf16']:.3f}" in text


def test_the_face_is_told_as_it_was_measured() -> None:
    parts = json.loads((ROOT / "benchmarks/results/face.json").read_text())["parts"]
    text = " ".join(README.split())
    first = parts["meta"]["seconds"]
    assert f"{parts['load']['faster']['median']:.0f} times as fast" in text
    assert (
        f"{first['trimtab.peft']['first']['median']:.2f} s instead of {first['peft']['first']['median']:.2f}"
        in text
    )
    imports = parts["imports"]["seconds"]
    assert max(imports[name]["median"] for name in imports if "no " in name) < 1


def test_full_fine_tuning_is_told_as_it_was_measured() -> None:
    table = (ROOT / "benchmarks/results/full_vs_peft.md").read_text(encoding="utf-8")
    paragraph = next(text for text in README.split("\n\n") if "full_vs_peft.md" in text)
    said = re.findall(r"\d\.\d{3}|\d\.\d\d GiB|(?<=at )\d{3}", paragraph)
    assert len(said) == 6
    for number in said:
        assert number in table, number


def test_the_methods_are_told_as_they_were_measured() -> None:
    table = (ROOT / "benchmarks/results/methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| (\d\.\d{3}) ", table.split("\n## ")[1], re.MULTILINE))
    paragraph = next(
        text for text in README.split("\n\n") if "methods.md" in text and "MiniLM" in text
    )
    said = re.findall(r"\d\.\d{3}", paragraph)
    assert said == [rows["lora"], rows["full fine-tuning"], rows["head only"]]


def test_the_plan_is_as_near_as_told() -> None:
    result = json.loads((ROOT / "benchmarks/results/plan_accuracy.json").read_text())
    assert not set(result["checked"]) & set(result["fitted"])
    rows = [result["rows"][name] for name in result["checked"]]
    ratios = [row["predicted"]["memory"] / row["measured"]["memory"] for row in rows]
    peaks = [row["measured"]["memory"] for row in rows]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.15
    assert max(peaks) > 5 * min(peaks)
    paragraph = next(text for text in README.split("\n\n") if "plan_accuracy.md" in text)
    said = " ".join(paragraph.split())
    assert f"within 15 % on all {len(rows)} runs" in said
    assert f"of {min(peaks) / 2**20:,.0f} to {max(peaks) / 2**20:,.0f} MiB" in said


def test_the_constants_of_a_cpu_are_those_that_were_fitted() -> None:
    fit = json.loads((ROOT / "benchmarks/results/plan_accuracy.json").read_text())["fit"]
    assert pytest.approx(fit["libraries"], rel=0.01) == devices.CPU_LIBRARIES
    assert pytest.approx(fit["loss"], abs=0.01) == devices.CPU_LOSS


def test_the_million_rows_are_told_as_they_were_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/stream.json").read_text())["rows"]
    for row in rows:
        assert row["rows"] == 1_000_000
        assert f"{row['rows'] / row['seconds']:,.0f} rows/s" in README
        assert (row["peak"] - row["peak_at_a_tenth"]) / (0.9 * row["rows"]) < 150  # bytes a row


def test_answers_of_many_adapters_are_told_as_they_were_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/serving.json").read_text())["rows"]
    (row,) = (row for row in rows if row["part"] == "adapters")
    share = row["sides"]["trimtab, bare base"]["speed"]["median"]
    assert f"answer at {share:.2f} of the speed of the bare base" in " ".join(README.split())


def test_a_compiled_block_is_told_as_it_was_measured() -> None:
    (row,) = json.loads((ROOT / "benchmarks/results/compiled.json").read_text())["rows"]
    ours, compiled = (row["over"][way]["median"] for way in ("trimtab", "compiled"))
    told = f"takes {ours:.2f} times less time than as transformers writes it, where compiling it by torch gains"
    assert f"{told} {compiled:.2f}" in " ".join(README.split())
