"""A model of lm-evaluation-harness whose answers come from a compressed cache.

Everything except the cache is as in the harness's own ``hf`` model: tokenisation, the prefix of an empty context,
truncation on the left, stop strings, the windows of a rolling likelihood. With the full cache the results are the same.

What is compressed, and what is scored:

* ``loglikelihood``: the context is the prompt. It is read in one pass and compressed to the budget; then the
  continuation is fed token by token (teacher forcing) through the compressed cache. Requests with the same context
  share its prefill: the cache is copied for each continuation.
* ``loglikelihood_rolling``: there is no context, so the first half of each window (or more, if more of it was already
  scored in the previous window) is the prompt. Its own tokens are scored before compression, by a plain forward pass;
  the rest through the compressed cache. A ``loglikelihood`` request without a context is scored in the same way.
* ``generate_until``: the context is the prompt; the answer is decoded greedily. Sampling raises an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from d2obench.attention import interface
from d2obench.errors import ModelError, UsageError
from d2obench.models import LoadedModel, load
from d2obench.policies import parse_choice
from d2obench.suite.grammar import parse_budget
from d2obench.tasks.generate import compressed, end_tokens, forced, greedy
from d2obench.tasks.prompts import Limits, has_chat

MAX_NEW = 256  # generated tokens if a task sets no limit; the harness's own default

_log = logging.getLogger("lm_eval.d2obench")  # below the harness's logger, so that its settings apply
Score = tuple[float, bool]


@dataclass(frozen=True)
class Window:
    """The tokens of one request: ``prompt`` is compressed; its tokens from index ``opening`` on are scored before
    compression, and those of ``rest`` after it."""

    prompt: tuple[int, ...]
    opening: int
    rest: tuple[int, ...]


def window(context: Sequence[int], continuation: Sequence[int], limit: int, *, rolling: bool) -> Window:
    """Splits a request. If both parts don't fit ``limit`` tokens, the start of the context is cut (the last token is
    never fed).

    Raises:
        UsageError: the continuation alone doesn't fit.
    """
    if len(continuation) > limit:
        what = f"a continuation of {len(continuation)} tokens is longer than the context of {limit}"
        raise UsageError(what, remedy="use a model with a longer context")
    tokens = tuple([*context, *continuation][-(limit + 1) :])
    known = len(tokens) - len(continuation)
    split = max(2, known, (len(tokens) + 1) // 2) if rolling or known == 1 else known
    return Window(tokens[:split], known, tokens[split:])


def batches(sizes: Sequence[tuple[int, int]], batch: int, limit: int) -> Iterator[list[int]]:
    """Indices of ``(prompt, new tokens)`` pairs, longest prompts first, in batches whose members fit the context
    together.

    A prompt of one token is never batched with longer ones, because the last token of longer prompts is fed separately.
    """
    part: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1])):
        prompt, new = sizes[part[0] if part else i][0], max(sizes[j][1] for j in [*part, i])
        if part and (len(part) == batch or prompt - 1 + new > limit or (sizes[i][0] == 1 < prompt)):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


class CompressedLM(TemplateLM):
    """The harness's model for ``--model d2obench``; the module's docstring describes how requests are scored.

    Args:
        pretrained: a model name as for d2obench's ``--model``, or a loaded model.
        policy: as text, for example ``d2o(merge=values)``.
        budget: a share of each prompt (0.2) or tokens per layer (512); ignored by a policy without a budget, as in
            suites.
        dtype: dtype of the weights.
        device: ``cpu``, ``cuda``, …; the harness's default, ``cuda:0``, means the first GPU if there is one.
        batch_size: number of prompts per batch.
        max_batch_size: unused; belongs to the harness's batch size ``auto``, which raises an error.
        max_length: tokens of context; at most, and by default, the model's.
        seed: seed for policies that draw random numbers.

    Raises:
        UsageError: an unknown argument, a wrong value, or a policy without the budget it needs.
        PolicyError, ModelError: the policy or model can't be loaded, or the model has no tokenizer or random weights.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel = "embedded",
        policy: str = "full",
        budget: str | float | int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: str | int = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = "pretrained, policy, budget, dtype, device, batch_size, max_length, seed"
            raise UsageError(f"the model d2obench has no argument '{next(iter(unknown))}'", remedy=f"it has {known}")
        self.policy, self.budget = str(policy), None if budget is None else str(parse_budget(budget))
        choice = parse_choice(self.policy)
        if choice.yardstick is not None:
            raise UsageError(f"{self.policy} can't be forked between continuations", remedy="use policy=full")
        choice.check()
        if not choice.takes_budget:
            self.budget = None
        elif self.budget is None:
            raise UsageError(f"the policy '{self.policy}' needs a budget", remedy="add budget=0.2 to --model_args")
        self.batch_size = _whole("batch_size", batch_size)
        self.seed = int(seed)
        if isinstance(pretrained, LoadedModel):
            self.loaded = pretrained
        else:
            self.loaded = load(str(pretrained), dtype, "auto" if device in (None, "cuda", "cuda:0") else str(device))
        if self.loaded.tokenizer is None or not self.loaded.has_sense:
            raise ModelError(
                f"{self.loaded.name} can't be evaluated",
                why="its weights are random or it has no tokenizer",
                remedy="use a model with real weights, for example pretrained=embedded",
            )
        self.tokenizer = self.loaded.tokenizer
        self._device = self.loaded.device
        context = min(self.loaded.context, interface.longest(self.loaded.model))
        self.max_length = context if max_length is None else min(context, _whole("max_length", max_length))
        self._kept: list[float] = []

    @property
    def eot_token_id(self) -> Any:
        """The token that ends a text; None if there is none."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the begin-of-text token, otherwise the end-of-text token."""
        found = getattr(self.tokenizer, "bos_token_id", None)
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            what = f"{self.loaded.name} can't score a text without a context"
            raise ModelError(what, why="its tokenizer has neither a first nor a last token")
        return int(found)

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness distinguishes its caches of tokenised requests."""
        return self.loaded.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of the prompt for a list of chat turns."""
        if not has_chat(self.tokenizer):
            raise ModelError(f"{self.loaded.name} has no chat template", remedy="leave out --apply_chat_template")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text → tokens; special ones are added as the tokenizer does, unless the text already begins with one."""
        if add_special_tokens is None:
            first = getattr(self.tokenizer, "bos_token", None) or getattr(self.tokenizer, "eos_token", None)
            add_special_tokens = not (first and string.startswith(first))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def get_model_info(self) -> dict[str, Any]:
        """Information that the harness writes next to its results; ``kept`` is the mean share of the prompts that was
        kept."""
        return {
            "policy": self.policy,
            "budget": self.budget,
            "kept": sum(self._kept) / len(self._kept) if self._kept else None,
            "model_digest": self.loaded.digest,
            "model_dtype": str(self.loaded.dtype),
            "max_length": self.max_length,
        }

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats; the module's docstring describes how they are split."""
        owners, windows = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(pair)
                owners.append(i)
                windows.append(window(context, continuation, self.max_length, rolling=True))
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._scores(windows, disable_tqdm), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before their first stop string."""
        groups: dict[Limits, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._limits(request.args[1]), []).append(i)
        texts: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        for limits, members in groups.items():
            room = self.max_length - limits.max_new
            prompts = [(self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in members]
            sizes = [(len(prompt), limits.max_new) for prompt in prompts]
            for part in batches(sizes, self.batch_size, self.max_length):
                with self._compressed([prompts[j] for j in part], limits.max_new) as (session, first, known):
                    found = greedy(session, first, limits, self.tokenizer, end_tokens(self.loaded))
                self._kept += [one["kept"] for one in known]
                for j, item in zip(part, found, strict=True):
                    texts[members[j]] = item["text"]
                    self.cache_hook.add_partial("generate_until", requests[members[j]].args, item["text"])
                bar.update(len(part))
        bar.close()
        self._say_kept()
        return [texts[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        windows = [
            window(context or [self.prefix_token_id], continuation, self.max_length, rolling=False)
            for _, context, continuation in requests
        ]

        def keep(i: int, score: Score) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[i][0], score)

        return self._scores(windows, disable_tqdm, keep)

    def _scores(
        self, windows: Sequence[Window], quiet: bool, done: Callable[[int, Score], None] = lambda i, score: None
    ) -> list[Score]:
        """Log-likelihood of each window, and whether greedy decoding would give it; ``done`` is called for each as soon
        as it is known."""
        found = [self._opening(item) for item in windows]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(windows):
            if item.rest:
                groups.setdefault(item.prompt, []).append(i)
            else:
                done(i, found[i])
        members = list(groups.values())
        sizes = [(len(prompt), max(len(windows[i].rest) for i in own)) for prompt, own in groups.items()]
        bar = tqdm(total=sum(map(len, members)), desc="loglikelihood", disable=quiet)
        for part in batches(sizes, self.batch_size, self.max_length):
            prompts = [[*windows[members[j][0]].prompt] for j in part]
            with self._compressed(prompts, max(sizes[j][1] for j in part)) as (session, first, known):
                rounds = max(len(members[j]) for j in part)
                state = session.snapshot() if rounds > 1 else None
                for turn in range(rounds):
                    if turn:
                        session.restore(state)
                    asked = [members[j][turn] if turn < len(members[j]) else None for j in part]
                    column = [() if i is None else windows[i].rest for i in asked]
                    for one, (value, best) in zip(asked, forced(session, first, column), strict=True):
                        if one is not None:
                            found[one] = (found[one][0] + value, found[one][1] and best)
                            done(one, found[one])
                            bar.update()
            self._kept += [one["kept"] for one in known]
        bar.close()
        self._say_kept()
        return found

    def _opening(self, item: Window) -> Score:
        """The score of the prompt's own tokens, from a plain forward pass, that is, before compression."""
        count = len(item.prompt) - item.opening
        if not count:
            return 0.0, True
        ids = torch.tensor([item.prompt], device=self.loaded.device)
        with torch.inference_mode():
            logits = self.loaded.model(ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].float()
        target = ids[0, item.opening :]
        value = logits.log_softmax(-1).gather(-1, target[:, None]).double().sum()
        return float(value), bool((logits.argmax(-1) == target).all())

    def _compressed(self, prompts: list[list[int]], max_new: int) -> Any:
        return compressed(self.loaded, self.policy, self.budget, prompts, max_new=max_new, seed=self.seed)

    def _limits(self, asked: dict[str, Any]) -> Limits:
        """The limits of an answer, from a task's ``generation_kwargs``."""
        kwargs = normalize_gen_kwargs(asked, MAX_NEW)
        if kwargs["do_sample"] and float(kwargs.get("temperature", 1.0)) > 0:
            raise UsageError("this model decodes greedily", remedy="add --gen_kwargs do_sample=False")
        if not 0 < kwargs["max_gen_toks"] < self.max_length:
            what = f"{kwargs['max_gen_toks']} generated tokens leave no room in a context of {self.max_length}"
            raise UsageError(what, remedy="add --gen_kwargs max_gen_toks=64")
        return Limits(kwargs["max_gen_toks"], tuple(word for word in kwargs["until"] if word), strip=False)

    def _say_kept(self) -> None:
        if self._kept:
            asked = f"{self.policy} at {self.budget}" if self.budget else self.policy
            _log.info("%s kept %.1f %% of the prompts so far", asked, 100 * sum(self._kept) / len(self._kept))


def _whole(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise UsageError(f"{name} can't be '{value}'", remedy="use a whole number above 0")
    return int(value)
