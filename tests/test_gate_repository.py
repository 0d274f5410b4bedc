"""A gate in a repository that is not d2obench's own: a policy as a package, built and measured for real."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from repository import TEMPLATE, Plugin

from d2obench.errors import D2OBenchError, RecordError, SuiteError, WorkerError
from d2obench.gate import environments
from d2obench.gate.environments import _requirements, _satisfied, mode_of, places, visible
from d2obench.gate.gate import Side, gate
from d2obench.gate.verdict import KINDS, Verdict, Verdicts
from d2obench.gate.worktree import Repository, work_tree
from d2obench.policies import REGISTRY
from d2obench.study.repository import judge, read_changes

SPEED = {"axes.task": "speed", "axes.model": "shape:tiny", "gate.metrics": "[]"}
CHANGES = read_changes(TEMPLATE)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds use the setuptools that is installed, and whatever is left behind would lie in ``tmp_path``."""
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads this as: no isolation
    monkeypatch.setenv("UV_NO_BUILD_ISOLATION", "1")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path / "plugin")


def run(plugin: Plugin, overrides: dict[str, str], kinds: tuple[str, ...] = KINDS) -> Verdicts | D2OBenchError:
    try:
        return gate("gate.toml", overrides, Side("HEAD"), Side(None), folder=plugin.root, watch=str, kinds=kinds)
    except D2OBenchError as problem:
        return problem


def left(plugin: Plugin, tmp_path: Path, change: str) -> list[str]:
    """What remains beside the files of the change: worktrees, build products, temporary files."""
    asked = {path.name for path in (TEMPLATE / "changes" / change).iterdir()}
    lines = [line for line in plugin.leftovers if line.split()[-1] not in asked]
    return [*lines, *map(str, (tmp_path / "scratch").glob("d2obench-*"))]


def test_one_more_slot_a_layer_is_caught_in_the_wheels_of_both_sides(plugin, tmp_path):
    plugin.change("extra-slot")
    found = run(plugin, SPEED, ("exact",))
    assert isinstance(found, Verdicts), found
    row = next(row for row in found.of(Verdict.REGRESSED) if row.metric == "kept_layers")
    added = [after - before for before, after in zip(row.base, row.head, strict=True)]
    assert added == [2.0] * 4  # in each of four layers, one for each of two sequences
    assert judge(CHANGES["extra-slot"], found) == "right"
    assert found.about["commit"].endswith("+dirty")
    assert (found.about["suite"], found.about["machine"][:4]) == ("gate", "cpu-")
    assert left(plugin, tmp_path, "extra-slot") == []


def test_a_head_that_does_not_build_says_so_with_its_log(plugin, tmp_path, capfd):
    plugin.change("broken")
    found = run(plugin, SPEED, ("exact",))
    assert isinstance(found, WorkerError) and found.exit_code == 2
    assert str(found).startswith("the head does not build")
    assert "no_such_backend" in capfd.readouterr().err
    assert judge(CHANGES["broken"], found) == "right"
    assert left(plugin, tmp_path, "broken") == []


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "model", "task"),
    [
        ("clean", "shape:tiny", "speed"),
        ("slower", "shape:tiny", "speed"),
        ("worse-kl", "embedded", "fidelity(documents=8)"),
    ],
)
def test_the_other_changes_get_the_right_verdict_or_none(plugin, tmp_path, name, model, task):
    """The gate of the template's suite, of which only the part that the change concerns is run."""
    plugin.change(name)
    found = run(plugin, {"axes.model": model, "axes.task": task, "gate.budget": "{}"})
    assert judge(CHANGES[name], found) in ("right", "undecided"), found
    assert left(plugin, tmp_path, name) == []


