"""The client as a package."""

import subprocess
import sys


def test_the_client_needs_nothing_of_the_servers():
    """Its own requirements bring neither torch nor the server; this shows that it imports neither."""
    code = "import explain_client.cli, sys; print({'torch', 'captum', 'pytriton'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
