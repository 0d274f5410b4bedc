"""Products with the same input as one: the same numbers, the same weights, and the model as it was."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cache_model import padded, uses
from tiny_families import CONFIGS, plain_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from d2obench.attention.interface import keyword
from d2obench.compiler import missing
from d2obench.models import joined, kernels

JOINED = ["llama-gqa2", "mistral", "qwen2", "qwen3", "gemma3"]


def adapted(family: str, **settings: Any) -> Any:
    """A model with what a GPU's layers have, on the CPU in float64, where PyTorch's operators do what kernels do."""
    model = plain_model(family, "float64", **settings).requires_grad_(False)
    if family == "qwen2":
        for name, held in model.named_parameters():
            if name.endswith("bias"):
                held.normal_()
    joined.join(model)
    for module in model.modules():
        if joined.serves(module):
            module.forward = kernels.piecewise(module, on_gpu=True)
    return model


def plain(model: Any, family: str, **settings: Any) -> Any:
    """The model of the same weights as transformers has it."""
    found = plain_model(family, "float64", **settings)
    found.load_state_dict(model.state_dict())
    return found


def steps(model: Any) -> Tensor:
    """The logits of a padded prompt of two sequences and of three decode steps."""
    ids, mask = padded((30, 17), 30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = [model(ids, attention_mask=mask, **{keyword(model): cache}).logits[:, -1]]
        for step in range(3):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            ids = torch.tensor([[5 + step], [9 + step]])
            found.append(model(ids, attention_mask=mask, **{keyword(model): cache}).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("family", [*JOINED, "phi3"])
def test_a_joined_model_says_what_it_said(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases (qwen2), norms between products and positions (qwen3) and GELU (gemma3)."""
    monkeypatch.setattr(kernels, "GPU_PIECE", 16)
    products = []
    model = adapted(family)
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: products.append(given) or real(*given))
    found = steps(model)
    count, layers = len(products), model.config.num_hidden_layers
    # a layer of a step has 4 products; of a prompt 4 or, joined by the model itself, 2, and 2 for each of 4 pieces
    assert count == layers * ((2 if family == "phi3" else 4) + 4 * 2) + 1 + 3 * (4 * layers + 1)
    torch.testing.assert_close(found, steps(plain(model, family)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama-gqa2", "gemma3"])
def test_a_joined_model_is_a_model(family: str) -> None:
    """Whatever it is used for, after it was joined."""
    model = adapted(family)
    found, expected = uses(model), uses(plain(model, family))
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-9, atol=1e-9, msg=name)


def stored(model: Any) -> int:
    """Bytes of the parameters' memory, each address once."""
    stores = {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in model.parameters()}
    return sum(stores.values())


@pytest.mark.parametrize("family", JOINED)
def test_weights_are_the_same_and_held_once(family: str, tmp_path: Any) -> None:
    model, before = adapted(family), plain_model(family, "float64")
    assert stored(model) == stored(before)
    held = model.state_dict()
    assert held.keys() == before.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(held[name], tensor) or name.endswith("bias"), name
    rows = [parts for module in model.modules() for parts in joined._rows(module)]
    assert rows == [] and sum(type(module) is joined.JoinedLinear for module in model.modules()) == 3 * len(
        model.model.layers
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(tensor, held[name]) for name, tensor in again.state_dict().items())


def test_a_copy_and_a_model_of_another_dtype_have_weights_of_their_own() -> None:
    model = adapted("llama-gqa2")
    expected = steps(model)
    other = copy.deepcopy(model)
    attention = other.model.layers[0].self_attn
    assert attention.q_proj.row == (attention.q_proj, attention.k_proj, attention.v_proj)
    assert joined.joint_of(attention.q_proj.row) is None, "copies of weights lie apart"
    torch.testing.assert_close(steps(other), expected, rtol=1e-10, atol=1e-10)
    other.model.layers[0].self_attn.k_proj.weight.zero_()
    other.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(steps(model), expected)
    assert not torch.allclose(steps(other), expected)
    model.to(torch.float32)
    torch.testing.assert_close(steps(model).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_changes_changes_the_joint_product() -> None:
    model = adapted("llama-gqa2")
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(model.model.layers[1].self_attn, name).weight.mul_(1.5)
    model.model.layers[1].mlp.gate_proj.weight.mul_(0.5)
    torch.testing.assert_close(steps(model), steps(plain(model, "llama-gqa2")), rtol=1e-10, atol=1e-10)


def test_a_layer_that_is_called_with_another_input_computes_its_own() -> None:
    q, k, v = adapted("llama-gqa2").model.layers[0].self_attn.q_proj.row
    one, other = torch.randn(2, 2, 1, 64, dtype=torch.float64)
    q(one)
    torch.testing.assert_close(k(other), other @ k.weight.T)
    torch.testing.assert_close(k(one), one @ k.weight.T)
    torch.testing.assert_close(v(one), one @ v.weight.T)
    assert k.handed is v.handed is None


def test_a_joined_model_can_be_trained() -> None:
    model, other = adapted("qwen2"), plain_model("qwen2", "float64")
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([[3], [4]])
    for one in (model, other):
        one.requires_grad_(True)
        one(ids).logits.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - {*JOINED, "llama-mha", "llama-gqa4", "llama-deep"}))
