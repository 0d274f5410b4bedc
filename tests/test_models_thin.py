"""Thin products against plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from d2obench.models import thin
from d2obench.models.base import loaded
from d2obench.models.thin import ROWS, ThinLinear, adapt, block_of


@pytest.mark.parametrize("features", [384, 576, 1536, 4096, 11008, 14336, 49152, 128256])
def test_usual_sizes_are_cut_evenly(features):
    assert features % block_of(features) == 0


@pytest.mark.parametrize("features", [1, 192, 383, 1009])
def test_small_and_odd_ones_are_left_alone(features):
    assert block_of(features) == 0


@pytest.mark.parametrize("rows", [1, 3, *ROWS, 13, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_thin_product_is_the_product(rows, bias):
    torch.manual_seed(rows)
    plain = nn.Linear(40, 480, bias=bias)
    holder = nn.Sequential(nn.Linear(40, 480, bias=bias))
    holder.load_state_dict({f"0.{name}": tensor for name, tensor in plain.state_dict().items()})
    holder.device, holder.dtype = torch.device("cpu"), torch.float32
    adapt(holder)
    assert type(holder[0]) is ThinLinear
    given = torch.randn(1, rows, 40).expand(2, -1, -1)[1:] if rows % 2 else torch.randn(rows, 1, 40)
    expected = given.double() @ plain.weight.double().T + (plain.bias.double() if bias else 0)
    torch.testing.assert_close(holder(given).double(), expected, rtol=1e-4, atol=1e-5)
    assert holder(given).shape == plain(given).shape


@pytest.mark.parametrize(("dtype", "serves"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_described_model_has_them_where_they_serve(dtype, serves):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=480
    )
    described = loaded("x", LlamaForCausalLM(config).to(dtype), None, digest="", has_sense=False)
    assert isinstance(described.model.lm_head, ThinLinear) is serves
    assert type(described.model.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_prompt_in_pieces_is_the_prompt(monkeypatch):
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=90
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 90, (3, 17))
    with torch.no_grad():
        expected = model(tokens).logits
        adapt(model)
        monkeypatch.setattr(thin, "PIECE", 7)
        sizes = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *seen: sizes.append(seen[2].shape[1]))
        torch.testing.assert_close(model(tokens).logits, expected)
    assert sizes == [7] * 7 + [2]


class Feed(nn.Module):
    """A feed-forward layer that takes ``count`` tensors, with or without experts."""

    def __init__(self, count: int, experts: bool):
        super().__init__()
        if experts:
            self.experts = nn.Identity()
        self.forward = (lambda hidden: hidden) if count == 1 else (lambda hidden, residual: hidden)


@pytest.mark.parametrize(("count", "experts", "cut"), [(1, False, True), (2, False, False), (1, True, False)])
def test_only_a_layer_that_looks_at_each_token_alone_is_cut(count, experts, cut):
    holder = nn.Module()
    holder.mlp, holder.device, holder.dtype = Feed(count, experts), torch.device("cpu"), torch.float32
    before = holder.mlp.forward
    adapt(holder)
    assert (holder.mlp.forward is not before) is cut