def test_the_work_tree_is_gated_with_its_uncommitted_files_and_nothing_else(plugin):
    (plugin.root / "strided.py").write_text("changed")
    (plugin.root / "new.py").write_text("new")
    (plugin.root / "gate.toml").unlink()
    (plugin.root / ".gitignore").write_text("secret\n")
    (plugin.root / "secret").write_text("ignored")
    (plugin.root / "venv/lib").mkdir(parents=True)
    (plugin.root / "venv/pyvenv.cfg").write_text("")
    (plugin.root / "venv/lib/large.py").write_text("")
    with work_tree(Repository(plugin.root)) as copy:
        files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
        assert files - {".git"} == {"strided.py", "new.py", "pyproject.toml", ".gitignore"}
        assert (copy / "strided.py").read_text() == "changed"
    assert not copy.exists()


def test_the_base_may_lack_the_suite_and_the_head_may_not(plugin):
    plugin.git("rm", "-q", "gate.toml")
    bare = plugin.commit()
    with pytest.raises(SuiteError, match="gate init"):
        gate("gate.toml", {}, Side(bare), Side(None), folder=plugin.root, watch=str)
    from d2obench.gate.gate import suites_in

    (plugin.root / "gate.toml").write_text((TEMPLATE / "repository/gate.toml").read_text())
    (plugin.root.parent / "base").mkdir()
    suites, notes = suites_in({"base": plugin.root.parent / "base", "head": plugin.root}, "gate.toml", {}, own=False)
    assert suites["base"] == suites["head"]
    assert "the base has no gate.toml" in notes[0]


def test_a_shallow_clone_says_what_to_fetch(plugin, tmp_path):
    first = plugin.git("rev-parse", "HEAD")
    plugin.commit()
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{plugin.root}", str(tmp_path / "clone")], check=True)
    clone = Repository(tmp_path / "clone")
    with pytest.raises(D2OBenchError, match=r"shallow.*fetch-depth: 0"):
        clone.commit(first)
    clone.git("checkout", "-q", "--detach")  # a detached head that knows its trunk is as good as a branch
    assert clone.merge_base() == clone.commit("HEAD")
    clone.git("remote", "remove", "origin")
    clone.git("branch", "-D", "main")
    with pytest.raises(D2OBenchError, match=r"shallow.*fetch-depth: 0"):
        clone.merge_base()


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(plugin, tmp_path, monkeypatch):
    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    found = run(plugin, SPEED)
    assert isinstance(found, RecordError)
    assert "No space left on device" in str(found)
    assert left(plugin, tmp_path, "clean") == []


