"""Committed baselines: written on purpose, judged by kind, and INCOMPARABLE with the keys when the ground moved."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from d2obench.cli import app
from d2obench.errors import RecordError, UsageError
from d2obench.gate.baseline import baseline_of, device_class, judge_run, read_baseline, write_baseline
from d2obench.gate.compare import compare_runs, facts_of_run
from d2obench.gate.verdict import Row, Verdict, Verdicts
from d2obench.record import Axes, CellRecord, RunInfo, Value, append_cell, dump, read_run, write_atomic
from d2obench.suite.definition import load_suite

ENVIRONMENT = {
    "machine": "x86_64", "cpu": "AMD EPYC", "threads": 2, "torch": "2.13", "transformers": "5.23", "device": "cpu",
    "commit": "abcdef0123456789", "dirty": False,
}  # fmt: skip


@dataclass
class Story:
    """A run to be written: two speed cells and a quality cell, whose figures a test can bend."""

    kept: float = 20.0
    kv: int = 4096
    ops: int = 100
    rss: float = 5e8
    speedup: tuple[float, float, float] = (1.5, 1.45, 1.55)
    kl: float = 0.1
    digest: str = "ab"
    tpot: float = 0.010
    status: str = "ok"
    environment: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        suite = load_suite("ci", self.overrides)
        streaming = Axes("speed", "embedded", "float32", "cpu", "streaming", "0.2", "128+16", 2, 0)
        d2o = msgspec.structs.replace(streaming, policy="d2o")
        quality = msgspec.structs.replace(d2o, task="fidelity", batch=None)
        names = ["speed/streaming", "speed/d2o", "fidelity/d2o"]
        settings = msgspec.to_builtins(suite)
        info = RunInfo("ci", settings, suite.digest, tuple(names), {**ENVIRONMENT, **self.environment},
                       "0" * 16, (), "0.1.0", "2030-01-01T00:00:00+00:00")  # fmt: skip
        write_atomic(folder / "run.json", dump(info))
        values = {
            "kv_bytes": Value(self.kv), "ops_step": Value(self.ops), "rss_peak_bytes": Value(self.rss),
            "speedup": Value(*self.speedup, n=5), "tpot_s": Value(self.tpot, self.tpot * 0.99, self.tpot * 1.01, 5),
        }  # fmt: skip
        one = {"kv_bytes": self.kv, "kept": [[self.kept] * 2] * 3, "tokens_digest": self.digest, "decode_s": 0.1}
        rounds = [{**one, "round": i} for i in range(3)]
        items = [{"id": str(i), "document": str(i), "kl": [self.kl + i / 1000, self.kl]} for i in range(8)]
        self._cell(folder, names[0], streaming, "ok", values, {"rounds": rounds})
        self._cell(folder, names[1], d2o, self.status, values, {"rounds": rounds})
        self._cell(folder, names[2], quality, "ok", {"kl": Value(self.kl)}, {"items": items})
        return folder

    def _cell(self, folder: Path, name: str, axes: Axes, status: str, values: Any, samples: Any) -> None:
        path = f"samples/{name.replace('/', '-')}.json"
        write_atomic(folder / path, dump(samples))
        ok = status == "ok"
        append_cell(
            folder, CellRecord(name, name, axes, status, values=values if ok else {}, samples=path if ok else None)
        )


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    run = read_run(Story().write(tmp_path / "base"))
    path = tmp_path / "baseline.json"
    write_baseline(path, baseline_of(run.info, facts_of_run(run), "first"))
    return path


def judge(story: Story, stored: Path, tmp_path: Path) -> Verdicts:
    run = read_run(story.write(tmp_path / "head"))
    return judge_run(run.info, facts_of_run(run), read_baseline(stored), "baseline.json", {})


def find(verdicts: Verdicts, metric: str, cell: str = "speed/d2o") -> Row:
    return next(row for row in verdicts.rows if (row.metric, row.cell) == (metric, cell))


def test_the_same_run_is_ok_and_every_kind_was_compared(stored, tmp_path):
    found = judge(Story(), stored, tmp_path)
    assert set(found.counts) == {Verdict.OK}
    assert {row.kind for row in found.rows} == {"exact", "bounded", "ratio", "sampled"}
    assert find(found, "to_streaming").base == 1.0
    assert found.commands == ()


@pytest.mark.parametrize(
    ("story", "metric", "cell"),
    [
        (Story(kept=21.0), "kept_layers", "speed/d2o"),
        (Story(kv=4160), "kv_bytes", "speed/d2o"),
        (Story(ops=101), "ops_step", "speed/d2o"),
        (Story(digest="cd"), "tokens_digest", "speed/d2o"),
        (Story(rss=6e8), "rss_peak_bytes", "speed/d2o"),
        (Story(speedup=(1.2, 1.1, 1.3)), "speedup", "speed/d2o"),
        (Story(kl=0.2), "kl", "fidelity/d2o"),
        (Story(status="oom"), "status", "speed/d2o"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_is_caught_by_name(story, metric, cell, stored, tmp_path):
    found = judge(story, stored, tmp_path)
    assert find(found, metric, cell).verdict is Verdict.REGRESSED
    assert {row.metric for row in found.of(Verdict.REGRESSED)} == {metric}
    assert found.exit_code() == 1


def test_a_slower_run_is_not_judged_by_a_stored_time(stored, tmp_path):
    assert judge(Story(tpot=0.02), stored, tmp_path).exit_code() == 0


def test_a_better_run_prints_the_command_that_tightens(stored, tmp_path):
    found = judge(Story(kv=4000), stored, tmp_path)
    assert find(found, "kv_bytes").verdict is Verdict.IMPROVED
    assert found.exit_code() == 0
    assert found.commands == ('d2obench baseline update --suite ci --reason "…"',)


@pytest.mark.parametrize(
    ("story", "words"),
    [
        (Story(overrides={"axes.shape": "256+16"}), 'axes.shape: ["128+32"] → ["256+16"]'),
        (Story(overrides={"axes.model": "shape:tiny"}), "axes.model"),
        (Story(overrides={"axes.dtype": "bfloat16"}), "axes.dtype"),
        (Story(environment={"torch": "2.14"}), 'torch: "2.13" → "2.14"'),
        (Story(environment={"gpu": "NVIDIA H200", "device": "cuda"}), "device class"),
    ],
    ids=["shape", "model", "dtype", "torch", "device"],
)
def test_unlike_runs_are_incomparable_and_name_the_keys(story, words, stored, tmp_path):
    found = judge(story, stored, tmp_path)
    assert found.exit_code() == 2
    assert all(row.verdict is Verdict.INCOMPARABLE for row in found.rows)
    assert words in " ".join(row.reason for row in found.rows)


def test_settings_and_builds_that_mean_the_same_are_compared(stored, tmp_path):
    """A setting that a later version knows, at its default, and torch's build for another accelerator on a CPU."""
    table = json.loads(stored.read_text())
    del table["settings"]["timing"]["warm_within"]
    stored.write_text(json.dumps(table))
    assert judge(Story(environment={"torch": "2.13+cu130"}), stored, tmp_path).exit_code() == 0
    table["settings"]["timing"]["of_a_later_version"] = 1
    stored.write_text(json.dumps(table))
    assert "of_a_later_version" in judge(Story(), stored, tmp_path).rows[0].reason


