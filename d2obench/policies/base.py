"""The interface of a policy: which entries of a prompt it keeps, and which slot each new token overwrites.

A policy is a frozen dataclass of its parameters; it holds no tensors. These methods define it:

1. ``needs``: which statistics of the prompt's attention map to gather (``d2obench.attention.prompt``).
2. ``layer_budgets``: how many entries each layer keeps (uniform unless a policy allocates).
3. ``rank``: a score per entry of the prompt; the highest are kept.
4. ``absorb``: what happens to the evicted entries of a layer (nothing, or a merge into the kept ones).
5. ``decode_rule`` and ``merge_spec``: data that states which slot a decode step frees and how the entry in it is
   merged. A backend of ``d2obench.decode`` executes them. If no kind of rule fits, the rule is :class:`Custom`: the
   policy's own ``observe`` and ``victims`` then run after every step, for all layers at once.

To add a policy: one file with such a dataclass, and one line in ``d2obench.policies.REGISTRY`` (or an entry point of
the group ``d2obench.policies`` in another package); the shared test matrix then covers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from d2obench.policies.calibration import QueryStatistics
from d2obench.policies.rotary import QueryMoments
from d2obench.policies.rules import Custom, DecodeRule, MassSpec, Merge, PagedReads, Repeat, RowSizes
from d2obench.policies.sharing import Sharing
from d2obench.suite.grammar import Budget

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

Stats = dict[str, Tensor]
"""Statistics of the prompt's attention map by name, see :class:`Needs`."""

RECENT = 1e20
"""Ranks of the recent window start here: higher than any score, lower than the rank of a sink."""


@dataclass(frozen=True)
class Needs:
    """The statistics of the prompt's attention map that a policy needs, per KV head (mean over the group's query
    heads).

    Args:
        columns: gather ``Σ_i A[i, j]`` over all queries as "sum".
        squares: gather ``Σ_i A[i, j]²`` over all queries as "square".
        window: gather sums over the last ``window`` queries as "window"; 0 for none.
        heads: keep query heads separate instead of averaging over the group ("sum" becomes ``[B, Hq, L]``).
        errors: measure what compression to equal budgets would cost each KV head (``d2obench.cache.budgets``), for
            ``layer_budgets`` only, as "error", float32 ``[B, H]``.
        queries: keep the last ``queries`` queries as :attr:`Entries.queries`, for a policy that computes what it needs
            from them itself; 0 for none.
        moments: gather mean and covariance of the queries before their rotation as :attr:`Entries.moments`.
        projection: hand over the layer's output projection as :attr:`Entries.projection`.

    ``a | b`` is what serves both: every statistic that either needs, and the larger of two numbers.
    """

    columns: bool = False
    squares: bool = False
    window: int = 0
    heads: bool = False
    errors: bool = False
    queries: int = 0
    moments: bool = False
    projection: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(**{name: max(value, getattr(other, name)) for name, value in vars(self).items()})

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of the sums over all queries: "sum", "square"."""
        return ("sum",) * (self.columns or self.squares) + ("square",) * self.squares


HOOKS = frozenset({"observe", "victims", "absorb_step"})
"""Methods that turn a policy's rule into a :class:`Custom` one if they are overridden."""


