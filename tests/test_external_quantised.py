"""transformers' quantised cache beside ours: bytes counted from its tensors, and a snapshot that is come back to."""

from __future__ import annotations

import types

import pytest
import torch

from d2obench.errors import PolicyError
from d2obench.external import open_session
from d2obench.models import load
from d2obench.policies import parse_choice

TEXT = [[i % 200 for i in range(start, start + 128)] for start in (0, 40)]


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
def test_bytes_are_those_of_packed_numbers_and_scales(bits: int) -> None:
    tiny = load("shape:tiny", "float32", "cpu")
    full, packed = (open_session(tiny, name, None, max_new=8) for name in ("full", f"hf-quantized(bits={bits})"))
    ours, theirs = (session.prefill(TEXT) for session in (full, packed))
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
