"""Switches of a model's chat template, such as ``enable_thinking``, given as a task's parameter.

``math500(template=[enable_thinking=false])`` renders every prompt of the task with ``enable_thinking`` false; without
the parameter the template's own defaults apply.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from d2obench.errors import UsageError
from d2obench.suite.grammar import parse_pairs
from d2obench.tasks.prompts import has_chat

if TYPE_CHECKING:
    from d2obench.models import LoadedModel


def switched(loaded: LoadedModel, task: str, template: Sequence[str], *, chat: bool) -> LoadedModel:
    """The same model with a tokenizer whose chat template is rendered with these switches.

    Args:
        task: the task's name, for messages.
        template: ``name=value`` each.
        chat: whether the task uses the chat template at all.

    Raises:
        UsageError: a switch can't be read, or the task or the template does not use it.
    """
    if not template:
        return loaded
    switches = parse_pairs(template, f"{task}(template=[…])")
    if not chat or not has_chat(loaded.tokenizer):
        why = "the task continues plain text" if not chat else f"{loaded.name} has no chat template"
        raise UsageError(f"{task} can't use template={list(switches)}", why=why, remedy="leave template out")
    text = str(loaded.tokenizer.chat_template)
    for name in switches:
        if not re.search(rf"(?<!\w){name}(?!\w)", text):
            raise UsageError(
                f"the chat template of {loaded.name} has no switch '{name}'",
                why="the name does not occur in it, so it would change nothing",
                remedy="look for its switches in the model's chat_template",
            )
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.apply_chat_template = partial(loaded.tokenizer.apply_chat_template, **switches)
    return dataclasses.replace(loaded, tokenizer=tokenizer)
