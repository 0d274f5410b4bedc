r"""Answers in a box: finds the last ``\boxed{…}`` of a text, and says whether two answers are equal.

Answers that are written alike, up to spacing and other marks without a meaning, are equal. So are those of the same
value, by the package Math-Verify (numbers, fractions, intervals, sets, matrices, expressions that simplify to each
other). It reads LaTeX alone here: its other way to read an expression would run Python's ``eval`` on it.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache

from d2obench.tasks.scoring import accuracy_package

_SECONDS = 5
"""The longest time for one comparison; an answer that takes longer is wrong."""
_SPACE = re.compile(r"\\[,!;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|[\s$~]")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def last_boxed(text: str) -> str | None:
    r"""What is in the last ``\boxed{…}`` or ``\fbox{…}`` whose braces close; None if there is none."""
    for match in reversed([*re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for at in range(match.end(), len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if not depth:
                return text[match.end() : at].strip()
    return None


@lru_cache(maxsize=4096)
def equal_answers(answer: str, gold: str) -> bool:
    """Whether an answer equals the right one, both in LaTeX.

    Raises:
        UsageError: they are not written alike, and the package that compares values is not installed.
    """
    plain, wanted = plainly(answer), plainly(gold)
    if not plain or plain == wanted:
        return plain == wanted
    verifier = accuracy_package("math_verify")
    # its time limit is a signal, which only the main thread can receive
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    latex = [verifier.LatexExtractionConfig()]
    read = [verifier.parse(f"\\boxed{{{one}}}", latex, parsing_timeout=seconds) for one in (gold, answer)]
    return bool(verifier.verify(*read, timeout_seconds=seconds))


def plainly(latex: str) -> str:
    r"""LaTeX without spacing, delimiters' sizes, ``\text{}`` around words, and thousands separators."""
    words = _WORDS.sub(r"\1", latex)
    plain = _SPACE.sub("", words).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("^\\circ", "")
    return _THOUSANDS.sub("", plain.replace("{,}", ",")).rstrip(".")
