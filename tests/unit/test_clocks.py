"""The clocks that the models read."""

import re

from tools.paths import MODEL_REPOSITORY


def test_no_model_reads_a_clock_that_can_be_set():
    """So that a jump of the system time cannot move a deadline."""
    for file in MODEL_REPOSITORY.glob("*/1/*.py"):
        assert not re.search(r"time\.time\(|datetime|time\.localtime|time\.gmtime", file.read_text()), file
