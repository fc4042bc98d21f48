"""The client as a package."""

import re
import subprocess
import sys

import explain_client
from tools.paths import ROOT


def test_the_client_needs_nothing_of_the_servers():
    """Its own requirements bring neither torch nor the server; this shows that it imports neither."""
    code = "import explain_client.cli, sys; print({'torch', 'captum', 'pytriton'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_version_has_one_source_and_the_changelog_has_it():
    (stated,) = re.findall(r'^version = "(.+)"$', (ROOT / "client" / "pyproject.toml").read_text(), re.MULTILINE)
    assert explain_client.__version__ == stated
    assert not re.search(r"^version *=", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    released = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == stated
