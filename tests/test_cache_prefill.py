"""A layer compressed while the prompt is read: the same results, and its full keys and values gone in time."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_families
import torch
from tiny_families import prompts, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2obench.attention import prompt as prefill
from d2obench.attention.interface import keyword
from d2obench.cache import PolicyCache, Session, policy_cache
from d2obench.models import LoadedModel
from d2obench.policies import parse_choice, parse_policy
from d2obench.policies.h2o import H2O
from d2obench.suite.grammar import Budget, parse_budget

EARLY = [
    "local", "streaming", "h2o", "roco", "tova", "cam", "random", "snapkv(window=4)", "pyramidkv(window=4)",
    "d2o(allocate=uniform)", "d2o(allocate=uniform,inherit=true,hosts=important)", "h2o+quant(bits=8)", "full", "quant",
]  # fmt: skip
LATE = ["d2o", "d2o(allocate=uniform,exempt=[0])", "d2o(preset=released)", "d2o+quant(bits=8)"]
CASCADES = ["cake(window=4)", "cake(window=4,tau1=0.5,decode=slide)", "cake(window=4)+quant(bits=8)"]
LAYERS, TOKENS = 16, 120
SMALL = 4096
"""Bytes of a storage that no peak is looked for at."""


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is compressed when all layers have read the prompt."""
    monkeypatch.setattr(PolicyCache, "_early", property(lambda self: self.keeps_all))
    monkeypatch.setattr(PolicyCache, "_cascades", False)


def run(model: LoadedModel, policy: str, texts: list[list[int]]) -> tuple[list[str], list[Any]]:
    marks: list[str] = []
    budget = "0.3" if parse_choice(policy).takes_budget else None
    session = Session(model, policy, budget, max_new=6, seed=3, mark=marks.append)
    logits = [session.prefill(texts)]
    marks.append("read")
    session.compress()
    kept = session.footprint()
    logits += [session.step(torch.tensor([step % 100 for _ in texts])) for step in range(6)]
    found = session.footprint()
    assert session.cache.state is not None
    scores = [held.clone() for held in session.cache.state.tensors()[:5]]
    return marks, [torch.stack(logits), kept.kept, kept.kv_bytes, found.merged_layers, found.evicted_layers, *scores]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize("policy", [*EARLY, *LATE, *CASCADES])
