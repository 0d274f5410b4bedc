"""LongBench's scoring rules (arXiv 2308.14508, official ``metrics.py``), each (prediction, gold, classes) → 0 … 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from d2obench.tasks.answers import normalized, token_f1
from d2obench.tasks.extra import accuracy_package
from d2obench.tasks.rouge import rouge_l

_PUNCTUATION_ZH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DROPPED_ZH = frozenset(string.punctuation + _PUNCTUATION_ZH)


def f1(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Token F1 after SQuAD's normalisation; nothing shared, not even nothing, is 0."""
    return token_f1(normalized(prediction).split(), normalized(gold).split())


def f1_zh(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """F1 of Chinese words, punctuation and white space taken out of each."""

    def tokens(text: str) -> list[str]:
        cut = ["".join(c for c in word.lower() if c not in _DROPPED_ZH and not c.isspace()) for word in _cut(text)]
        return [word for word in cut if word]

    return token_f1(tokens(prediction), tokens(gold))


def rouge(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """ROUGE-L F."""
    return rouge_l(prediction, gold)


def rouge_zh(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """ROUGE-L F over Chinese words."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(gold)))


def classification(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """One over the number of class names in the answer if the gold one is among them.

    Names that are a part of the gold one do not count against it.
    """
    named = [name for name in classes if name in prediction]
    for name in named:  # the official code removes while it iterates and so skips the next name; kept
        if name in gold and name != gold:
            named.remove(name)
    return 1 / len(named) if gold in named else 0.0


def count(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the gold one."""
    numbers = re.findall(r"\d+", prediction)
    return Counter(numbers)[gold] / len(numbers) if numbers else 0.0


def retrieval(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """As ``count``, of the number in ``Paragraph 7``."""
    return _retrieval(r"Paragraph (\d+)", prediction, gold)


def retrieval_zh(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """As ``count``, of the number in ``段落7``."""
    return _retrieval(r"段落(\d+)", prediction, gold)


def code(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Edit similarity of the first line that is neither comment nor fence, in whole percent as fuzzywuzzy gives it."""
    lines = prediction.lstrip("\n").split("\n")
    first = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    ratio: float = accuracy_package("rapidfuzz.fuzz").ratio(first, gold)
    return round(ratio) / 100


RULES: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": f1, "f1_zh": f1_zh, "rouge": rouge, "rouge_zh": rouge_zh, "classes": classification, "count": count,
    "retrieval": retrieval, "retrieval_zh": retrieval_zh, "code": code,
}  # fmt: skip


PACKAGES = {"f1_zh": "jieba", "rouge_zh": "jieba", "code": "rapidfuzz.fuzz"}
"""Rule → the module of the extra ``accuracy`` it needs."""


def _retrieval(pattern: str, prediction: str, gold: str) -> float:
    found = re.search(pattern, gold)
    return count(prediction, found[1], ()) if found else 0.0


def _cut(text: str) -> list[str]:
    jieba = accuracy_package("jieba")
    jieba.setLogLevel(60)
    return list(jieba.cut(text, cut_all=False))
