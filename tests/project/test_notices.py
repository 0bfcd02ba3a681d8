"""The files beside the code: notices, citation and changelog keep up with it."""

import configparser
import re
from pathlib import Path

from omegaconf import OmegaConf

from cl_merge import __version__
from cl_merge.mergers import MERGERS

ROOT = Path(__file__).parents[2]


def test_every_needed_package_has_a_licence_in_the_notices():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = re.findall(r"^[\w-]+", setup["options"]["install_requires"], flags=re.MULTILINE)
    named = re.findall(r"^\| ([\w-]+) \|", (ROOT / "NOTICES.md").read_text(), flags=re.MULTILINE)
    assert named == ["package", *needed]


def test_citation_and_changelog_are_of_this_version():
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation.version == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_changelog_counts_the_mergers():
    numbers = {23: "Twenty-three", 24: "Twenty-four", 25: "Twenty-five", 26: "Twenty-six"}
    assert f"{numbers[len(MERGERS)]} mergers" in (ROOT / "CHANGELOG.md").read_text()