def test_what_a_side_needs_is_read_from_its_wheel_and_its_list(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    (site / "a-1.dist-info").mkdir(parents=True)
    (site / "a-1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: a\nVersion: 1\nRequires-Dist: d2obench>=0.1\nRequires-Dist: numpy>=1\n"
        'Requires-Dist: nowhere; sys_platform == "other"\nRequires-Dist: extra-one; extra == "x"\n'
    )
    source.mkdir()
    (source / "requirements.txt").write_text("# pinned\nmsgspec==0.0.1  # old\n\nnumpy>=1\n")
    assert _requirements(source, site, "shared", "head") == ["numpy>=1", "msgspec==0.0.1"]
    assert _satisfied("numpy>=1") and _satisfied(f"msgspec=={version('msgspec')}")
    assert not _satisfied("msgspec==0.0.1") and not _satisfied("no-such-package-here")
    assert not _satisfied("--index-url https://example.org") and not _satisfied("numpy @ file:///x")


@pytest.mark.slow
def test_a_pinned_dependency_gets_a_layer_of_its_own_that_is_made_once(tmp_path, monkeypatch):
    """A package that is installed here in version 1 and wanted in version 2 by one side: a local wheel, no network."""
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    library = tmp_path / "library"
    library.mkdir()
    (library / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "pinned-library"\nversion = "2"\n[tool.setuptools]\npy-modules = ["pinned_library"]\n'
    )
    (library / "pinned_library.py").write_text("VERSION = 2\n")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(library)]
    subprocess.run(pip, check=True, capture_output=True)
    for name, text in (("base", ""), ("head", "pinned-library==2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "requirements.txt").write_text(text)
    roots = {name: tmp_path / name for name in ("base", "head")}
    pythons = dict.fromkeys(roots, sys.executable)
    said: list[str] = []
    for _ in range(2):
        with places(roots, pythons, "shared", said.append) as found:
            assert found["base"].python == sys.executable
            code = "import pinned_library, msgspec, d2obench.errors as e; print(pinned_library.VERSION, e.__file__)"
            paths = os.pathsep.join(map(str, found["head"].paths))
            env = {**os.environ, "PYTHONPATH": paths}
            out = subprocess.run([found["head"].python, "-P", "-c", code], env=env, capture_output=True, text=True)
            assert out.stdout.split()[0] == "2", out.stderr
            assert Path(out.stdout.split()[1]).resolve().is_relative_to(found["head"].code)
    assert said.count("installing 1 requirements of the head") == 1
    assert not list((tmp_path / "scratch").iterdir())


def test_an_environment_of_ones_own_is_made_by_uv_from_the_lock_file(tmp_path, monkeypatch):
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environments.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(environments, "requires", lambda name: ["torch>=2", "pytest; extra == 'test'"])
    asked: list[list[str]] = []

    def scripted(command: list[str], problem: str, cwd: Path | None = None) -> str:
        asked.append([*command])
        if command[1:3] == ["-m", "venv"]:
            Path(command[-1]).mkdir(parents=True)
        return "# made by uv\npinned==2\n    # via plugin\nd2obench==0.1\n"

    monkeypatch.setattr(environments, "_run", scripted)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "uv.lock").write_text("")
    with places({"head": tmp_path}, {"head": sys.executable}, "own", str) as found:
        python = Path(found["head"].python)
    wheel, export, venv, install = asked
    assert wheel[:4] == ["/bin/uv", "pip", "install", "--python"] and wheel[-1] == str(tmp_path)
    assert {"--no-deps", "--target"} <= set(wheel)
    assert export[:3] == ["uv", "export", "--frozen"]
    assert venv[-1] == str(python.parents[1])
    assert install[3:5] == ["--python", str(python)]
    assert (python.parents[1] / "requirements.txt").read_text() == "pinned==2\ntorch>=2\n"
    assert not (python.parents[1] / "below.pth").exists()
    with places({"head": tmp_path}, {"head": sys.executable}, "own", str) as again:
        assert again["head"].python == str(python)
    assert len(asked) == 6  # the wheel and the lock file once more, the environment not


def test_an_environment_that_can_not_be_made_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    (tmp_path / "requirements.txt").write_text("no-such-package-here==1\n")
    with (
        pytest.raises(WorkerError, match="the requirements of the head can't be installed: ERROR"),
        places({"head": tmp_path}, {"head": sys.executable}, "shared", str),
    ):
        pass
    assert [path.suffix for path in (tmp_path / "cache/environments/gate").iterdir()] == [".lock"]
    assert not list((tmp_path / "scratch").iterdir())


def test_plug_ins_of_the_head_are_seen_for_as_long_as_it_is_gated(tmp_path):
    (tmp_path / "p-1.dist-info").mkdir()
    (tmp_path / "p-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: p\nVersion: 1\n")
    (tmp_path / "p-1.dist-info/entry_points.txt").write_text("[d2obench.policies]\nseen = seen_policy:Seen\n")
    (tmp_path / "seen_policy.py").write_text("class Seen: pass\n")
    with visible([tmp_path]):
        assert REGISTRY.get("seen").__name__ == "Seen"
        assert "seen_policy" in sys.modules
    assert "seen" not in REGISTRY.names()
    assert "seen_policy" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_what_is_imported_depends_on_whose_repository_it_is(tmp_path):
    assert mode_of("auto", Path(__file__).parents[1]) == "none"
    assert mode_of("auto", tmp_path) == "shared"
    assert mode_of("own", tmp_path) == "own"