@pytest.mark.parametrize("lengths", [(61,), (61, 40)])
def test_early_is_late_bit_by_bit(policy: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny_model("llama-deep"), prompts(*lengths)
    marks, found = run(model, policy, texts)
    late(monkeypatch)
    _, expected = run(model, policy, texts)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    if policy in LATE or not parse_choice(policy).takes_budget:
        assert "compress" not in marks[: marks.index("read")]
    else:
        stamps = ["prefill", *["compress", "prefill"] * 5, "read"]
        assert marks[: len(stamps)] == stamps, "each layer is stamped apart"
    assert marks[-1] == "decode"


@pytest.mark.parametrize("policy", [policy for policy in EARLY + LATE + CASCADES if "released" not in policy])
@pytest.mark.parametrize("family", ["llama-gqa2", "gemma3", "falcon"])
def test_turns_of_one_block_each_are_turns(policy: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second turn's budgets come from the first one's: no policy waits in it."""

    def converse() -> tuple[list[torch.Tensor], Any]:
        model = tiny_model(family).model
        budget = 0.3 if parse_choice(policy).takes_budget else None
        held = policy_cache.cache(policy, budget, model=model, max_new=20, seed=1, whole=True)
        with torch.inference_mode():
            blocks = [prompts(30, 30), [[3], [4]], [[5], [6]], prompts(11, 11, seed=2), [[7], [8]], [[9], [10]]]
            return [model(torch.tensor(block), **{keyword(model): held}).logits for block in blocks], held

    found, held = converse()
    assert held.lengths.tolist() == [43, 43]
    assert held.seen == 45
    late(monkeypatch)
    expected, _ = converse()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_prompt_in_several_blocks_waits_for_the_last() -> None:
    """Unless it is said that there is only one."""
    model, marks = tiny_model("llama-gqa2").model, []
    held = policy_cache.cache("h2o", 0.3, model=model, max_new=4, mark=marks.append)
    with torch.inference_mode():
        for block in (prompts(20), prompts(15)):
            model(torch.tensor(block), **{keyword(model): held})
    assert (held.ready, marks) == (False, [])
    assert all(layer.keys.shape[2] == 35 for layer in held.own)


@pytest.mark.parametrize("policy", [policy for policy in EARLY if parse_choice(policy).takes_budget])
def test_a_policy_that_does_not_wait_needs_lengths_only(policy: str) -> None:
    built = parse_policy(policy)
    assert not built.budgets_need_stats
    length = torch.tensor([50, 70])
    none: list[Any] = [{}] * 4
    stats = [{"sum": torch.rand(2, 3, 70), "square": torch.rand(2, 3, 70)} for _ in range(4)]
    budget = Budget(ratio=0.3)
    assert torch.equal(built.layer_budgets(none, length, budget), built.layer_budgets(stats, length, budget))


@pytest.mark.parametrize("budget", ["12", "30", "0.6"])
def test_budgets_of_a_cascade_are_within_its_bounds(budget: str) -> None:
    """Whatever the layers prefer, also where one of them takes the whole prompt and leaves much over."""
    policy, asked, length = parse_policy("cake(window=4)"), parse_budget(budget), torch.tensor([50, 41])
    generator, layers = torch.Generator().manual_seed(7), 24
    total = torch.tensor([asked.of(tokens) for tokens in length.tolist()]) * layers
    for _ in range(20):
        stats = [
            {name: torch.rand(2, 3, 1, generator=generator) ** power for name in ("entropy", "variance")}
            for power in torch.randint(1, 30, (layers,), generator=generator).tolist()
        ]
        budgets = policy.layer_budgets(stats, length, asked)
        for read in range(1, layers + 1):
            bounds = policy.budgets_so_far(stats[:read], length, asked, layers)
            assert bool((budgets[:read] <= bounds).all())
            assert bool((bounds.sum(0) <= total + 2 * read).all()), "the layers that have read it share one budget"
        assert bool((budgets.sum(0) <= total).all())


def test_budgets_of_ones_own_are_waited_for() -> None:
    """What a plugin overrides may read statistics."""

    class Own(H2O):
        def layer_budgets(self, stats: Any, length: Any, budget: Any) -> Any:
            return super().layer_budgets(stats, length, budget)

    assert Own().budgets_need_stats
    assert all(parse_policy(policy).budgets_need_stats for policy in LATE)


# --- what is alive --------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Bytes of all storages that operators made and that something still refers to, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def bytes(self) -> int:
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
        return sum(size for _, size in self.held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self.held.get(storage._cdata)
                if known is None or known[0].expired():
                    self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    if storage.nbytes() > SMALL:
                        self.peak = max(self.peak, self.bytes)
        return out


@pytest.fixture
def tall(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Models of many layers, and work buffers that are small beside their caches."""
    monkeypatch.setattr(prefill, "CPU_BLOCK", 24)
    monkeypatch.setattr(prefill, "CPU_CACHE", 2**10)
    for family in ("llama", "phi3"):
        sizes = tiny_families._sizes(4, 2, 16, LAYERS)
        config = {"model_type": family, "sliding_window": None, **sizes}
        monkeypatch.setitem(tiny_families.CONFIGS, f"tall-{family}", config)
    return lambda family: tiny_model(f"tall-{family}")


def peaks(model: LoadedModel, policy: str, budget: str | None) -> tuple[int, int, int, Session]:
    """Peak over prefill and compression, what is alive after either, and the session."""
    with Alive() as alive:
        session = Session(model, policy, budget, max_new=4)
        session.prefill(prompts(TOKENS, TOKENS))
        read = alive.bytes
        session.compress()
        return alive.peak, read, alive.bytes, session


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_peaks_of_the_prompt(family: str, tall: Any) -> None:
    model = tall(family)
    full, *_ = peaks(model, "full", None)
    for policy in ("h2o", "d2o(allocate=uniform)", "pyramidkv(window=4)"):
        peak, read, after, session = peaks(model, policy, "0.2")
        assert peak < 0.6 * full, policy
        assert read == after, "there is nothing left to do"
        held = session.footprint()
        assert after < held.kv_bytes + held.state_bytes + 0.02 * full
    peak, read, after, session = peaks(model, "cake(window=4)", "0.2")
    held = session.footprint()
    assert peak < 0.6 * full, "layers are cut while others read the prompt"
    assert read < 1.1 * held.kv_bytes + held.state_bytes
    assert after < held.kv_bytes + held.state_bytes + 0.02 * full
    for policy, budget in (("d2o", "0.2"), ("d2o", "0.6"), ("d2o+quant(bits=4)", "0.2")):
        peak, read, after, session = peaks(model, policy, budget)
        assert peak < 1.02 * full, (policy, budget)
        prompt = LAYERS * 2 * TOKENS * 2 * (2 * 16 + 1) * 4  # layers, sequences, tokens, heads, k, v and score, bytes
        assert read < 1.03 * prompt, "a fused projection is not kept alive by the values cut out of it"
        held = session.footprint()
        assert after < held.kv_bytes + held.state_bytes + 0.02 * full
