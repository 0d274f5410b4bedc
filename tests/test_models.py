"""Models by name: dimensions against published figures, refusals of what is missing or unsafe, the real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2obench.errors import D2OBenchError, ModelError, OutOfMemory, UsageError
from d2obench.models import Dimensions, LoadedModel, check, config_of, known, load, pull
from d2obench.models.base import dimensions_of
from d2obench.models.saved import fingerprint
from d2obench.models.shapes import SHAPES, Shape

# parameter counts as the checkpoints' safetensors headers say (falcon-7b: its tied output layer counted once)
PUBLISHED = {
    "llama-3-8b": (32, 32, 8, 128, 4096, 128_256, 8_030_261_248),
    "llama-2-7b": (32, 32, 32, 128, 4096, 32_000, 6_738_415_616),
    "llama-2-13b": (40, 40, 40, 128, 5120, 32_000, 13_015_864_320),
    "mistral-7b": (32, 32, 8, 128, 4096, 32_000, 7_241_732_096),
    "falcon-7b": (32, 71, 1, 64, 4544, 65_024, 7_217_189_760 - 65_024 * 4544),
    "qwen2.5-7b": (28, 28, 4, 128, 3584, 152_064, 7_615_616_512),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_has_published_dimensions(name: str) -> None:
    found = config_of(f"shape:{name}")
    assert (
        found.layers,
        found.heads,
        found.kv_heads,
        found.head_dim,
        found.hidden,
        found.vocab,
        found.parameters,
    ) == PUBLISHED[name]


def test_every_shape_but_tiny_is_checked() -> None:
    assert set(PUBLISHED) == set(SHAPES) - {"tiny"}
    assert known() == ["embedded", *(f"shape:{name}" for name in SHAPES)]


def test_tiny_is_as_described(tiny: LoadedModel) -> None:
    found = config_of("shape:tiny")
    assert found == Dimensions("llama", 4, 4, 2, 16, 64, 256, 4096, sum(p.numel() for p in tiny.model.parameters()))
    assert (tiny.layers, tiny.kv_heads, tiny.head_dim, tiny.context) == (4, 2, 16, 4096)
    assert tiny.tokenizer is None
    assert not tiny.has_sense
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in tiny.model.buffers())
    assert found.parameters * 4 < tiny.weights_bytes <= found.parameters * 4 + buffers
    assert not tiny.model.training
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert tiny.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shape_is_seeded_and_finite_in_every_dtype(dtype: str) -> None:
    first, second = load("shape:tiny", dtype, "cpu"), load("shape:tiny", dtype, "cpu")
    tokens = torch.arange(64)[None]
    logits = first.model(tokens).logits
    assert first.dtype == getattr(torch, dtype)
    assert torch.equal(logits, second.model(tokens).logits)
    assert logits.isfinite().all()
    assert 0.5 < logits.float().std() < 2
    assert first.digest == second.digest


def test_falcon_shape_ties_and_fills_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SHAPES["falcon-7b"] | {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    monkeypatch.setitem(SHAPES, "falcon-7b", small)
    found = load("shape:falcon-7b", "float32", "cpu")
    assert found.kv_heads == 1
    assert found.model.lm_head.weight.data_ptr() == found.model.transformer.word_embeddings.weight.data_ptr()
    norm = found.model.transformer.h[0].input_layernorm
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
    assert found.model(torch.arange(32)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "unknown model"),
        ("gpt5", "unknown model 'gpt5'"),
        ("org/na me", "unknown model"),
        ("shape:llama-9", "unknown shape 'llama-9'; use shape: with one of llama-3-8b"),
        ("embedded:x", "use embedded"),
        ("nowhere:x", "unknown model source 'nowhere'"),
        ("./no/such/folder", "no model folder"),
        ("nothing.gguf", "can't read nothing.gguf: No such file"),
        ("org/not-cached", "can't fetch org/not-cached: HF_HUB_OFFLINE is set"),
        ("a--b/c..d", "that is no hub id"),
    ],
)
def test_wrong_names_are_one_line(name: str, says: str) -> None:
    for ask in (check, config_of, pull, load):
        with pytest.raises(ModelError) as caught:
            ask(name)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("dtype", "device", "says"),
    [
        ("int8", "cpu", "unknown dtype 'int8'; use one of auto, float32"),
        ("float32", "tpu", "unknown device 'tpu'; use auto, cpu"),
        ("float32", "cuda:99", "no device 'cuda:99' here"),
    ],
)
def test_wrong_dtype_and_device(dtype: str, device: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load("shape:tiny", dtype, device)


def test_weights_larger_than_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = replace(config_of("shape:tiny"), parameters=10**15)
    monkeypatch.setattr("d2obench.models.shapes.Shape.describe", lambda self: huge)
    with pytest.raises(OutOfMemory, match=r"shape:tiny don't fit cpu: they take 3725290\.3 GiB"):
        load("shape:tiny", "float32", "cpu")


@pytest.fixture(scope="module")
def saved(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny.model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_folder_gives_the_model_that_was_saved(saved: Path, tiny: LoadedModel) -> None:
    check(str(saved))
    found = load(str(saved), "float32", "cpu")
    tokens = torch.arange(40)[None]
    assert torch.equal(found.model(tokens).logits, tiny.model(tokens).logits)
    assert found.tokenizer is None
    assert found.has_sense
    assert config_of(str(saved)) == config_of("shape:tiny")
    assert pull(str(saved)) == saved
    assert load(str(saved), "bfloat16", "cpu").dtype == torch.bfloat16


def _without_shard(folder: Path) -> None:
    next(folder.glob("*-00002-of-*.safetensors")).unlink()


def _pickled(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _escaping(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))


def _foreign_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "x.py").write_text("raise SystemExit('ran')")


def _unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "made_up"}')


def _cut(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])


def _lacking(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors.pop("model.norm.weight", None)
        save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't load"),
        (_without_shard, "is missing: model.safetensors.index.json names it"),
        (_pickled, r"its .bin files are pickles, .*; save the model again with save_pretrained"),
        (_escaping, "names files outside its folder"),
        (_foreign_code, "can't load .*: it needs code from its repository, which d2obench never runs"),
        (_unknown_type, "can't load .*made_up"),
        (_cut, "can't load"),
        (_lacking, "is incomplete: 1 weights are missing, first model.norm.weight"),
    ],
)
def test_damaged_folder_is_one_line(saved: Path, tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(D2OBenchError, match=says) as caught:
        load(str(folder), "float32", "cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of ``org/tiny`` in an otherwise empty hub cache; the hub itself is off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--org--tiny/snapshots" / commit
    folder.mkdir(parents=True)
    (tmp_path / "models--org--tiny/refs").mkdir()
    (tmp_path / "models--org--tiny/refs/main").write_text(commit)
    return folder


def test_hub_model_from_the_cache(hub_cache: Path, saved: Path, tiny: LoadedModel) -> None:
    shutil.copytree(saved, hub_cache, dirs_exist_ok=True)
    tokens = torch.arange(40)[None]
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{hub_cache.name}"):
        check(name)
        found = load(name, "float32", "cpu")
        assert torch.equal(found.model(tokens).logits, tiny.model(tokens).logits)
        assert found.digest == hub_cache.name
    assert pull("org/tiny") == hub_cache
    with pytest.raises(ModelError, match="can't fetch org/tiny@other: HF_HUB_OFFLINE is set"):
        check("org/tiny@other")


def test_hub_model_without_safetensors(hub_cache: Path, saved: Path) -> None:
    shutil.copy(saved / "config.json", hub_cache)
    (hub_cache / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="org/tiny has no safetensors weights: pickled ones can run code"):
        load("org/tiny", "float32", "cpu")


def test_fingerprint_sees_names_sizes_and_edges(tmp_path: Path) -> None:
    path = tmp_path / "a"
    seen = set()
    for content in (
        b"x" * 10,
        b"x" * 11,
        b"y" * 11,
        b"z" * (3 << 20),
        b"z" * (3 << 20) + b"z",
        b"z" * (3 << 20) + b"y",
    ):
        path.write_bytes(content)
        seen.add(fingerprint([path]))
    assert len(seen) == 6
    seen.add(fingerprint([path.rename(tmp_path / "b")]))
    assert len(seen) == 7


@pytest.mark.model
def test_embedded_answers(embedded: LoadedModel) -> None:
    assert config_of("embedded").parameters == sum(p.numel() for p in embedded.model.parameters())
    assert (embedded.layers, embedded.kv_heads, embedded.head_dim, embedded.context) == (30, 3, 64, 8192)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = embedded.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = embedded.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in embedded.tokenizer.decode(answer)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_described_as_transformers_counts_it(name: str) -> None:
    """The arithmetic of ``describe`` against a model that transformers builds on the meta device."""
    assert Shape(name).describe() == dimensions_of(Shape(name)._config())