def test_other_families_have_nothing_to_join(family: str) -> None:
    model = plain_model(family)
    joined.join(model)
    assert not any(isinstance(module, joined.JoinedLinear) for module in model.modules())
    assert not any("one by one" in one for one in joined.remarks(model))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: setattr(a, "k_proj", nn.Sequential(a.k_proj)), "they are no plain linear layers"),
        (lambda a: setattr(a.v_proj, "forward", a.v_proj.forward), "the layers are wrapped, for several devices"),
        (lambda a: a.q_proj.to(torch.bfloat16), "their weights differ in dtype or device"),
        (lambda a: setattr(a.q_proj, "bias", nn.Parameter(torch.zeros(64))), "only some of them have a bias"),
        (lambda a: setattr(a, "k_proj", nn.Linear(64, 24, bias=False)), "their sizes are no multiples of 16"),
    ],
)
def test_what_can_not_be_joined_stays_and_is_said(spoil: Any, reason: str) -> None:
    model = plain_model("llama-gqa2").requires_grad_(False)
    for layer in model.model.layers:
        spoil(layer.self_attn)
    joined.join(model)
    assert not any(isinstance(module, joined.JoinedLinear) for module in model.modules())
    assert f"products of queries, keys and values one by one: {reason}" in joined.remarks(model)
    assert not any("products of gated layers" in one for one in joined.remarks(model))


def test_without_room_a_layer_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any) -> Any:
        raise torch.OutOfMemoryError

    model = plain_model("llama-gqa2").requires_grad_(False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", full)
        joined.join(model)
    assert "products of gated layers one by one: their weights lie apart in memory" in joined.remarks(model)
    assert torch.equal(steps(model), steps(plain_model("llama-gqa2")))


# --- activation(gate)·up ----------------------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> Iterator[Any]:
    """The Triton kernel in its interpreter."""
    name = "d2obench.models.gated_triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(joined, "_refused", {})
        patch.setattr(joined, "_missing", missing)
        yield importlib.import_module(name).gated
    sys.modules.pop(name)


@pytest.mark.needs("triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernel runs on the GPU: pytest -m cuda")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 320), (1, 2, 2600)])
def test_the_kernel_is_the_activation(kernel: Any, shape: Any, gelu: bool, dtype: torch.dtype) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(6).to(dtype)
    x, up = given.double().chunk(2, -1)
    z = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    expected = (x / 2 * (1 + torch.tanh(z)) if gelu else x / (1 + torch.exp(-x))) * up
    found = kernel(given, gelu)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.needs("triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernel runs on the GPU: pytest -m cuda")
def test_a_layer_with_the_kernel_is_the_layer(kernel: Any) -> None:
    model = plain_model("gemma3").requires_grad_(False)
    layer, given = model.model.layers[0].mlp, torch.randn(2, 3, 64)
    expected = layer(given)
    joined.join(model)
    forward = joined.feed_forward(type(layer).forward)
    torch.testing.assert_close(forward(layer, given), expected, rtol=1e-4, atol=1e-6)
    assert not joined.kernel_fallback(model.device, model.dtype)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda given, gelu: 1 / 0, "the kernel did not compile (ZeroDivisionError: division by zero)"),
        (lambda given, gelu: given.chunk(2, -1)[0], "the kernel doesn't compute what PyTorch does"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_used_and_said(broken: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "_refused", {})
    monkeypatch.setattr(joined, "_missing", lambda device: "")
    monkeypatch.setitem(sys.modules, "d2obench.models.gated_triton", SimpleNamespace(gated=broken))
    model = plain_model("llama-gqa2").requires_grad_(False)
    joined.verify(model)
    joined.join(model)
    assert joined.remarks(model) == [f"gated layers by PyTorch's operators: {reason}"]
    for layer in model.model.layers:
        layer.mlp.forward = kernels.piecewise(layer.mlp, on_gpu=True)
    torch.testing.assert_close(steps(model), steps(plain_model("llama-gqa2")), rtol=1e-4, atol=1e-5)


def test_another_activation_is_the_librarys_and_said() -> None:
    model = plain_model("llama-gqa2", hidden_act="relu")
    assert "gated layers by PyTorch's operators: there is no kernel for ReLU" in joined.remarks(model)
    assert not any(map(joined.serves, model.modules()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", JOINED)
def test_on_a_gpu(family: str) -> None:
    model = plain_model(family).requires_grad_(False)
    expected = steps(model)
    model.cuda()
    kernels.adapt(model)
    assert joined.remarks(model) == []
    ids = torch.tensor([[5], [9]], device="cuda")
    torch.testing.assert_close(model(ids).logits.cpu(), plain_model(family)(ids.cpu()).logits, rtol=1e-3, atol=1e-3)
    assert len(expected) == 4
