"""Statistics of queries: what is measured, the file that holds them, and the policy that uses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.rivals import QUERIES
from safetensors.torch import save_file
from tiny_families import plain_model, prompts, tiny_model

from d2obench.cache import Session, calibration
from d2obench.cli import calibrate, main
from d2obench.errors import PolicyError, UsageError
from d2obench.external import record_of
from d2obench.policies import parse_choice, parse_policy
from d2obench.policies.calibration import read
from d2obench.run.plan import cells
from d2obench.suite.definition import load_suite


def plain_queries(family: str, text: list[int]) -> list[np.ndarray]:
    """Queries of each layer before their rotation, float64 ``[Hq, n, d]``, by hooks on transformers' own model."""
    model, found = plain_model(family), []
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    for layer in model.model.layers:
        module = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        module.register_forward_hook(lambda _, args, out: found.append(out.reshape(len(text), -1, width)))
    with torch.inference_mode():
        model(torch.tensor([text]))
    return [held.transpose(0, 1).double().numpy() for held in found]


@pytest.mark.parametrize("family", ["llama-gqa2", "qwen3"])
def test_the_mean_and_the_sizes_are_those_of_all_queries(family: str) -> None:
    texts, seen = prompts(40, 23), []
    found = calibration.measure(
        tiny_model(family).model, texts, about="two texts", progress=lambda *told: seen.append(told[1:])
    )
    for layer, parts in enumerate(zip(*(plain_queries(family, text) for text in texts), strict=True)):
        queries = np.concatenate(parts, 1)
        half = queries.shape[2] // 2
        pairs = queries[..., :half] + 1j * queries[..., half:]
        shape = (2, 2, -1)
        np.testing.assert_allclose(found.mean[layer], queries.mean(1).reshape(shape), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.size[layer], np.abs(pairs).mean(1).reshape(shape), rtol=1e-4)
    assert found.tokens == 63
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_file_is_what_was_measured_and_has_one_digest(tmp_path: Path) -> None:
    loaded = tiny_model("llama-gqa2")
    found = calibration.measure(loaded.model, prompts(30), about="a.txt", name="llama-gqa2", weights=loaded.digest)
    calibration.write(found, tmp_path / "a.safetensors")
    calibration.write(found, tmp_path / "b.safetensors")
    a, b = (read(str(tmp_path / name)) for name in ("a.safetensors", "b.safetensors"))
    assert a.digest == b.digest == found.digest
    assert torch.equal(a.mean, found.mean) and torch.equal(a.size, found.size)
    assert a.record == {"digest": a.digest, "text": "a.txt", "tokens": 30, "model": "llama-gqa2"}
    choice = parse_choice(f"triattention(stats={tmp_path / 'a.safetensors'})")
    assert record_of(choice, loaded) == {"calibration": a.record}
    own = record_of(parse_choice("triattention"), loaded)["calibration"]
    assert own["text"] == "random tokens" and own["digest"] != a.digest


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    loaded = tiny_model("llama-gqa2")
    file = tmp_path / "a.safetensors"

    def session(**changed: Any) -> None:
        Session(replace(loaded, **changed), f"triattention(stats={file})", "0.4", max_new=2)

    calibration.write(calibration.measure(loaded.model, prompts(30), about="a", name="x", weights="abc"), file)
    with pytest.raises(PolicyError, match="other weights, those of x"):
        session()
    session(digest="")
    with pytest.raises(PolicyError, match=r"of another model, x: they have 2 layers, 2 KV heads.*has 5 layers"):
        session(model=tiny_model("llama-deep").model)
    save_file({"mean": torch.zeros(2, 2)}, file)
    with pytest.raises(PolicyError, match="other content"):
        session()
    file.write_text("no such thing")
    with pytest.raises(PolicyError, match=r"holds no statistics of queries.*d2obench calibrate"):
        session()
    with pytest.raises(PolicyError, match=r"can't read the statistics.*No such file.*d2obench calibrate"):
        parse_policy(f"triattention(stats={tmp_path / 'none'})")
    with pytest.raises(PolicyError, match="interval is 0"):
        parse_policy("triattention(interval=0)")
    with pytest.raises(UsageError, match="can see 1 to 512"):
        calibration.measure(loaded.model, prompts(600), about="a")


