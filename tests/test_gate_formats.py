"""Every format of the verdicts: golden text, the size limits of where they go, and hostile names."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from d2obench.cli.gate import FORMATS, check
from d2obench.errors import UsageError
from d2obench.gate.verdict import Row, Verdict, Verdicts, gather
from d2obench.report.render import render
from d2obench.report.render.console import show_verdicts
from d2obench.report.render.markdown import COMMENT_BYTES, SUMMARY_BYTES, markdown, summary, workflow_commands
from d2obench.report.verdicts import as_json, view

ROWS = [
    Row("speed/d2o@0.2/b2", "tpot_s", Verdict.REGRESSED, "timed", 0.010, 0.012, 0.2, 0.15, 0.25, 0.05, 16,
        "confirmed by fresh processes: +19.0 %"),
    Row("speed/d2o@0.2/b2", "kept_layers", Verdict.REGRESSED, "exact", (20.0, 22.0), (21.0, 23.0), 0.0476,
        reason="2 of 2 layers changed, first layer 0: 20 → 21"),
    Row("speed/full/b2", "tpot_s", Verdict.INCONCLUSIVE, "timed", 0.010, 0.0105, 0.05, -0.01, 0.08, 0.05, 32,
        "the interval reaches over the limit of 5% after 32 rounds"),
    Row("fidelity/d2o@0.2", "kl", Verdict.OK, "sampled", 0.1, 0.101, 0.001, -0.001, 0.003, 0.02, 8, "8 items changed"),
    Row("speed/full/b2", "kv_bytes", Verdict.OK, "exact", 2**20, 2**20, 0.0),
    Row("speed/h2o@0.2/b2", "status", Verdict.REGRESSED, "exact", "ok", "oom", reason="head: out of memory"),
]  # fmt: skip
FOUND = gather("gate ci", "abc123", "work tree", ROWS, ["a note"], ['d2obench baseline update --suite ci --reason "…"'])

GITHUB = """::error title=REGRESSED kept tokens a layer::speed/d2o@0.2/b2; 42 in 2 layers → 44 in 2 layers +4.8 %25; 2 of 2 layers changed, first layer 0: 20 → 21
::error title=REGRESSED TPOT::speed/d2o@0.2/b2; 10.00 ms → 12.00 ms +20.0 %25 [+15.0, +25.0]; confirmed by fresh processes: +19.0 %25
::error title=REGRESSED status::speed/h2o@0.2/b2; ok → oom; head: out of memory
::warning title=INCONCLUSIVE TPOT::speed/full/b2; 10.00 ms → 10.50 ms +5.0 %25 [-1.0, +8.0]; the interval reaches over the limit of 5%25 after 32 rounds
::notice title=d2obench gate ci%3A REGRESSED::REGRESSED: 3 REGRESSED, 1 INCONCLUSIVE, 2 OK
"""  # noqa: E501


def shown_by(verdicts: Verdicts, name: str) -> str:
    """Verdicts in one of the command's formats."""
    page = view(verdicts)
    if name == "json":
        return as_json(verdicts)
    if name == "text":
        return text(verdicts)
    if name == "github":
        return workflow_commands(page)
    return "".join(words for _, words in render(FORMATS[name], page, {}))


