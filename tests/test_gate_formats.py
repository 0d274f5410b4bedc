"""Every format of the verdicts: golden text, the size limits of where they go, and hostile names."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest

from d2obench.errors import UsageError
from d2obench.gate.verdict import Row, Verdict, Verdicts, gather
from d2obench.report.verdicts import FORMATS, render
from d2obench.report.verdicts_markdown import COMMENT_BYTES, SUMMARY_BYTES, comment, markdown
from d2obench.report.verdicts_text import text

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

MARKDOWN = """### ❌ gate ci: REGRESSED

`abc123` → `work tree`: 3 REGRESSED, 1 INCONCLUSIVE, 2 OK

- a note

```console
d2obench baseline update --suite ci --reason "…"
```

| verdict | cell | metric | base | head | change | why |
|---|---|---|--:|--:|--:|---|
| ❌ REGRESSED | speed/d2o\\@0.2/b2 | kept tokens a layer | 42 in 2 layers | 44 in 2 layers | +4.8 % | 2 of 2 layers changed, first layer 0: 20 → 21 |
| ❌ REGRESSED | speed/d2o\\@0.2/b2 | TPOT | 10.00 ms | 12.00 ms | +20.0 % \\[+15.0, +25.0\\] | confirmed by fresh processes: +19.0 % |
| ❌ REGRESSED | speed/h2o\\@0.2/b2 | status | ok | oom |  | head: out of memory |
| ❔ INCONCLUSIVE | speed/full/b2 | TPOT | 10.00 ms | 10.50 ms | +5.0 % \\[-1.0, +8.0\\] | the interval reaches over the limit of 5% after 32 rounds |

<details><summary>2 OK</summary>

| verdict | cell | metric | base | head | change | why |
|---|---|---|--:|--:|--:|---|
| ✔️ OK | fidelity/d2o\\@0.2 | KL to full | 0.1000 nats/token | 0.1010 nats/token | +0.00100 nats/token \\[-0.00100, +0.00300\\] | 8 items changed |
| ✔️ OK | speed/full/b2 | KV | 1.00 MiB | 1.00 MiB | +0.0 % |  |

</details>
"""  # noqa: E501

GITHUB = """::error title=REGRESSED kept tokens a layer::speed/d2o@0.2/b2; 42 in 2 layers → 44 in 2 layers; +4.8 %25; 2 of 2 layers changed, first layer 0: 20 → 21
::error title=REGRESSED TPOT::speed/d2o@0.2/b2; 10.00 ms → 12.00 ms; +20.0 %25 [+15.0, +25.0]; confirmed by fresh processes: +19.0 %25
::error title=REGRESSED status::speed/h2o@0.2/b2; ok → oom; head: out of memory
::warning title=INCONCLUSIVE TPOT::speed/full/b2; 10.00 ms → 10.50 ms; +5.0 %25 [-1.0, +8.0]; the interval reaches over the limit of 5%25 after 32 rounds
::notice title=d2obench gate REGRESSED::REGRESSED: 3 REGRESSED, 1 INCONCLUSIVE, 2 OK
"""  # noqa: E501


def test_markdown_is_golden():
    assert markdown(FOUND) == MARKDOWN


def test_annotations_are_golden():
    assert render("github", FOUND) == GITHUB


def test_text_shows_what_needs_eyes_and_drops_what_all_cells_share():
    shown = text(FOUND, width=200)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[0] == "gate ci: abc123 → work tree"
    assert lines[2] == (
        "REGRESSED speed/d2o@0.2/b2 kept tokens a layer 42 in 2 layers 44 in 2 layers +4.8 %"
        " 2 of 2 layers changed, first layer 0: 20 → 21"
    )
    assert lines[-3:] == [
        "note: a note",
        'run: d2obench baseline update --suite ci --reason "…"',
        "REGRESSED: 3 REGRESSED, 1 INCONCLUSIVE, 2 OK",
    ]
    assert "KV" not in shown
    assert "KV" in text(FOUND, width=200, every=True)
    assert "\x1b[" not in shown
    assert "\x1b[" in text(FOUND, color=True)


def test_text_drops_the_words_that_all_cells_share():
    rows = [
        Row(f"speed/embedded/float32/{policy}/b2", "kv_bytes", Verdict.REGRESSED, "exact") for policy in ("full", "d2o")
    ]
    shown = text(gather("gate", "a", "b", rows))
    assert "full" in shown
    assert "embedded" not in shown


def test_json_holds_every_row_and_the_exit_code():
    found = json.loads(render("json", FOUND))
    assert (found["verdict"], found["exit_code"], len(found["rows"])) == ("REGRESSED", 1, 6)
    row = next(row for row in found["rows"] if row["metric"] == "tpot_s")
    assert (row["base"], row["head"], row["lo"], row["hi"], row["n"]) == (0.01, 0.012, 0.15, 0.25, 16)


def test_junit_says_failure_error_and_skipped():
    root = ET.fromstring(render("junit", FOUND))
    suite = root.find("testsuite")
    assert suite.attrib == {"name": "gate ci", "tests": "6", "failures": "2", "errors": "1", "skipped": "1"}
    cases = {(case.get("classname"), case.get("name")): case for case in suite.iter("testcase")}
    failure = cases["speed/d2o@0.2/b2", "TPOT"].find("failure")
    assert (
        failure.text == "REGRESSED: 10.00 ms → 12.00 ms +20.0 % [+15.0, +25.0]; confirmed by fresh processes: +19.0 %"
    )
    assert cases["speed/h2o@0.2/b2", "status"].find("error") is not None
    assert cases["speed/full/b2", "TPOT"].find("skipped") is not None
    assert len(cases["speed/full/b2", "KV"]) == 0


def many(n: int) -> Verdicts:
    rows = [Row(f"speed/{'x' * 150}/{i}", "kv_bytes", Verdict.REGRESSED, "exact", i, i + 1, 1.0, reason="é" * 100)
            for i in range(n)]  # fmt: skip
    return gather("gate", "a", "b", [*rows, Row("c", "kv_bytes", Verdict.OK, "exact")])


def test_outputs_stay_within_what_github_takes():
    found = many(5000)
    assert len(markdown(found).encode()) <= SUMMARY_BYTES
    assert len(comment(found).encode()) <= COMMENT_BYTES
    assert "more rows" in comment(found)
    lines = render("github", found).splitlines()
    assert len(lines) == 10
    assert "4991 more" in lines[-1]


HOSTILE = "<script>alert(1)</script>|`*_[x](y)\n::error::boo\x00\x1b[31m%0A@team]]>"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_hostile_names_stay_text(name):
    row = Row(HOSTILE, "tokens_digest", Verdict.REGRESSED, "exact", HOSTILE, HOSTILE, reason=HOSTILE)
    shown = render(name, gather(HOSTILE, HOSTILE, HOSTILE, [row], [HOSTILE]))
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


def test_an_unknown_format_names_the_known():
    with pytest.raises(UsageError, match="text, json, markdown, html, github, junit"):
        render("sarif", FOUND)