def test_only_the_kinds_asked_for_are_judged(stored, tmp_path):
    run = read_run(Story(kv=4160, kl=0.2).write(tmp_path / "head"))
    found = judge_run(run.info, facts_of_run(run), read_baseline(stored), "b", {}, ("sampled",))
    assert {row.kind for row in found.rows} == {"sampled"}
    assert {row.metric for row in found.of(Verdict.REGRESSED)} == {"kl"}


def test_another_processor_leaves_out_what_depends_on_it_and_says_so(stored, tmp_path):
    found = judge(Story(environment={"cpu": "Intel"}, digest="cd", speedup=(1.0, 0.9, 1.1)), stored, tmp_path)
    assert found.exit_code() == 0
    assert "not compared" in found.notes[0]
    assert "Intel" in found.notes[0]


def test_a_cell_on_one_side_only_is_incomparable(stored, tmp_path):
    table = json.loads(stored.read_text())
    del table["cells"]["speed/d2o"]
    stored.write_text(json.dumps(table))
    found = judge(Story(), stored, tmp_path)
    assert found.exit_code() == 2
    assert find(found, "status").verdict is Verdict.INCOMPARABLE


def test_a_baseline_is_sorted_indented_and_survives_a_round_trip(stored, tmp_path):
    text = stored.read_text()
    table = json.loads(text)
    assert text == json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert (table["reason"], table["commit"]) == ("first", "abcdef012345")
    assert "tpot_s" not in text
    again = tmp_path / "again.json"
    write_baseline(again, read_baseline(stored))
    assert again.read_bytes() == stored.read_bytes()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"suite": 3}', "[" * 5000])
