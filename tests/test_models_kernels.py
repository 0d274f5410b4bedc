"""Thin products against plain ones."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
from tiny_families import plain_model, prompts
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from d2obench import cpu
from d2obench.attention import interface
from d2obench.errors import SuiteError, UsageError
from d2obench.external import open_session
from d2obench.models import kernels, load
from d2obench.models.kernels import NORMS, ROWS, FusedNorm, QuickNorm, ThinLinear, adapt, adapt_layers, share_of
from d2obench.run.plan import cells
from d2obench.run.tensor_parallel import client_for
from d2obench.suite.definition import load_suite

lent = pytest.mark.skipif(not cpu.available(), reason="compiled loops cannot run here")


@pytest.mark.parametrize("outputs", [1, 12, 192, 576, 4096, 128256])
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_pieces_are_whole_tiles_and_enough_of_them(outputs, threads):
    share = share_of(outputs, threads)
    assert share % 3 == 0 and 12 <= share <= 96
    assert share == 12 or -(-outputs // share) >= min(threads, outputs // 12)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def adapted(module):
    holder = nn.Sequential(copy.deepcopy(module))
    holder.device, holder.dtype = torch.device("cpu"), torch.float32
    adapt_layers(holder)
    return holder[0]


@lent
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, ROWS, ROWS + 1])
@pytest.mark.parametrize("features", [2, 13, 480])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("threads")
def test_a_thin_product_is_the_product(rows, features, bias):
    torch.manual_seed(rows)
    plain = nn.Linear(40, features, bias=bias)
    thin = adapted(plain)
    assert type(thin) is ThinLinear
    given = torch.randn(1, rows, 40).expand(2, -1, -1)[1:] if rows % 2 else torch.randn(rows, 80, 1)[:, ::2].mT
    expected = given.double() @ plain.weight.double().T + (plain.bias.double() if bias else 0)
    torch.testing.assert_close(thin(given).double(), expected, rtol=1e-5, atol=1e-5)
    assert thin(given).shape == plain(given).shape


@lent
@pytest.mark.parametrize("shape", [(3, 24), (2, 130, 24), (1, 2, 5, 24)])
@pytest.mark.usefixtures("threads")
def test_a_quick_norm_is_the_norm(shape):
    plain = LlamaRMSNorm(24, eps=1e-3)
    nn.init.normal_(plain.weight)
    quick = adapted(plain)
    assert type(quick) is QuickNorm
    given = torch.randn(shape).mul(2).transpose(0, -2)
    wide = given.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3) * plain.weight.double()
    torch.testing.assert_close(quick(given).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_a_fused_norm_is_the_norm(dtype, near):
    plain = LlamaRMSNorm(24, eps=1e-3).to(dtype)
    nn.init.normal_(plain.weight)
    fused = copy.deepcopy(plain)
    fused.__class__ = FusedNorm
    given = torch.randn(2, 3, 24).mul(2).to(dtype)
    wide = given.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3) * plain.weight.double()
    torch.testing.assert_close(fused(given).double(), expected, rtol=near, atol=near)
    assert fused(given).dtype == dtype


def test_on_another_device_norms_alone_are_taken_over():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=48
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapt_layers(model)
    assert type(model.model.norm) is type(model.model.layers[0].input_layernorm) is FusedNorm
    assert type(model.lm_head) is nn.Linear and "forward" not in vars(model.model.layers[0].mlp)


@lent
def test_every_norm_that_is_taken_over_is_that_norm():
    """By transformers' own classes of those names."""
    found = 0
    for family in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name, kind in vars(module).items():
            if name.endswith("RMSNorm") and (plain := kind(16)) is not None:
                nn.init.normal_(plain.weight)
                given, quick = torch.randn(3, 16), adapted(plain)
                torch.testing.assert_close(quick(given), plain(given))
                found += type(quick) is QuickNorm
                assert (type(quick) is QuickNorm) is (name in NORMS)
    assert found == len(NORMS)


@lent
@pytest.mark.parametrize(("dtype", "serves"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_model_has_them_where_they_serve(dtype, serves):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=36, num_hidden_layers=1, num_attention_heads=2, vocab_size=480
    )
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    adapt(model)
    assert isinstance(model.lm_head, ThinLinear) is isinstance(model.model.norm, QuickNorm) is serves
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear, "36 inputs are no whole vectors"


def test_without_a_team_a_model_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert type(adapted(nn.Linear(40, 480))) is nn.Linear


def test_a_prompt_in_pieces_is_the_prompt(monkeypatch):
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=90
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 90, (3, 17))
    with torch.no_grad():
        expected = model(tokens).logits
        adapt_layers(model)
        monkeypatch.setattr(kernels, "PIECE", 7)
        sizes = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *seen: sizes.append(seen[2].shape[1]))
        torch.testing.assert_close(model(tokens).logits, expected)
    assert sizes == [7] * 7 + [2]