def text(verdicts: Verdicts, width: int = 140, every: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show_verdicts(view(verdicts), console, every=every)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_markdown_holds_every_row_worst_first() -> None:
    shown = shown_by(FOUND, "markdown")
    lines = shown.splitlines()
    assert lines[0] == "# gate ci: REGRESSED"
    assert lines[2] == "abc123 → work tree"
    assert "- REGRESSED: 3 REGRESSED, 1 INCONCLUSIVE, 2 OK" in lines
    assert "> **Note.** a note" in lines
    assert 'd2obench baseline update --suite ci --reason "…"' in lines
    rows = [line for line in lines if line.startswith("| ") and ("/b2" in line or "fidelity" in line)]
    assert [row.split(" | ")[0] for row in rows] == [*["| ❌ REGRESSED"] * 3, "| ❔ INCONCLUSIVE", *["| ✔️ OK"] * 2]
    assert rows[1] == (
        "| ❌ REGRESSED | speed/d2o@0.2/b2 | TPOT | 10.00 ms | 12.00 ms | +20.0 % [+15.0, +25.0]"
        " | confirmed by fresh processes: +19.0 % |"
    )
    assert "+0.00100 nats/token" in rows[4]


def test_annotations_are_golden() -> None:
    assert shown_by(FOUND, "github") == GITHUB


def test_text_shows_what_needs_a_look() -> None:
    shown = text(FOUND, width=200)
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert lines[0] == "gate ci: REGRESSED; abc123 → work tree"
    assert (
        "REGRESSED speed/d2o@0.2/b2 kept tokens a layer 42 in 2 layers 44 in 2 layers +4.8 %"
        " 2 of 2 layers changed, first layer 0: 20 → 21"
    ) in lines
    assert lines[-3:] == [
        "note: a note",
        'run: d2obench baseline update --suite ci --reason "…"',
        "REGRESSED: 3 REGRESSED, 1 INCONCLUSIVE, 2 OK",
    ]
    assert "KV" not in shown
    assert "KV" in text(FOUND, width=200, every=True)


def test_text_drops_the_words_that_all_cells_share() -> None:
    rows = [
        Row(f"speed/embedded/float32/{policy}/b2", "kv_bytes", Verdict.REGRESSED, "exact") for policy in ("full", "d2o")
    ]
    shown = text(gather("gate", "a", "b", rows))
    assert "full" in shown
    assert "embedded" not in shown


def test_json_holds_every_row_and_the_exit_code() -> None:
    found = json.loads(as_json(FOUND))
    assert (found["verdict"], found["exit_code"], len(found["rows"])) == ("REGRESSED", 1, 6)
    row = next(row for row in found["rows"] if row["metric"] == "tpot_s")
    assert (row["base"], row["head"], row["lo"], row["hi"], row["n"]) == (0.01, 0.012, 0.15, 0.25, 16)


def test_junit_says_failure_error_and_skipped() -> None:
    root = ET.fromstring(shown_by(FOUND, "junit"))
    suites = {str(suite.get("name")): suite.attrib for suite in root.iter("testsuite")}
    counted = {key: sum(int(found[key]) for found in suites.values()) for key in ("tests", "failures", "errors")}
    assert counted == {"tests": 6, "failures": 2, "errors": 1}
    assert suites["gate ci: speed/full/b2"]["skipped"] == "1"
    cases = {(case.get("classname"), case.get("name")): case for case in root.iter("testcase")}
    failure = cases["speed/d2o@0.2/b2", "TPOT"].find("failure")
    assert failure is not None
    assert (
        failure.text == "REGRESSED: 10.00 ms → 12.00 ms +20.0 % [+15.0, +25.0]; confirmed by fresh processes: +19.0 %"
    )
    assert cases["speed/h2o@0.2/b2", "status"].find("error") is not None
    assert cases["speed/full/b2", "TPOT"].find("skipped") is not None
    assert len(cases["speed/full/b2", "KV"]) == 0
    assert "a note" in "".join(root.itertext())


def many(n: int) -> Verdicts:
    rows = [Row(f"speed/{'x' * 150}/{i}", "kv_bytes", Verdict.REGRESSED, "exact", i, i + 1, 1.0, reason="é" * 100)
            for i in range(n)]  # fmt: skip
    return gather("gate", "a", "b", [*rows, Row("c", "kv_bytes", Verdict.OK, "exact")])


def test_outputs_stay_within_what_github_takes() -> None:
    found = many(5000)
    page = view(found)
    assert len(summary(page).encode()) <= SUMMARY_BYTES
    comment = markdown(page, limit=COMMENT_BYTES)
    assert len(comment.encode()) <= COMMENT_BYTES
    assert "more rows" in comment
    assert comment.count("| ❌ REGRESSED |") > 10
    lines = workflow_commands(page).splitlines()
    assert len(lines) == 10
    assert "4991 more" in lines[-1]


HOSTILE = "<script>alert(1)</script>|`*_[x](y)\n::error::boo\x00\x1b[31m%0A@team]]>"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_hostile_names_stay_text(name: str) -> None:
    row = Row(HOSTILE, "tokens_digest", Verdict.REGRESSED, "exact", HOSTILE, HOSTILE, reason=HOSTILE)
    shown = shown_by(gather(HOSTILE, HOSTILE, HOSTILE, [row], [HOSTILE]), name)
    assert "\x00" not in shown
    assert "\x1b" not in shown
    if name == "markdown":
        assert "<script>" not in shown
        table = [line for line in shown.splitlines() if line.startswith("| ❌")]
        assert len(table) == 1
        assert len(table[0].replace("\\|", "").split("|")) == 9
    if name == "github":
        assert all(line.startswith("::") for line in shown.splitlines())
        assert len(shown.splitlines()) == 2
    if name == "junit":
        ET.fromstring(shown)


def test_an_unknown_format_names_the_known() -> None:
    with pytest.raises(UsageError, match="text, json, markdown, html, github, junit"):
        check(["sarif"])
