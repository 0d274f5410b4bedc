"""LongBench's official prompts, answer lengths and truncation, so that scores can be compared with published ones.

The benchmark's repository has the prompts in ``dataset2prompt.json`` and the answer lengths in ``dataset2maxlen.json``.
They are not part of this project; ``--prompts FILE`` reads files of that form: an object that maps the name of a set to
a prompt with the places ``{context}`` and ``{input}``, or to a number of tokens.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2obench.errors import DataError
from d2obench.suite.definition import is_prompts
from d2obench.tasks.data import reading

PLACES = ("context", "input")


@dataclass(frozen=True)
class OfficialPrompt:
    """What the user's files say of one set; None where they say nothing."""

    template: str | None = None
    max_new: int | None = None


def official_prompt(name: str, data: Mapping[str, str]) -> OfficialPrompt:
    """What the files of ``--prompts`` say of the set ``name``.

    Args:
        name: as in the benchmark; those of LongBench-E have the prompts of the sets they are taken from.
        data: ``quality.data``, in which these files are named ``prompts``, ``prompts-2`` and so on.

    Raises:
        DataError: a file can't be read or has another form, or there are prompts but none for this set.
    """
    template: str | None = None
    max_new: int | None = None
    without = ""
    for path in (path for task, path in data.items() if is_prompts(task)):
        found = _read(path)
        value = found.get(name)
        if isinstance(value, str):
            template = _checked(path, name, value)
        elif value is not None:
            max_new = value
        elif any(isinstance(text, str) for text in found.values()):
            without = path
    if template is None and without:
        raise DataError(
            f"{without} has no prompt for '{name}'",
            why="each set needs one of its own",
            remedy="add it, or leave out the set",
        )
    return OfficialPrompt(template, max_new)


def cut_middle(tokenizer: Any, prompt: str, most: int) -> tuple[str, bool]:
    """A prompt of more than ``most`` tokens, special ones included, without its middle; and whether it was cut.

    As in the benchmark's code: the first and the last ``most // 2`` tokens are decoded and joined.
    """
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if len(ids) <= most:
        return prompt, False
    half = most // 2
    parts = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[len(ids) - half :])]
    return "".join(parts), True


def _read(path: str) -> dict[str, str | int]:
    """The object in a file of prompts or of answer lengths."""
    with reading(path):
        found = json.loads(Path(path).expanduser().read_text("utf-8"))
    remedy = "use the benchmark's dataset2prompt.json or dataset2maxlen.json, or a file of that form"
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no prompts", why="it is not an object of names of sets", remedy=remedy)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, str | int) or (isinstance(value, int) and value < 1):
            why = "it is neither a prompt nor a number of tokens"
            raise DataError(f"{path}, field '{name}' is malformed", why=why, remedy=remedy)
    return found


def _checked(path: str, name: str, template: str) -> str:
    """The template, if it has no other places than a record can fill."""
    why = ""
    try:
        places = {place for _, place, _, _ in string.Formatter().parse(template) if place is not None}
    except ValueError as problem:
        places, why = set(), str(problem)
    if unknown := sorted(places.difference(PLACES)):
        why = f"a record has no field '{unknown[0]}'"
    elif not why and "context" not in places:
        why = "it has no place {context}"
    if why:
        raise DataError(
            f"{path}, field '{name}' is malformed", why=why, remedy="write {context} and {input}, and {{ for a brace"
        )
    return template