@dataclass
class Entries:
    """The entries of one layer, from which a policy chooses.

    Args:
        layer: index of the layer among the compressed layers, of which there are ``layers``.
        keys: ``[B, H, N, d]``.
        values: ``[B, H, N, d_v]``.
        position: int64 ``[B, H, N]``, true position; negative for padding.
        length: int64 ``[B]``, tokens of each sequence so far.
        stats: float32 ``[B, H, N]`` by name, see :class:`Needs`.
        seed: seed for policies that draw random numbers.
        first_head: index in the model of the first KV head; not 0 if a layer's heads are divided among ranks.
        queries: the prompt's last queries, ``[B, Hq, n, d]``, at most as many as :attr:`Needs.queries` asks for; None
            if it asks for none. Their positions end at ``length − 1``; those before 0 are padding.
        scale: factor of the logits.
        moments: statistics of the queries, if :attr:`Needs.moments` asks for them.
        rotary: rotation angle per position of each rotary pair, float32 ``[r/2]``; None if the angles depend on the
            length.
        projection: the layer's output projection W_O, ``[hidden, Hq·d_v]``, if :attr:`Needs.projection` asks for it
            and the model is known.
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
    queries: Tensor | None = None
    scale: float = 1.0
    moments: QueryMoments | None = None
    rotary: Tensor | None = None
    projection: Tensor | None = None


@dataclass
class Kept:
    """The entries that a layer keeps.

    Args:
        index: int64 ``[B, H, C]``, indices of the kept entries, in the order of positions; N for a slot that stays
            empty.
        evicted: indices of the evicted entries, int64 ``[B, H, E]``; N for "none".
        total: N, the number of entries.
        keys: ``[B, H, C, d]``, after merging.
        values: ``[B, H, C, d_v]``.
        target: the slot that each evicted entry was merged into, int64 ``[B, H, E]``, −1 for one that was dropped; None
            where nothing was merged.
    """

    index: Tensor
    evicted: Tensor
    total: int
    keys: Tensor
    values: Tensor
    target: Tensor | None = None

    @property
    def filled(self) -> Tensor:
        """Which slots hold an entry, bool ``[B, H, C]``."""
        return self.index < self.total

    @property
    def leaving(self) -> Tensor:
        """Which of the ``evicted`` indices are entries, bool ``[B, H, E]``."""
        return self.evicted < self.total


@dataclass(frozen=True)
class Policy:
    """Base class of all policies; without overrides it keeps the most recent tokens."""

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    takes_budget: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Parameters that each value of ``preset`` stands for; parameters given explicitly take precedence."""
    needs_attention: ClassVar[bool] = False
    """Whether the decode rule needs the attention of each step."""
    bits: int | None = field(default=None, kw_only=True)
    """Bits per stored number, set by ``+quant(bits=…)``; None or 16 for the model's dtype."""
    sharing: Sharing | None = field(default=None, kw_only=True)
    """How a layer's entries are shared out over its KV heads, set by ``adakv(score=…)``; None for equal parts."""
    statistics: QueryStatistics | None = field(default=None, kw_only=True)
    """Those of the model's queries, for a policy with a :attr:`calibration`; set when it meets the model."""

    @property
    def needs(self) -> Needs:
        """The statistics of the prompt's attention map that this policy needs."""
        return Needs()

    @property
    def calibration(self) -> str:
        """Where :attr:`statistics` come from, if the policy needs them: a file, or ``generated`` for a measurement on
        generated texts (:mod:`d2obench.cache.calibration`); empty for most policies."""
        return ""

    @property
    def files(self) -> tuple[str, ...]:
        """Files that parameters name, whose content the results depend on."""
        return ()

    @property
    def interval(self) -> int:
        """Number of tokens that are evicted together; eviction happens once in as many steps."""
        return 1

    @property
    def grows(self) -> bool:
        """Whether decoding appends tokens instead of evicting (methods that, as published, compress the prompt
        only)."""
        return False

    @property
    def compresses_after_first_step(self) -> bool:
        """Whether the prompt is compressed after the first decode step instead of before it."""
        return False

    @property
    def carries_over(self) -> bool:
        """Whether what one prompt leaves behind changes the next one, so that prompts must come in their order."""
        return False

    @property
    def protects_prompt(self) -> bool:
        """Whether the whole prompt stays and the budget is over generated tokens
        (``d2obench.policies.protect``)."""
        return False

    @property
    def budgets_need_stats(self) -> bool:
        """Whether ``layer_budgets`` needs the statistics, so that no layer can be compressed before all layers have
        read the prompt. A policy whose own budgets depend only on lengths returns False here."""
        return type(self).layer_budgets is not Policy.layer_budgets

    @property
    def merge_spec(self) -> Merge | None:
        """How an evicted entry is merged during decoding; None if it is dropped."""
        return None

    @property
    def adds_biases(self) -> bool:
        """Whether slots have biases of their own, which attention adds to their logits."""
        return isinstance(self.merge_spec, MassSpec)

    @property
    def block(self) -> int:
        """Number of tokens of a prompt that are read at once, where the cache is cut to the budget between such blocks;
        0 to read the whole prompt first."""
        return 0

    @property
    def repeats(self) -> Repeat | None:
        """That the model must repeat the prompt before it can be compressed, which gives every entry the statistic
        "repeated"; None for most policies."""
        return None

    @property
    def reads(self) -> PagedReads | None:
        """That everything is held, and the budget is what a decode step reads of it; None for most policies."""
        return None

    @property
    def decode_queries(self) -> int:
        """Number of newest queries that the decode rule needs, as ``state.queries``."""
        return 0

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        """How a decode step chooses what to evict. If a subclass overrides ``observe``, ``victims`` or ``absorb_step``
        but not this method, its rule is :class:`Custom` around the inherited rule."""
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
        """Whether the KV heads of a layer are judged together, by more than its budgets; such a policy can't divide
        them among ranks."""
        return self.sharing is not None

    @property
    def ragged(self) -> bool:
        """Whether the KV heads of a layer may keep different numbers of entries."""
        return self.sharing is not None

    def resolved(self) -> Policy:
        """The policy that actually runs, if the parameters stand for another one (presets)."""
        return self

    def check(self) -> None:
        """Raises a PolicyError for a parameter out of its range."""

    def in_slots(self, budget: Budget, slot_bytes: float) -> Budget:
        """The budget in slots; fewer than asked for if the policy needs ``equal=bytes`` for its biases
        (:mod:`d2obench.policies.biased`). ``slot_bytes`` is what a key and a value take."""
        return budget

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        """Number of entries that each layer keeps, int64 ``[layers, B]`` on the CPU; the same for all layers unless
        overridden.

        −1 means that the layer keeps the whole prompt and grows with every decoded token. A :attr:`ragged` policy may
        return a number for each KV head, ``[layers, B, H]``.

        Args:
            stats: per compressed layer, ``[B, H, L]`` by name; empty for a policy that does not need them.
            length: prompt tokens of each sequence, int64 ``[B]``.
            budget: the requested budget.
        """
        return torch.tensor([[budget.of(int(n)) for n in length.tolist()]] * len(stats))

    def budgets_so_far(self, stats: list[Stats], length: Tensor, budget: Budget, layers: int) -> Tensor:
        """Bounds of the budgets of the layers that have read the prompt, int64 ``[len(stats), B]`` on the CPU, for a
        policy whose layers may be cut before all have read it (:mod:`d2obench.cache.cascade`).

        A layer's budget must not be more than any of its bounds; and the entries that :meth:`rank` keeps under a budget
        must be among those that it keeps under a larger one.

        Args:
            stats, length, budget: see :meth:`layer_budgets`.
            layers: number of all layers.
        """
        raise TypeError(f"{type(self).__name__} can't bound its budgets")

    def describe(self, entries: Entries) -> None:
        """Adds statistics of the policy's own to ``entries.stats``, before :meth:`rank`, unless they are there already.
        Those of the kept entries are handed over to decoding."""

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        """A rank for each entry, float32 ``[B, H, N]``; the ``keep`` highest of each row are kept. ``keep`` is one
        number per sequence, ``[B]``, or one per KV head, ``[B, H]``; see :func:`per_row`."""
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, 0, keep)

    def absorb(self, entries: Entries, kept: Kept, keep: Tensor) -> dict[str, Tensor]:
        """Merges evicted entries into the kept ones: replaces ``kept.keys`` and ``kept.values``, and where their
        statistics change, those in ``entries.stats`` (by new tensors). Returns float32 tensors ``[B, H]`` by name
        (thresholds, counts) that :meth:`begin` and the decode state receive."""
        return {}

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        """Initialises what a :class:`Custom` rule stores in ``state.extra``, beside the decode state's own fields.

        Args:
            memory: what ``absorb`` returned, per layer.
            scores: the statistics of the kept entries, per layer, ``[B, H, C]``.
        """

    def observe(self, state: DecodeState) -> None:
        """Reads ``state.attention`` after a step and updates the rule's statistics; for a :class:`Custom` rule."""
        state.observe_inherited()

    def victims(self, state: DecodeState) -> Tensor:
        """The slots that the next ``interval`` tokens overwrite, int64 ``[layers, rows, interval]``; for a
        :class:`Custom` rule. By default those of the inherited rule, or the oldest tokens if there is none."""
        return state.inherited_victims()

    def absorb_step(self, state: DecodeState, victims: Tensor) -> None:
        """Merges the entries that a decode step evicts, after they were chosen and before their slots are overwritten;
        for a :class:`Custom` rule."""

    def recall(self, state: DecodeState) -> Stats:
        """The prompt statistics that can still be read from the slots, ``[layers, rows, C]`` by name. When a
        conversation gets another turn, the statistics of the new block are added to them."""
        return state.known()


