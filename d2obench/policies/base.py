"""What a policy is: which entries of a prompt it keeps, and which slot each new token takes.

A policy is a frozen dataclass of its parameters; it holds no tensors. It is asked at these points:

1. ``needs``: which statistics of the prompt's attention map to gather (``d2obench.attention.prompt``).
2. ``layer_budgets``: how many entries each layer keeps (uniform unless a policy allocates).
3. ``rank``: a score per entry of the prompt; the highest are kept.
4. ``absorb``: what happens to the evicted entries of a layer (nothing, or a merge into the kept ones).
5. ``decode_rule`` and ``merge_spec``: as data, which slot a decode step frees and what becomes of its entry. A backend
   of ``d2obench.decode`` executes them. A rule that none of these kinds describes is :class:`Custom`: the policy's own
   ``observe`` and ``victims`` run after every step, for all layers at once.

Adding a policy: one file with one such dataclass, one line in ``d2obench.policies.REGISTRY`` (or an entry point in
the group ``d2obench.policies`` of another package); the shared test matrix then covers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from d2obench.suite.grammar import Budget

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

Stats = dict[str, Tensor]
"""Statistics of the prompt's attention map by name, see :class:`Needs`."""

RECENT = 1e20
"""Ranks from here up are the recent window: above any score, below a sink."""


@dataclass(frozen=True)
class Needs:
    """What a policy wants to know of the prompt's attention map, per KV head (mean over the group's query heads).

    Args:
        columns: ``Σ_i A[i, j]`` over all queries, "sum".
        squares: ``Σ_i A[i, j]²`` over all queries, "square".
        window: sums over the last ``window`` queries only, "window"; 0 for none.
        heads: keep query heads apart instead of averaging the group ("sum" becomes ``[B, Hq, L]``).
    """

    columns: bool = False
    squares: bool = False
    window: int = 0
    heads: bool = False


@dataclass(frozen=True)
class MergeSpec:
    """D2O's merge of what a decode step evicts: into the kept entry of the most similar key, its *merge target*, if the
    similarity reaches a threshold (``d2obench.policies.merging``).

    Args:
        beta: weight of the newest similarity in the threshold's moving average.
        keys: whether keys are merged beside values.
        per_layer: one threshold per sequence and layer instead of one per KV head.
        targets: all kept entries, or only those that are neither sinks nor recent.
        inherit: whether a merge target also takes the score of what it absorbs.
    """

    beta: float
    keys: bool = True
    per_layer: bool = False
    targets: Literal["all", "important"] = "all"
    inherit: bool = False


@dataclass(frozen=True)
class SpreadSpec:
    """CaM's merge of what a decode step evicts: ``value / parts`` is added to the values of the next ``parts`` slots of
    a :class:`Ring`, with the probability ``attention ÷ mean attention of the younger entries``, at most 1."""

    parts: int


@dataclass(frozen=True)
class RowSizes:
    """What a decode rule may depend on; a row is one KV head of one sequence.

    Args:
        budget: entries that a row holds beside the tokens to come, int64 ``[layers, rows]``.
        position: true position of each slot's entry, in ascending order, ``[layers, rows, C]``; negative without one.
        length: tokens of each row's sequence so far, int64 ``[rows]``.
    """

    budget: Tensor
    position: Tensor
    length: Tensor

    @property
    def held(self) -> Tensor:
        """Entries that a row holds now, int64 ``[layers, rows]``."""
        return (self.position >= 0).sum(-1)

    def leading(self, count: Tensor) -> Tensor:
        """Slots that the first ``count`` ``[layers, rows]`` tokens of a text take: fewer where an earlier, smaller
        budget has already lost some of them."""
        there = ((self.position >= 0) & (self.position < count[..., None])).sum(-1)
        return count - (torch.minimum(count, self.length) - there)


@dataclass(frozen=True, eq=False)
class LowestScore:
    """Evicts the lowest accumulated attention outside a recent window.

    Args:
        recent: size of the window, int64 ``[layers, rows]``.
        sinks: positions below this (a number or ``[layers, rows]``) are never evicted.
        normalised: divide a score by the number of queries that could see the token.
    """

    recent: Tensor
    sinks: Tensor | int = 0
    normalised: bool = False


@dataclass(frozen=True, eq=False)
class Ring:
    """Evicts the oldest entry behind the first ones. Entries lie in the order of their positions, so the slots from
    ``first`` on (int64 ``[layers, rows]``) are a ring, overwritten one after the other."""

    first: Tensor


@dataclass(frozen=True)
class LatestAttention:
    """Evicts what the newest query attends to least, on the mean over all heads of a layer."""