def test_it_evicts_at_intervals() -> None:
    session = Session(tiny_model("llama-gqa2"), "triattention(interval=5)", "20", max_new=24)
    session.prefill(prompts(50, 41))
    session.compress()
    held = [session.footprint().held[0][0]]
    for step in range(24):
        session.step(torch.tensor([step + 2, step + 3]))
        held.append(session.footprint().held[0][0])
    assert held[0] == min(held) == 20 and max(held) <= 25


def test_a_protected_prompt_stays_and_generated_tokens_compete() -> None:
    session = Session(tiny_model("llama-gqa2"), "triattention(interval=4,protect=prompt)", "6", max_new=30)
    session.prefill(prompts(20, 13))
    session.compress()
    for step in range(30):
        session.step(torch.tensor([step + 2, step + 3]))
    where = session.cache.state.where()
    for row, length in ((0, 20), (1, 20), (2, 13), (3, 13)):
        for positions in where[:, row].tolist():
            held = sorted(j for j in positions if j >= 0)
            assert held[:length] == list(range(length))
            assert len(held) - length <= 10
            assert held != list(range(length)) + list(range(length + 30 - len(held) + length, length + 30))


def test_a_cell_depends_on_the_content_of_the_file(tmp_path: Path) -> None:
    file, hashes = tmp_path / "a.safetensors", []
    for seed in (0, 0, 1):
        calibration.write(calibration.measure(tiny_model("llama-gqa2").model, prompts(9, seed=seed), about="a"), file)
        given = {"axes.policy": f"triattention(stats={file})", "axes.task": "speed", "axes.budget": "0.2"}
        hashes.append(cells(load_suite("quick", given))[0].hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_texts_are_cut_to_the_context() -> None:
    parts = calibrate.split([list(range(10)), list(range(7))], 100, 4)
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9], [0, 1, 2], [3, 4, 5, 6]]
    assert calibrate.split([[1, 2, 3], [4, 5]], 4, 8) == [[1, 2, 3], [4]]
    assert calibrate.split([[1, 2, 3], [4, 5]], 3, 8) == [[1, 2, 3]]


def test_the_command_writes_a_file_that_the_policy_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder_model: Path
) -> None:
    text, out = tmp_path / "numbers.txt", tmp_path / "made.safetensors"
    text.write_text(" ".join(str(2 + i * i % 120) for i in range(700)))
    with pytest.raises(SystemExit) as done:
        main(["calibrate", str(folder_model), "--data", str(text), "--out", str(out), "--tokens", "600"])
    said = capsys.readouterr().out
    assert not done.value.code and f"triattention(stats={out})" in said
    found = read(str(out))
    assert found.digest in said and found.text == "numbers.txt" and found.tokens == 600
    for words, message in {
        ("--data", str(tmp_path / "none.txt")): "none.txt",
        ("--out", str(tmp_path / "numbers.txt" / "a")): "can't write",
    }.items():
        with pytest.raises(SystemExit) as done:
            main(["calibrate", str(folder_model), *words])
        assert done.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["calibrate", "shape:tiny"])
    assert done.value.code == 2 and "has no tokenizer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that reads numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_model("llama-gqa2").model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(path)
    return path


def test_generated_texts_are_measured_once_for_all_processes(
    tmp_path: Path, folder_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2obench.models import load

    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path))
    measured: list[Any] = []
    measure = calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda *given, **more: (measured.append(1), measure(*given, **more))[1])
    found = []
    for _ in range(2):  # each model stands for that of another process
        loaded = load(str(folder_model), "float32", "cpu")
        found += [record_of(parse_choice("triattention"), loaded)["calibration"] for _ in range(2)]
    assert len(measured) == 1 and len({one["digest"] for one in found}) == 1
    (file,) = (tmp_path / "calibrations").iterdir()
    assert found[0] == {"digest": read(str(file)).digest, "text": "generated", "tokens": 4096, "model": loaded.name}
    file.write_bytes(b"damaged")
    record = record_of(parse_choice("triattention"), load(str(folder_model), "float32", "cpu"))["calibration"]
    assert len(measured) == 2 and record["digest"] == found[0]["digest"]


def test_the_golden_file_is_read() -> None:
    assert read(str(QUERIES)).mean.shape == (2, 2, 2, 16)
