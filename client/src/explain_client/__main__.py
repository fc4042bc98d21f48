"""``python -m explain_client`` is the command ``explain``."""

from explain_client.cli import main

main()