@dataclass(frozen=True, eq=False)
class MeanOfLowDeviation:
    """Evicts the lowest mean attention among the entries of low standard deviation.

    Args:
        safe: entries of the highest deviation that are safe, int64 ``[layers, rows]``.
        newest: newest tokens whose deviation counts as infinite, int64 ``[layers, rows]``.
    """

    safe: Tensor
    newest: Tensor


@dataclass(frozen=True)
class LowestDraw:
    """Evicts the lowest of the numbers that entries drew, once each (``d2obench.policies.random``)."""


@dataclass(frozen=True, eq=False)
class Custom:
    """A rule in code: the policy's own ``observe``, ``victims`` and ``absorb_step`` run, as PyTorch operators.

    Args:
        inherited: the rule that the hooks left out follow.
        why: in words, for the record's decode path.
    """

    inherited: DecodeRule | None = None
    why: str = "the policy's rule is code of its own"


DecodeRule = LowestScore | Ring | LatestAttention | MeanOfLowDeviation | LowestDraw | Custom
"""How a decode step chooses the slot that the next token takes. The reference for each is in
``d2obench.decode.reference``."""
HOOKS = frozenset({"observe", "victims", "absorb_step"})
"""Methods that make a policy's rule :class:`Custom`."""


@dataclass
class Entries:
    """The entries of one layer that a policy chooses from.

    Args:
        layer: index among the compressed layers, of ``layers``.
        keys: ``[B, H, N, d]``.
        values: ``[B, H, N, d_v]``.
        position: int64 ``[B, H, N]``, true position; negative for padding.
        length: int64 ``[B]``, tokens of each sequence so far.
        stats: float32 ``[B, H, N]`` by name, see :class:`Needs`.
        seed: for policies that draw.
        first_head: the model's index of the first KV head, where ranks share a layer's heads.
    """

    layer: int
    layers: int
    keys: Tensor
    values: Tensor
    position: Tensor
    length: Tensor
    stats: Stats
    seed: int = 0
    first_head: int = 0


@dataclass
class Kept:
    """What a layer keeps of its entries.

    Args:
        index: int64 ``[B, H, C]``, indices into the entries in the order of positions; N where a slot stays empty.
        evicted: the same for the evicted entries, ``[B, H, E]``.
        total: N.
        keys: ``[B, H, C, d]``, after merging.
        values: ``[B, H, C, d_v]``.
    """

    index: Tensor
    evicted: Tensor
    total: int
    keys: Tensor
    values: Tensor

    @property
    def filled(self) -> Tensor:
        """Which slots hold an entry, ``[B, H, C]``."""
        return self.index < self.total

    @property
    def leaving(self) -> Tensor:
        """Which evicted indices stand for an entry, ``[B, H, E]``."""
        return self.evicted < self.total


