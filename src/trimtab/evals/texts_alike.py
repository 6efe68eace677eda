"""Metrics of longer answers: words or letters in common with the reference.

Token F1 is SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250): bags of words without case, punctuation and
articles; F1 of the overlap, averaged over examples. ROUGE (Lin 2004) is that of rouge-score, with its stemmer
off. BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's, over the corpus, with its defaults.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, final

import numpy as np

from trimtab.errors import ConfigError
from trimtab.evals.intervals import Interval, Sums, bootstrap, mean
from trimtab.evals.metrics import Metric, Scores, needs

ROUGE = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@final
class TokenF1(Metric):
    """F1 of words in common, averaged over examples."""

    kind: ClassVar[str] = "token_f1"

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        pairs = zip(references, answers, strict=True)
        return Scores({self.kind: mean([token_f1(wanted, said) for wanted, said in pairs])})


def token_f1(reference: str, answer: str) -> float:
    """SQuAD's F1 of one answer; 1 where neither text has a word, 0 where one of them has."""
    wanted, said = words(reference), words(answer)
    if not wanted or not said:
        return float(wanted == said)
    common = (Counter(wanted) & Counter(said)).total()
    return 2 * common / (len(wanted) + len(said))


def words(text: str) -> list[str]:
    """Lower case, without punctuation and English articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


@final
class Rouge(Metric):
    """F-measures of ROUGE-1, -2 and -L, averaged over examples. Its words are of the letters a-z and digits."""

    kind: ClassVar[str] = "rouge"

    def check(self, references: Sequence[str]) -> None:
        if find_spec("rouge_score") is None:
            raise needs(self.kind, "rouge-score")
        if not any(re.search("[a-z0-9]", text.lower()) for text in references):
            raise ConfigError(
                "metric 'rouge' reads words of the letters a-z and digits, and no reference has one; use 'chrf'."
            )

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE), use_stemmer=False)
        pairs = zip(references, answers, strict=True)
        found = [scorer.score(wanted, said) for wanted, said in pairs]
        return Scores({name: mean([one[name].fmeasure for one in found]) for name in ROUGE})


@final
class Bleu(Metric):
    """Corpus BLEU, 0 to 100."""

    kind: ClassVar[str] = "bleu"

    def check(self, references: Sequence[str]) -> None:
        _check_sacrebleu(self.kind)

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        from sacrebleu.metrics.bleu import BLEU

        return Scores({self.kind: _corpus(BLEU(), references, answers)})


@final
class Chrf(Metric):
    """Corpus chrF2, 0 to 100."""

    kind: ClassVar[str] = "chrf"

    def check(self, references: Sequence[str]) -> None:
        _check_sacrebleu(self.kind)

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        from sacrebleu.metrics.chrf import CHRF

        return Scores({self.kind: _corpus(CHRF(), references, answers)})


def _check_sacrebleu(kind: str) -> None:
    if find_spec("sacrebleu") is None:
        raise needs(kind, "sacrebleu")


def _corpus(metric: Any, references: Sequence[str], answers: Sequence[str]) -> Interval:
    """A corpus score of sacrebleu. Each sentence is read once; a draw of the bootstrap sums what was counted.

    These two methods are what every metric of sacrebleu implements; its own bootstrap calls them too.
    """
    counts = metric._extract_corpus_statistics(list(answers), [list(references)])

    def scored(sums: Sums) -> Sums:
        totals = np.rint(sums).astype(int).tolist()
        return np.array([metric._compute_score_from_stats(row).score for row in totals])

    return bootstrap(counts, scored)
