"""Caches of transformers beside ours: the same tokens, sizes after a jump, long texts, and quantised bytes."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from d2obench.errors import ModelError, PolicyError, UsageError
from d2obench.external import open_session
from d2obench.models import LoadedModel, load
from d2obench.models.base import bound_of
from d2obench.policies import LIBRARY_CACHES, parse_choice

PROMPTS = [[5, 9, 2, 7, 1, 8, 3], [4, 4, 6]]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load("shape:tiny", "float32", "cpu")


def logits_of(loaded: LoadedModel, policy: str, steps: int = 5) -> list[torch.Tensor]:
    session = open_session(loaded, policy, None, max_new=steps)
    found = [session.prefill(PROMPTS)]
    session.compress()
    for _ in range(steps):
        found.append(session.step(found[-1].argmax(-1)))
    session.close()
    return found


@pytest.mark.parametrize("name", LIBRARY_CACHES)
def test_a_yardstick_says_what_full_says(tiny: LoadedModel, name: str) -> None:
    for ours, theirs in zip(logits_of(tiny, "full"), logits_of(tiny, name), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LIBRARY_CACHES)
def test_a_jump_leaves_a_yardstick_as_long_as_the_real_thing(tiny: LoadedModel, name: str) -> None:
    jumped, whole = (open_session(tiny, name, None, max_new=24) for _ in range(2))
    for session in (jumped, whole):
        session.prefill(PROMPTS)
        session.compress()
    token = torch.tensor([1, 2])
    jumped.skip_to(20)
    for _ in range(20):
        whole.step(token)
    for session in (jumped, whole):
        session.step(token)
    assert jumped.footprint().held == whole.footprint().held == [[28.0, 28.0]] * 4
    assert jumped.footprint().kv_bytes == whole.footprint().kv_bytes


def test_a_preallocated_cache_hands_out_what_is_filled_only(tiny: LoadedModel) -> None:
    session = open_session(tiny, "sdpa-static", None, max_new=8)
    session.prefill(PROMPTS)
    layer = session.cache.layers[0]
    assert layer.keys.shape[2] == 15
    with torch.inference_mode():
        assert layer.update(layer.keys[:, :, :1], layer.values[:, :, :1])[0].shape[2] == 8


def test_beyond_the_context_only_where_it_was_asked_for(tiny: LoadedModel) -> None:
    long = [[1] * 4090]
    with pytest.raises(UsageError, match="its context is 4096 tokens"):
        open_session(tiny, "streaming", "32", max_new=10).prefill(long)
    session = open_session(tiny, "streaming", "32", max_new=10, beyond=True)
    session.prefill(long)
    session.compress()
    for _ in range(10):
        assert torch.isfinite(session.step(torch.tensor([1]))).all()


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {}, ""),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, ""),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("gemma3_text", {}, ""),
        ("falcon", {"alibi": True}, "not rotary"),
        ("gpt2", {}, "not rotary"),
        ("mistral", {"sliding_window": 4096}, "window of 4,096 tokens"),
    ],
)
def test_which_positions_go_on(family: str, changes: dict[str, object], said: str) -> None:
    from transformers import AutoConfig

    found = bound_of(AutoConfig.for_model(family, **changes))
    assert said in found if said else not found


def test_a_model_that_can_not_go_on_says_why(tiny: LoadedModel) -> None:
    from copy import copy

    other = copy(tiny.model.config)
    other.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}
    assert "longrope" in bound_of(other)


def test_a_sliding_window_is_not_jumped_over() -> None:
    from transformers import Gemma3TextConfig
    from transformers.cache_utils import DynamicCache

    from d2obench.external.library import skip

    with pytest.raises(ModelError, match="can't be moved on"):
        skip(DynamicCache(config=Gemma3TextConfig(num_hidden_layers=2)), 4)


@pytest.mark.parametrize("other", LIBRARY_CACHES)
def test_two_sessions_on_one_model_do_not_change_what_the_other_says(tiny: LoadedModel, other: str) -> None:
    """Their steps alternate on one model, although each needs an attention function of its own."""
    expected = logits_of(tiny, "full")
    ours, theirs = (open_session(tiny, policy, None, max_new=5) for policy in ("full", other))
    for session in (ours, theirs):
        torch.testing.assert_close(session.prefill(PROMPTS), expected[0], atol=1e-4, rtol=1e-4)
        session.compress()
    for before, after in itertools.pairwise(expected):
        token = before.argmax(-1)
        assert torch.equal(ours.step(token), after)
        torch.testing.assert_close(theirs.step(token), after, atol=1e-4, rtol=1e-4)


LONGER = [[i % 200 for i in range(start, start + 128)] for start in (0, 40)]


@pytest.fixture
def quanto(monkeypatch: pytest.MonkeyPatch) -> None:
    """optimum-quanto with a portable kernel, so that nothing is compiled."""
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)])

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", types.SimpleNamespace(unpack=unpack))


@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_are_those_of_packed_numbers_and_scales(tiny: LoadedModel, bits: int) -> None:
    full, packed = (open_session(tiny, name, None, max_new=8) for name in ("full", f"hf-quantized(bits={bits})"))
    ours, theirs = (session.prefill(LONGER) for session in (full, packed))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    packed.compress()
    found = packed.footprint()
    numbers = 2 * len(found.kept) * 2 * 128 * tiny.kv_heads * tiny.head_dim
    # a scale and a shift in the model's dtype for every 64 numbers
    assert found.kv_bytes == found.prompt_kv_bytes == numbers * bits // 8 + numbers // 64 * (4 + 4)
    assert found.kept == [[128.0, 128.0]] * tiny.layers
    saved = packed.snapshot()
    first = [packed.step(torch.tensor([1, 2])) for _ in range(3)]
    assert packed.footprint().held == [[131.0, 131.0]] * tiny.layers
    assert packed.footprint().kv_bytes == found.kv_bytes + 2 * tiny.layers * 2 * 3 * tiny.kv_heads * tiny.head_dim * 4
    packed.restore(saved)
    assert all(torch.equal(packed.step(torch.tensor([1, 2])), one) for one in first)


def test_its_parameters_are_checked() -> None:
    for text in ("hf-quantized(bits=3)", "hf-quantized(group=0)", "hf-quantized(bit=4)"):
        with pytest.raises(PolicyError):
            parse_choice(text)