def per_row(count: Tensor, device: torch.device) -> Tensor:
    """One number per sequence, ``[B]``, or per KV head, ``[B, H]``, in a shape that broadcasts over ``[B, H, N]``."""
    return count.to(device).reshape(len(count), -1, 1)


def window_rank(score: Tensor, entries: Entries, sinks: Tensor | int, recent: Tensor) -> Tensor:
    """Ranks from ``score``: the first ``sinks`` positions rank highest, then the last ``recent`` tokens (newest first;
    ``[B]`` or ``[B, H]``), then the rest by score; padding ranks lowest."""
    position, length = entries.position, entries.length[:, None, None]
    newest = position >= length - per_row(recent, position.device)
    rank = torch.where(newest, RECENT + 1e14 * position.float(), score)
    rank.masked_fill_((position >= 0) & (position < sinks), torch.inf)
    return rank.masked_fill_(position < 0, -torch.inf)


def select(rank: Tensor, keep: Tensor, most: int, fewest: int | None = None) -> tuple[Tensor, Tensor]:
    """Splits the entries of a layer by rank; ties go to the earlier entry.

    Args:
        rank: ``[B, H, N]``, −inf for padding.
        keep: entries to keep of each sequence, int64 ``[B]``, or of each KV head, ``[B, H]``.
        most: number of slots, at most N.
        fewest: the smallest of ``keep``; with it, nothing is read from a GPU.

    Returns:
        Kept ``[B, H, most]`` and evicted ``[B, H, E]`` indices, each ascending; N stands for "none". E is the largest
        number of entries that a row loses; on a GPU, with ``fewest``, what a row without padding would lose.
    """
    entries = rank.shape[2]
    order = rank.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(entries, device=rank.device)
    real = rank.gather(2, order) > -torch.inf
    within = place < per_row(keep, rank.device)
    kept = torch.where(within & real, order, entries)[..., :most].sort(-1).values
    evicted = torch.where(~within & real, order, entries).sort(-1).values
    if fewest is not None and rank.device.type != "cpu":
        span = max(0, entries - fewest)
    else:
        span = int((evicted < entries).sum(-1).max()) if evicted.numel() else 0
    return kept, evicted[..., :span]


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Entries ``[B, H, C, d]`` of ``rows`` ``[B, H, N, d]`` at ``index`` ``[B, H, C]`` (clamped to N − 1).

    Copies whole rows, from either of the memory layouts in which models leave them; gathering element by element takes
    three times as long.
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
