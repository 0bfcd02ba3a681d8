"""What is checked, each by its name: ``nox -l`` lists it.

``nox -s NAME`` makes an environment of its own; ``nox --no-venv -s NAME`` takes the one that is
active, with the extras ``dev`` and ``docs`` installed.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import nox
from nox.virtualenv import PassthroughEnv

nox.options.sessions = ["lint", "types", "fast"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent


@nox.session
def fast(session: nox.Session) -> None:
    """The loop while working: tests that are not slow."""
    install(session, "-e", ".[test]")
    session.run("pytest", "-q", "-m", "not slow", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Every test, and which lines they reach."""
    install(session, "-e", ".[test]")
    session.run("pytest", "-q", "--cov", "--cov-report=term:skip-covered", *session.posargs)


@nox.session
def lowest(session: nox.Session) -> None:
    """Every test with the lowest version of every dependency that setup.cfg allows."""
    constraints = Path(session.create_tmp()) / "lowest.txt"
    constraints.write_text("\n".join(lowest_versions()) + "\n")
    install(session, "-c", str(constraints), "-e", ".[test]")
    session.run("pytest", "-q", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint."""
    install(session, "ruff>=0.9")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly, in a checkout: as editors see it."""
    install(session, "-e", ".[dev]")
    session.run("mypy", "-p", "cl_merge")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, without a warning and without the network; the notebook and the generated pages."""
    install(session, "-e", ".[test,docs]")
    session.run("python", "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "docs", "build/docs")
    foreign = re.compile(r'(?:src|href)="https?://[^"]*(?:cdn|jsdelivr|unpkg|googleapis)')
    for page in Path("build/docs").rglob("*.html"):
        if foreign.search(page.read_text(encoding="utf-8")):
            session.error(f"{page} loads something from the network")
    chosen = ["tests/project/test_notebook.py", "tests/project/test_docs.py"]
    session.run("pytest", "-n", "0", "-q", *chosen, "-k", "generated or notebook")


def install(session: nox.Session, *words: str) -> None:
    """Install, unless the session runs in an environment that somebody else has made."""
    if not isinstance(session.virtualenv, PassthroughEnv):
        session.install(*words)


def lowest_versions() -> list[str]:
    """Read the lower bounds of setup.cfg as constraints; every dependency must have one."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    blocks = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    found = set()
    for line in filter(None, "\n".join(blocks).splitlines()):
        match = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(?:>=([\w.]+))?(?:,<[\w.]+)?", line)
        if match is None or not (match[2] or match[1] == "cl-merge"):
            raise SystemExit(
                f"setup.cfg: '{line}' is not of the form name[extra]>=version,<version"
            )
        if match[2]:
            found.add(f"{match[1]}=={match[2]}")
    return sorted(found)
