"""Scores of short answers: exact match and token F1 after the normalisation of SQuAD, which CoQA and LongBench share.

Rajpurkar et al. 2016 (arXiv 1606.05250), as in the official evaluation scripts: lower case, no ASCII punctuation, no
articles, single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, punctuation and articles taken out, white space single."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, gold: str) -> float:
    """1 where both are equal after normalisation."""
    return float(normalized(prediction) == normalized(gold))


def token_f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the two bags of tokens; 0 where they share none."""
    common = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * common / (len(prediction) + len(gold)) if common else 0.0


def squad_f1(prediction: str, gold: str) -> float:
    """Token F1 after normalisation; two empty answers agree."""
    ours, theirs = normalized(prediction).split(), normalized(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return token_f1(ours, theirs)


def best(scores: Sequence[float]) -> float:
    """The best over the references."""
    return max(scores, default=0.0)


def against_others(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """CoQA's (exact match, F1) of one turn.

    With several references each is left out once and the best over the others is averaged, so that people, who are
    scored against the others' answers, and models are measured alike (Reddy et al. 2019, arXiv 1808.07042; official
    evaluation script).
    """
    exacts = [exact(prediction, reference) for reference in references]
    f1s = [squad_f1(prediction, reference) for reference in references]
    if len(references) < 2:
        return best(exacts), best(f1s)

    def jackknife(scores: list[float]) -> float:
        return sum(max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))) / len(scores)

    return jackknife(exacts), jackknife(f1s)