@dataclass(frozen=True)
class Policy:
    """Base of all policies; by itself it keeps the most recent tokens."""

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    takes_budget: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Parameters that a value of ``preset`` stands for; what is given beside it goes first."""
    needs_attention: ClassVar[bool] = False
    """Whether the decode rule needs the attention of each step."""
    bits: int | None = field(default=None, kw_only=True)
    """Bits of a stored number, set by ``+quant(bits=…)``; None or 16 for the model's dtype."""

    @property
    def needs(self) -> Needs:
        """Statistics of the prompt's attention map."""
        return Needs()

    @property
    def interval(self) -> int:
        """Tokens evicted together, every so many steps."""
        return 1

    @property
    def grows(self) -> bool:
        """Whether decoding appends instead of evicting (prompt-only methods, as published)."""
        return False

    @property
    def compresses_after_first_step(self) -> bool:
        """Whether the prompt is compressed after the first decode step instead of before it."""
        return False

    @property
    def budgets_need_stats(self) -> bool:
        """Whether ``layer_budgets`` needs the statistics, so that no layer can be compressed before all of them have
        read the prompt. A policy with budgets of its own that only need lengths says so here."""
        return type(self).layer_budgets is not Policy.layer_budgets

    @property
    def merge_spec(self) -> MergeSpec | SpreadSpec | None:
        """How what a decode step evicts is merged; None for not at all."""
        return None

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        """How a decode step chooses what to evict. A class that overrides ``observe``, ``victims`` or ``absorb_step``
        and not this method gets :class:`Custom` around the rule that it inherits."""
        return Custom()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "decode_rule" in vars(cls) or not HOOKS & vars(cls).keys():
            return
        inherited = cls.decode_rule

        def decode_rule(self: Policy, sizes: RowSizes) -> DecodeRule:
            rule = inherited(self, sizes)
            return rule if isinstance(rule, Custom) else Custom(rule)

        cls.decode_rule = decode_rule  # type: ignore[method-assign]

    @property
    def caches_query_heads(self) -> bool:
        """Whether keys are cached once per query head instead of once per KV head."""
        return False

    @property
    def judges_heads_together(self) -> bool:
        """Whether a step judges the KV heads of a layer together: such a policy can't share them out over ranks."""
        return False

    def resolved(self) -> Policy:
        """The policy that really runs, for parameters that stand for another one (presets)."""
        return self

    def check(self) -> None:
        """Raises a PolicyError for a parameter out of its range."""

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        """Entries each layer keeps, int64 ``[layers, B]`` on the CPU; uniform unless a policy allocates.

        −1 stands for "all of the prompt, and growing with every decoded token".

        Args:
            stats: per compressed layer, ``[B, H, L]`` by name; empty for a policy that doesn't wait for them.
            length: prompt tokens of each sequence, int64 ``[B]``.
            budget: what was asked for.
        """
        return torch.tensor([[budget.of(int(n)) for n in length.tolist()]] * len(stats))

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        """A float32 rank per entry, ``[B, H, N]``; the ``keep`` ``[B]`` highest of each row are kept."""
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, 0, keep)

    def absorb(self, entries: Entries, kept: Kept, keep: Tensor) -> dict[str, Tensor]:
        """Merges evicted entries into ``kept.keys`` and ``kept.values`` in place; returns per-row float32 ``[B, H]``
        figures to remember (thresholds, counts)."""
        return {}

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        """Sets up what a :class:`Custom` rule keeps beside the decode state's own fields, in ``state.extra``.

        Args:
            memory: what ``absorb`` returned, per layer.
            scores: the statistics of the kept entries, per layer, ``[B, H, C]``.
        """

    def observe(self, state: DecodeState) -> None:
        """Takes in ``state.attention`` after a step; for a :class:`Custom` rule."""
        state.observe_inherited()

    def victims(self, state: DecodeState) -> Tensor:
        """The slots that the next ``interval`` tokens take, int64 ``[layers, rows, interval]``; for a :class:`Custom`
        rule. The oldest tokens, where no rule is inherited."""
        return state.inherited_victims()

    def absorb_step(self, state: DecodeState, victims: Tensor) -> None:
        """Merges what decoding evicts, right after it was chosen and before its slot is reused; for a :class:`Custom`
        rule."""

    def recall(self, state: DecodeState) -> Stats:
        """The prompt statistics that the slots still know, ``[layers, rows, C]`` by name: when a conversation goes on,
        the new block's are added to them."""
        return state.known()


def window_rank(score: Tensor, entries: Entries, sinks: Tensor | int, recent: Tensor) -> Tensor:
    """``score`` with the first ``sinks`` positions above everything, then the last ``recent`` ``[B]`` (newest
    highest), then the rest by score; padding below everything."""
    position, length = entries.position, entries.length[:, None, None]
    rank = score.clone()
    newest = position >= length - recent.to(position.device)[:, None, None]
    rank[newest] = RECENT + 1e14 * position[newest].float()
    rank.masked_fill_((position >= 0) & (position < sinks), torch.inf)
    return rank.masked_fill_(position < 0, -torch.inf)


def select(rank: Tensor, keep: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Splits the entries of a layer by rank; ties go to the earlier entry.

    Args:
        rank: ``[B, H, N]``, −inf for padding.
        keep: int64 ``[B]``, entries to keep of each sequence.
        most: slots offered, at most N.

    Returns:
        Kept ``[B, H, most]`` and evicted ``[B, H, N − most]`` indices, each ascending; N stands for "none". An entry
        beyond a sequence's ``keep`` among the first ``most`` is evicted too and joins the evicted ones.
    """
    entries = rank.shape[2]
    order = rank.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(entries, device=rank.device)
    real = rank.gather(2, order) > -torch.inf
    within = place < keep.to(rank.device)[:, None, None]
    kept = torch.where(within & real, order, entries)[..., :most].sort(-1).values
    evicted = torch.where(~within & real, order, entries).sort(-1).values
    span = int((evicted < entries).sum(-1).max()) if evicted.numel() else 0
    return kept, evicted[..., :span]


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Entries ``[B, H, C, d]`` of ``rows`` ``[B, H, N, d]`` at ``index`` ``[B, H, C]`` (clamped to N − 1).

    Whole rows are copied, straight from either layout a model leaves them in; a gather by element takes thrice the
    time.
    """
    batch, heads, total, width = rows.shape
    index = index.clamp_max(total - 1)
    sequence = torch.arange(batch, device=rows.device)[:, None, None]
    head = torch.arange(heads, device=rows.device)[:, None]
    if rows.transpose(1, 2).is_contiguous():
        flat, at = rows.transpose(1, 2).view(-1, width), (sequence * total + index) * heads + head
    else:
        flat, at = rows.reshape(-1, width), (sequence * heads + head) * total + index
    return flat.index_select(0, at.view(-1)).view(batch, heads, -1, width)