def test_a_damaged_baseline_is_one_clear_line(text, tmp_path):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="not a baseline"):
        read_baseline(path)
    with pytest.raises(RecordError, match="baseline update"):
        read_baseline(tmp_path / "none.json")


def test_a_bad_run_makes_no_baseline(tmp_path):
    failed = read_run(Story(status="failed").write(tmp_path / "failed"))
    with pytest.raises(UsageError, match="1 cells of the run failed"):
        baseline_of(failed.info, facts_of_run(failed), "why")
    good = read_run(Story().write(tmp_path / "good"))
    with pytest.raises(UsageError, match="reason"):
        baseline_of(good.info, facts_of_run(good), "  ")


def test_device_classes():
    assert device_class({"machine": "x86_64"}) == "cpu-x86_64"
    assert device_class({"machine": "x86_64", "gpu": "NVIDIA H200 / ../x"}) == "nvidia-h200-..-x"


def test_update_then_gate_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    Story().write(tmp_path / "base")
    Story(kv=5000).write(tmp_path / "worse")
    run = CliRunner().invoke
    assert run(app, ["gate", "base"], standalone_mode=True).exit_code != 0  # no baseline yet
    done = run(app, ["baseline", "update", "--run", "base", "--reason", "first"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "reports/baselines/ci/cpu-x86_64.json").exists()
    assert run(app, ["gate", "base"]).exit_code == 0
    worse = run(app, ["gate", "worse", "--format", "text", "--format", "junit", "--output", "out"])
    assert worse.exit_code == 1
    assert "REGRESSED" in worse.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"junit.xml", "comment.md"}
    assert run(app, ["gate", "worse", "--exit-zero"]).exit_code == 0


def test_the_step_summary_is_appended(tmp_path, monkeypatch, stored):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    Story(kv=5000).write(tmp_path / "worse")
    words = ["gate", str(tmp_path / "worse"), "--baseline", str(stored), "--format", "github"]
    done = CliRunner().invoke(app, words)
    assert "::error title=REGRESSED KV::" in done.output
    assert summary.read_text().startswith("before\n# gate ci: REGRESSED")


@pytest.mark.parametrize(
    "words", [[], ["run", "--suite", "ci"], ["run", "--base", "x"], ["--suite", "ci", "--baseline", "x"]]
)
def test_words_that_do_not_go_together(words):
    done = CliRunner().invoke(app, ["gate", *words])
    assert isinstance(done.exception, UsageError)


def test_compare_informs_and_never_fails(tmp_path):
    base, head = Story().write(tmp_path / "a"), Story(kv=5000, tpot=0.02).write(tmp_path / "b")
    found = compare_runs(read_run(base), read_run(head))
    assert find(found, "kv_bytes").verdict is Verdict.REGRESSED
    row = find(found, "tpot_s")
    assert row.verdict is Verdict.NOT_JUDGED
    assert "another time" in row.reason
    done = CliRunner().invoke(app, ["compare", str(base), str(head)])
    assert done.exit_code == 0
    assert "REGRESSED" in done.output


def test_compare_on_another_machine_judges_no_time(tmp_path):
    base, head = Story().write(tmp_path / "a"), Story(environment={"cpu": "Intel"}).write(tmp_path / "b")
    found = compare_runs(read_run(base), read_run(head))
    assert find(found, "tpot_s").verdict is Verdict.NOT_JUDGED
    assert "Intel" in find(found, "tpot_s").reason
    assert find(found, "kv_bytes").verdict is Verdict.OK
    assert "Intel" in found.notes[0]
