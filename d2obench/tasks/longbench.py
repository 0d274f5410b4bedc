"""LongBench: 21 sets of long-context questions, summaries, few-shot tasks, counting and code.

Bai et al. 2023 (arXiv 2308.14508). Answer lengths, truncation and scoring rules are the benchmark's (official
``metrics.py``). The prompts are worded anew for this project, so that scores compare policies with each other. With the
benchmark's own prompts (``--prompts dataset2prompt.json``) and the ``max_length`` of a published result, they compare
with that result (:mod:`d2obench.tasks.longbench_prompts`).

LongBench-E (``longbench/qasper_e``) has 13 of the sets with contexts of evenly spread lengths; details of a row give
the score by length.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import msgspec

from d2obench.errors import UsageError
from d2obench.tasks.base import Cell, Item, Quality, TextBatch
from d2obench.tasks.data import BadField, Source, records
from d2obench.tasks.generate import Questions
from d2obench.tasks.longbench_prompts import cut_middle, official_prompt
from d2obench.tasks.prompts import Example, Limits
from d2obench.tasks.scoring import accuracy_package, normalized, rouge_l, token_f1

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

HUB, REVISION = "THUDM/LongBench", "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"


class LongBenchSet(NamedTuple):
    """One set.

    Args:
        template: the prompt; takes ``context`` and ``input``.
        rule: the name of its scoring rule in RULES.
        max_new: the largest number of generated tokens.
        plain: continued as plain text, without the chat template.
        line: only the first line of an answer counts.
    """

    template: str
    rule: str
    max_new: int
    plain: bool = False
    line: bool = False


class Sample(msgspec.Struct):
    """One record of the data set."""

    input: str
    context: str
    answers: Annotated[list[str], msgspec.Meta(min_length=1)]
    length: int = 0
    all_classes: list[str] | None = None
    key: str = msgspec.field(name="_id", default="")


class LongBench(Questions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LongBench set, with its official metric.

    ``max_prompt`` is the largest number of tokens of a prompt (0: what the model's context leaves). Longer prompts lose
    their middle. ``max_length`` is the benchmark's own setting of that name: a prompt that is longer, before it is put
    into the chat template, is cut to its first and last ``max_length // 2`` tokens. ``max_new`` is the longest answer
    (0: the benchmark's). ``query=unseen`` is for the sets whose records hold a question beside the context.
    """

    typical: ClassVar[tuple[int, int] | None] = (200, 10_000)
    prompted: ClassVar[bool] = True

    max_prompt: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_length: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_new: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.unseen and "{input}" not in self.set.template:
            asking = ", ".join(name for name, chosen in SETS.items() if "{input}" in chosen.template)
            raise UsageError(
                f"{self.name} has no question that could be unseen",
                why="its records are a context and nothing else",
                remedy=f"leave out query=unseen, or use one of {asking}",
            )

    @property
    def set(self) -> LongBenchSet:
        """The set the name ``longbench/…`` stands for."""
        name = self._official
        if name not in SETS:
            raise UsageError(f"unknown LongBench set '{name}'", remedy=f"the known ones are {', '.join(SETS)}")
        return SETS[name]

    @property
    def _official(self) -> str:
        """The benchmark's name of the set; LongBench-E has the prompts and rules of the sets it is taken from."""
        return self.name.rpartition("/")[2].removesuffix("_e")

    def limits(self) -> Limits:
        """The benchmark's answer lengths."""
        chosen = self.set
        stop = ("\n",) if chosen.line else ()
        return Limits(self.max_new or chosen.max_new, stop, chat=not chosen.plain, max_prompt=self.max_prompt or None)

    def batches(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[TextBatch]:
        """See :meth:`Task.batches`; answers are as long as a file of the user says."""
        given = official_prompt(self._official, quality.data).max_new
        task = msgspec.structs.replace(self, max_new=self.max_new or given or 0)
        return super(LongBench, task).batches(loaded, cell, quality)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The set's samples in order, at most ``quality.limit``."""
        if self.set.rule in PACKAGES:  # raises now, and not after the work, where one is missing
            accuracy_package(PACKAGES[self.set.rule])
        member = f"data/{self.name.rpartition('/')[2]}.jsonl"
        source = Source(HUB, REVISION, "test", archive="data.zip", member=member)
        path, own = quality.data.get(self.name), official_prompt(self._official, quality.data).template
        chosen = self.set if own is None else self.set._replace(template=own)

        def check(sample: Sample) -> BadField | None:
            return unscorable(sample, chosen)

        samples = records(self.name, source, path, Sample, check=check, limit=quality.limit)
        examples = []
        for i, sample in enumerate(samples):
            prompt, question = filled(chosen.template, sample)
            keep = {"references": sample.answers, "classes": sample.all_classes or [], "length": sample.length}
            if self.max_length:
                prompt, cut = cut_middle(loaded.tokenizer, prompt, self.max_length)
                keep |= {"truncated": True} if cut else {}
                question = question if prompt.endswith(question) else ""
            gold = next(filter(str.strip, sample.answers))
            candidates = (" " + gold,)
            examples.append(Example(str(i), sample.key or str(i), prompt, "", candidates, keep, question))
        return examples

    def details(self, items: Sequence[Item]) -> dict[str, Any]:
        """Details of the row; for LongBench-E also the score by length, in the benchmark's three classes."""
        found = super().details(items)
        if not self.name.endswith("_e"):
            return found
        classes: dict[str, list[float]] = {"0-4k": [], "4-8k": [], "8k+": []}
        for item in items:
            name = "0-4k" if item["length"] < 4000 else "4-8k" if item["length"] < 8000 else "8k+"
            classes[name].append(item["score"])
        return {**found, "by_length": {name: fmean(scores) for name, scores in classes.items() if scores}}

    def scores(self, item: Item) -> dict[str, float]:
        """The best score over the references."""
        text = item["text"]
        if self.set.line:
            text = text.lstrip("\n").split("\n")[0]
        rule = RULES[self.set.rule]
        return {"score": max(rule(text, reference, item["classes"]) for reference in item["references"])}


def filled(template: str, sample: Sample) -> tuple[str, str]:
    """The prompt, and the part of it after the context, if that asks the record's question."""
    before, after = template.split("{context}", 1)
    texts = {"context": sample.context, "input": sample.input}
    question = after.format(**texts)
    return before.format(**texts) + sample.context + question, question if "{input}" in after else ""


def unscorable(sample: Sample, chosen: LongBenchSet) -> BadField | None:
    """An empty prompt or gold answer, or one that the set's rule can't read, so that every answer would score 0."""
    for field in ("context", "input"):
        if "{" + field + "}" in chosen.template and not getattr(sample, field).strip():
            return BadField(field, "it is empty")
    if not any(map(str.strip, sample.answers)):
        return BadField("answers", "it holds no answer")
    number = GOLD_NUMBERS.get(chosen.rule)
    if number and not all(map(number.search, sample.answers)):
        return BadField("answers", f"it holds an answer without a number; the score looks for {number.pattern}")
    if chosen.rule == "classes" and not sample.all_classes:
        return BadField("all_classes", "it is missing, and the score compares with the names in it")
    return None


_PUNCTUATION_ZH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DROPPED_ZH = frozenset(string.punctuation + _PUNCTUATION_ZH)


def f1(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Token F1 after SQuAD's normalisation. Unlike SQuAD's own score, two empty answers score 0."""
    return token_f1(normalized(prediction).split(), normalized(gold).split())


def f1_zh(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Token F1 of Chinese words without punctuation and white space."""

    def tokens(text: str) -> list[str]:
        plain = (
            "".join(c for c in word.lower() if c not in _DROPPED_ZH and not c.isspace()) for word in _words_zh(text)
        )
        return [word for word in plain if word]

    return token_f1(tokens(prediction), tokens(gold))


def rouge(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """ROUGE-L F."""
    return rouge_l(prediction, gold)


def rouge_zh(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """ROUGE-L F over Chinese words."""
    return rouge_l(" ".join(_words_zh(prediction)), " ".join(_words_zh(gold)))


def classification(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """1 ÷ the number of class names in the answer where the gold one is among them, else 0.

    Names that are a part of the gold name do not count.
    """
    named = [name for name in classes if name in prediction]
    for name in named:  # as in the official code, which skips the name after a removed one
        if name in gold and name != gold:
            named.remove(name)
    return 1 / len(named) if gold in named else 0.0


def count(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """The share of the numbers in the answer that equal the gold one."""
    numbers = re.findall(r"\d+", prediction)
    return Counter(numbers)[gold] / len(numbers) if numbers else 0.0


def retrieval(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """:func:`count` with the number of a gold answer like ``Paragraph 7``."""
    match = GOLD_NUMBERS["retrieval"].search(gold)
    return count(prediction, match[1], classes) if match else 0.0


def retrieval_zh(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """:func:`count` with the number of a gold answer like ``段落7``."""
    match = GOLD_NUMBERS["retrieval_zh"].search(gold)
    return count(prediction, match[1], classes) if match else 0.0


def code(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Edit similarity of the first line that is no comment and no code fence, rounded to whole percent.

    The official code uses fuzzywuzzy, whose ratio is a whole percentage.
    """
    lines = prediction.lstrip("\n").split("\n")
    first = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    ratio: float = accuracy_package("rapidfuzz.fuzz").ratio(first, gold)
    return round(ratio) / 100


RULES: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": f1, "f1_zh": f1_zh, "rouge": rouge, "rouge_zh": rouge_zh, "classes": classification, "count": count,
    "retrieval": retrieval, "retrieval_zh": retrieval_zh, "code": code,
}  # fmt: skip
"""Name → rule: (prediction, gold, class names) → score from 0 to 1."""
GOLD_NUMBERS = {
    "count": re.compile(r"^(\d+)$"),
    "retrieval": re.compile(r"Paragraph (\d+)"),
    "retrieval_zh": re.compile(r"段落(\d+)"),
}
"""Name of a rule that compares numbers → how the number stands in a gold answer."""
PACKAGES = {"f1_zh": "jieba", "rouge_zh": "jieba", "code": "rapidfuzz.fuzz"}
"""Name of a rule → the module of the extra ``accuracy`` it needs."""


def _words_zh(text: str) -> list[str]:
    jieba = accuracy_package("jieba")
    jieba.setLogLevel(60)
    return list(jieba.cut(text, cut_all=False))


_STORY = (
    "Below is a story, a novel or a script. Answer the question about it as briefly as you can, in a single phrase if "
    "possible, and explain nothing.\n\n{context}\n\nQuestion: {input}\n\nAnswer:"
)
_PAPER = (
    "Below is a scientific article. Answer the question about it in one phrase or sentence. If the article does not "
    'answer it, write "unanswerable". If it asks for yes or no, write "yes", "no" or "unanswerable". Explain nothing.'
    "\n\n{context}\n\nQuestion: {input}\n\nAnswer:"
)
_TEXT = "Read the text and answer the question about it briefly.\n\n{context}\n\nQuestion: {input}\nAnswer:"
_TEXT_ZH = "阅读下面的文章，并简短地回答后面的问题。\n\n{context}\n\n问题：{input}\n回答："
_PASSAGES = (
    "Answer the question from the passages below. Give the answer alone, without any other words.\n\n{context}\n\n"
    "Question: {input}\nAnswer:"
)
_PASSAGES_ZH = "根据下面的资料回答问题。\n\n{context}\n\n问题：{input}\n回答："
_REPORT = "Below is a report by a government agency. Summarize it on one page.\n\n{context}\n\nSummary:"
_MEETING = (
    "Below is the transcript of a meeting and a question or request about it. Answer in one or more sentences.\n\n"
    "{context}\n\nRequest: {input}\nAnswer:"
)
_NEWS = "Below are several news articles on one event. Summarize them together on one page.\n\n{context}\n\nSummary:"
_MINUTES_ZH = "下面是一次会议的记录。请写出一份会议总结。\n\n{context}\n\n会议总结："
_TYPES = "Find the type of each question, as in the examples.\n\n{context}\n{input}"
_TRIVIA = "Answer each question from its passage, with the answer alone, as in the examples.\n\n{context}\n\n{input}"
_CHAT = "Summarize each dialogue in a few short sentences, as in the examples.\n\n{context}\n\n{input}"
_NEWS_ZH = "参照例子，判断每条新闻的类别。\n\n{context}\n{input}"
_COUNT = (
    "Some of the numbered paragraphs below are repeated. How many different paragraphs are there once the repeated "
    "ones are taken out? Write only the number.\n\n{context}\n\nNumber of different paragraphs:"
)
_WHICH = (
    "Below are 30 paragraphs and a summary of one of them. Which paragraph was summarized?\n\n{context}\n\n"
    "Summary: {input}\n\nWrite its number in the form Paragraph 1, Paragraph 2 and so on.\n\nAnswer:"
)
_WHICH_ZH = (
    "下面有若干段落，以及其中一段的摘要。请判断摘要出自哪一段。\n\n{context}\n\n摘要：{input}\n\n"
    "请按“段落1”、“段落2”的格式写出段落编号。\n\n答案："
)
_CODE = "Write the next line of this code.\n{context}"
_REPOSITORY = "Write the next line of this code.\n{context}{input}"

SETS: dict[str, LongBenchSet] = {
    "narrativeqa": LongBenchSet(_STORY, "f1", 128),
    "qasper": LongBenchSet(_PAPER, "f1", 128),
    "multifieldqa_en": LongBenchSet(_TEXT, "f1", 64),
    "multifieldqa_zh": LongBenchSet(_TEXT_ZH, "f1_zh", 64),
    "hotpotqa": LongBenchSet(_PASSAGES, "f1", 32),
    "2wikimqa": LongBenchSet(_PASSAGES, "f1", 32),
    "musique": LongBenchSet(_PASSAGES, "f1", 32),
    "dureader": LongBenchSet(_PASSAGES_ZH, "rouge_zh", 128),
    "gov_report": LongBenchSet(_REPORT, "rouge", 512),
    "qmsum": LongBenchSet(_MEETING, "rouge", 512),
    "multi_news": LongBenchSet(_NEWS, "rouge", 512),
    "vcsum": LongBenchSet(_MINUTES_ZH, "rouge_zh", 512),
    "trec": LongBenchSet(_TYPES, "classes", 64, plain=True, line=True),
    "triviaqa": LongBenchSet(_TRIVIA, "f1", 32, plain=True, line=True),
    "samsum": LongBenchSet(_CHAT, "rouge", 128, plain=True, line=True),
    "lsht": LongBenchSet(_NEWS_ZH, "classes", 64, plain=True, line=True),
    "passage_count": LongBenchSet(_COUNT, "count", 32),
    "passage_retrieval_en": LongBenchSet(_WHICH, "retrieval", 32),
    "passage_retrieval_zh": LongBenchSet(_WHICH_ZH, "retrieval_zh", 32),
    "lcc": LongBenchSet(_CODE, "code", 64, plain=True),
    "repobench-p": LongBenchSet(_REPOSITORY, "code", 64, plain=True),
}
