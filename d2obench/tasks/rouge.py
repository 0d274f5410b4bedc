"""ROUGE-L as LongBench scores it: the summary-level F of the package ``rouge``, in its own reading of Lin (2004).

Sentences end at every point. The words of a longest common subsequence of each pair of sentences are gathered in one
set; its size over the number of different words of either text gives recall and precision. Which subsequence is taken
where several are longest follows that package, so that scores agree.
"""

from __future__ import annotations


def rouge_l(prediction: str, gold: str) -> float:
    """F of the union of longest common subsequences, 0 … 1; an empty text scores 0."""
    ours, theirs = _sentences(prediction), _sentences(gold)
    if not ours or not theirs:
        return 0.0
    union: set[str] = set()
    for reference in theirs:
        for sentence in ours:
            union |= _common(reference, sentence)
    recall = len(union) / len({word for sentence in theirs for word in sentence})
    precision = len(union) / len({word for sentence in ours for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(x: list[str], y: list[str]) -> set[str]:
    """The words of a longest common subsequence."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    i, j, found = len(x), len(y), set()
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
