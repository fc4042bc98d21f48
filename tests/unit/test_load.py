"""The closed-loop clients of the benchmarks."""

import pytest

from tools.bench.load import run_block, saturated


def test_blocks_count_what_clients_saw():
    asked = []

    def make_asker():
        return lambda number: asked.append(number) or 10

    block = run_block(make_asker, clients=3, requests=7)
    assert sorted(asked) == list(range(7))
    assert (len(block.seconds), block.sizes) == (7, [10] * 7)
    assert len(run_block(make_asker, clients=1, requests=5, most_seconds=-1).seconds) == 0


def test_failures_of_clients_fail_the_block():
    def make_asker():
        def ask(number):
            raise RuntimeError("no answer")

        return ask

    with pytest.raises(RuntimeError, match="no answer"):
        run_block(make_asker, clients=2, requests=3)
    with pytest.raises(RuntimeError, match="no answer"), saturated(make_asker, clients=2):
        pass