class OneTensor(nn.Module):
    """A feed-forward layer that looks at each token by itself."""

    def forward(self, hidden):
        return hidden


class TwoTensors(nn.Module):
    def forward(self, hidden, residual):
        return hidden


class Experts(OneTensor):
    def __init__(self):
        super().__init__()
        self.experts = nn.Identity()


class Wrapped(OneTensor):
    """A layer whose forward somebody has replaced already."""

    def __init__(self):
        super().__init__()
        self.forward = lambda hidden: hidden


@pytest.mark.parametrize(("layer", "cut"), [(OneTensor, True), (TwoTensors, False), (Experts, False), (Wrapped, False)])
def test_only_a_layer_that_looks_at_each_token_alone_is_cut(layer, cut):
    holder = nn.Module()
    holder.mlp, holder.device, holder.dtype = layer(), torch.device("cpu"), torch.float32
    before = holder.mlp.forward
    adapt_layers(holder)
    assert (holder.mlp.forward != before) is cut


@lent
def test_a_model_that_became_another_dtype_is_pytorchs():
    thin, quick = adapted(nn.Linear(16, 40)).to(torch.bfloat16), adapted(LlamaRMSNorm(16)).to(torch.bfloat16)
    given = torch.randn(3, 16, dtype=torch.bfloat16)
    assert torch.equal(thin(given), nn.functional.linear(given, thin.weight, thin.bias))
    assert quick(given).dtype == torch.bfloat16 and quick(given).isfinite().all()


def test_the_runtime_is_the_one_pytorch_brings():
    lines = [
        "7f00-7f01 r-xp 00000000 08:01 11  /usr/lib/libgomp.so.1.0.0",
        "7f01-7f02 r-xp 00000000 08:01 12  /a b/site-packages/torch/lib/libgomp-a34b3233.so.1",
        "7f03-7f04 rw-p 00000000 00:00 0",
    ]
    assert cpu._runtime("\n".join(lines)) == "/a b/site-packages/torch/lib/libgomp-a34b3233.so.1"
    assert cpu._runtime(lines[0]) == "/usr/lib/libgomp.so.1.0.0"
    assert cpu._runtime("") == "libgomp.so.1"


# --- the off switch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa2", "qwen3", "phi3", "gpt-neox", "falcon", "gemma3"])
def test_with_library_kernels_a_model_is_transformers_own_bit_for_bit(family, tmp_path):
    """Logits of a forward pass, of a prompt and of decode steps on transformers' cache; no module is ours."""
    plain_model(family).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa").eval()
    ours = load(str(tmp_path), kernels="library")
    assert ours.kernels == "library"
    for module in ours.model.modules():
        assert type(module).__module__.partition(".")[0] != "d2obench" and "forward" not in vars(module)
    ids = torch.tensor(prompts(40))
    session = open_session(ours, "hf-dynamic", None, max_new=6)
    cache, tokens = DynamicCache(config=theirs.config), torch.randint(2, 128, (6,))
    with torch.inference_mode():
        assert torch.equal(ours.model(ids).logits, theirs(ids).logits)
        given = {interface.keyword(theirs): cache}
        expected = [theirs(ids, logits_to_keep=1, **given).logits[:, -1]]
        expected += [theirs(token.view(1, 1), **given).logits[:, -1] for token in tokens]
    found = [session.prefill(ids.tolist())]
    session.compress()
    found += [session.step(token.view(1)) for token in tokens]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert session.decode_path.endswith("the model's own layers as in transformers")


def test_whose_kernels_run_a_model_is_part_of_a_cell_and_of_its_worker():
    plain, library = (load_suite("quick", words) for words in ({}, {"models.kernels": "library"}))
    assert plain.digest != library.digest
    assert [cell.id for cell in cells(plain)] == [cell.id for cell in cells(library)]
    assert not {cell.hash for cell in cells(plain)} & {cell.hash for cell in cells(library)}
    assert json.loads(client_for(library).command[-1]) == {"kernels": "library"}
    with pytest.raises(SuiteError, match=r"models\.kernels"):
        load_suite("quick", {"models.kernels": "mine"})
    with pytest.raises(UsageError, match="unknown kernels 'mine'; use one of d2obench, library"):
        load("shape:tiny", kernels="mine")


def test_a_run_with_library_kernels_says_so_in_its_rows(tmp_path):
    from d2obench.cli import main

    words = ["--policy", "full,h2o", "--model", "shape:tiny", "--task", "speed", "--shape", "32+8", "--rounds", "1"]
    words += ["--set", "timing.processes=1"]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["run", "quick", *words, "--batch", "1", "--device", "cpu", "--kernels", "library", "--out", str(out)])
    assert not ended.value.code
    rows = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert rows and all("as in transformers" in json.dumps(row) for row in rows)
    assert '"kernels":"library"' in (out / "run.json").read_text().replace(" ", "")
    assert "as in transformers" in (out / "report.md").read_text()
