"""What ships: the suites, templates and types in wheel and sdist, every package listed, nothing imported unasked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent


def _shipped() -> set[str]:
    """Every file that must lie in the wheel, by its name there."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "d2obench").rglob("*") if path.is_file()}
    found |= {f"d2obench/suites/{path.name}" for path in (ROOT / "suites").iterdir() if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of a clean copy of the tree, and the wheel made from that sdist."""
    work = tmp_path_factory.mktemp("build")
    tree, out = work / "tree", work / "dist"
    junk = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "d2obench-runs", "reports")
    shutil.copytree(ROOT, tree, ignore=junk)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_wheel_holds_the_whole_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        points = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    info = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert names - info == _shipped()
    assert any(name.endswith(".toml") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in info)
    assert "d2obench = d2obench.cli:main" in points


def test_sdist_holds_the_sources(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix() for name in sdist.getnames()}
    suites = {f"suites/{path.name}" for path in (ROOT / "suites").iterdir() if path.is_file()}
    expected = {name for name in _shipped() if not name.startswith("d2obench/suites/")} | suites
    assert expected | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    there = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "d2obench").rglob("__init__.py")
    }
    assert sorted(listed) == sorted(there | {"d2obench.suites"})


def test_suites_are_found_from_any_folder(tmp_path: Path) -> None:
    code = (
        "from d2obench.suite.definition import shipped, load_suite; "
        "print(*(load_suite(name).name for name in shipped()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(path.stem for path in (ROOT / "suites").glob("*.toml"))


def test_a_run_imports_no_engine_or_library_that_was_not_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from d2obench.run.worker import main; import d2obench.cli, d2obench.run.runner\n"
        "import d2obench.cache, d2obench.models, d2obench.policies\n"
        "d2obench.policies.parse_policy('d2o'); d2obench.policies.parse_choice('full')\n"
        "print(sorted({'ray', 'kvpress', 'xllamacpp', 'optimum', 'accelerate'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
