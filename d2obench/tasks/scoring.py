"""Scores of answers against references, shared by several tasks: exact match, token F1, ROUGE-L.

Answers are normalised as by SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), which CoQA and LongBench share: lower
case, no ASCII punctuation, no articles, single spaces.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from types import ModuleType

from d2obench.errors import UsageError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """``text`` in lower case, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 where both are equal after normalisation, else 0."""
    return float(normalized(prediction) == normalized(gold))


def begins_with(text: str, gold: str) -> bool:
    """Whether ``text`` begins with the whole word or number ``gold``; case and thousands separators don't matter."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text).lstrip(" \t\n\"'“‘*")
    return re.match(re.escape(gold) + r"(?!\w)", plain, re.IGNORECASE) is not None


def token_f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of two bags of tokens; 0 where they share none."""
    common = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * common / (len(prediction) + len(gold)) if common else 0.0


def squad_f1(prediction: str, gold: str) -> float:
    """Token F1 after normalisation; two empty answers score 1."""
    answer, reference = normalized(prediction).split(), normalized(gold).split()
    if not answer or not reference:
        return float(answer == reference)
    return token_f1(answer, reference)


def coqa_scores(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """CoQA's (exact match, F1) of one turn.

    With several references each one is left out once, and the best scores over the others are averaged. In this way
    people, who are scored against the other people's answers, and models are measured alike (Reddy et al. 2019,
    arXiv 1808.07042; official evaluation script).
    """
    exacts = [exact_match(prediction, reference) for reference in references]
    f1s = [squad_f1(prediction, reference) for reference in references]
    if len(references) < 2:
        return max(exacts, default=0.0), max(f1s, default=0.0)

    def leave_one_out(scores: list[float]) -> float:
        return sum(max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))) / len(scores)

    return leave_one_out(exacts), leave_one_out(f1s)


def rouge_l(prediction: str, gold: str) -> float:
    """ROUGE-L as LongBench scores it: the summary-level F of the package ``rouge``, from 0 to 1.

    This is that package's own reading of Lin (2004). An empty text scores 0.
    """
    # 1. Sentences end at every point.
    ours, theirs = _sentences(prediction), _sentences(gold)
    if not ours or not theirs:
        return 0.0
    # 2. The words of a longest common subsequence of each pair of sentences are gathered in one set.
    union: set[str] = set()
    for reference in theirs:
        for sentence in ours:
            union |= _common_subsequence(reference, sentence)
    # 3. Its size over the number of different words of either text gives recall and precision.
    recall = len(union) / len({word for sentence in theirs for word in sentence})
    precision = len(union) / len({word for sentence in ours for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def accuracy_package(name: str) -> ModuleType:
    """Imports a module of the optional extra ``accuracy``, which only some tasks' scores need.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise UsageError(
            f"this task's score needs the package {package}", remedy="install it: pip install 'd2obench[accuracy]'"
        ) from None


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_subsequence(x: list[str], y: list[str]) -> set[str]:
    """The words of one longest common subsequence.

    Where several are longest, the choice follows the package ``rouge``, so that scores agree with its.
    """
    # 1. table[i][j] is the length of the longest common subsequence of x[:i] and y[:j].
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    # 2. Walk back from the end and collect the words where both sentences advance.
    i, j, common = len(x), len(y), set()
    while i and j:
        if x[i - 1] == y[j - 1]:
            common.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common
