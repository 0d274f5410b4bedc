"""Development sessions: ``nox`` runs all of them, ``nox -s lint`` one."""

import shutil

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """All tests; the embedded model is fetched on first use."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and types."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--strict", "d2obench")


@nox.session
def layers(session: nox.Session) -> None:
    """Imports go one way; the contracts stand in pyproject.toml."""
    session.install("-e", ".[dev]")
    session.run("lint-imports", "--no-cache")


@nox.session
def docs(session: nox.Session) -> None:
    """The README against the program: commands, links, tree."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/test_docs.py")


@nox.session
def gate(session: nox.Session) -> None:
    """The exact and sampled figures of this tree against the committed baseline, or the commit before."""
    session.install("-e", ".")
    session.run("python", ".ci/gate.py", ".", ".")


@nox.session
def browser(session: nox.Session) -> None:
    """The page in headless Chromium, which must be installed: figures, console, network, sorting, print."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.error("no Chromium is installed")
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/test_report_browser.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Source and wheel distributions, and a look at what they hold."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/test_packaging.py")
    session.run("python", "-m", "build", "--no-isolation")
