"""LongBench's 21 sets: what is asked, how long an answer may be, and which rule scores it.

Lengths and rules are those of the benchmark (Bai et al. 2023, arXiv 2308.14508); the wording of the prompts is ours.
``plain`` sets are continued as text, without chat template; of ``line`` sets the first line of an answer counts.
"""

from __future__ import annotations

from typing import NamedTuple


class LongSet(NamedTuple):
    """One set; ``template`` takes ``context`` and ``input``."""

    template: str
    rule: str
    max_new: int
    plain: bool = False
    line: bool = False


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

SETS: dict[str, LongSet] = {
    "narrativeqa": LongSet(_STORY, "f1", 128),
    "qasper": LongSet(_PAPER, "f1", 128),
    "multifieldqa_en": LongSet(_TEXT, "f1", 64),
    "multifieldqa_zh": LongSet(_TEXT_ZH, "f1_zh", 64),
    "hotpotqa": LongSet(_PASSAGES, "f1", 32),
    "2wikimqa": LongSet(_PASSAGES, "f1", 32),
    "musique": LongSet(_PASSAGES, "f1", 32),
    "dureader": LongSet(_PASSAGES_ZH, "rouge_zh", 128),
    "gov_report": LongSet(_REPORT, "rouge", 512),
    "qmsum": LongSet(_MEETING, "rouge", 512),
    "multi_news": LongSet(_NEWS, "rouge", 512),
    "vcsum": LongSet(_MINUTES_ZH, "rouge_zh", 512),
    "trec": LongSet(_TYPES, "classes", 64, plain=True, line=True),
    "triviaqa": LongSet(_TRIVIA, "f1", 32, plain=True, line=True),
    "samsum": LongSet(_CHAT, "rouge", 128, plain=True, line=True),
    "lsht": LongSet(_NEWS_ZH, "classes", 64, plain=True, line=True),
    "passage_count": LongSet(_COUNT, "count", 32),
    "passage_retrieval_en": LongSet(_WHICH, "retrieval", 32),
    "passage_retrieval_zh": LongSet(_WHICH_ZH, "retrieval_zh", 32),
    "lcc": LongSet(_CODE, "code", 64, plain=True),
    "repobench-p": LongSet(_REPOSITORY, "code", 64, plain=True),
}
