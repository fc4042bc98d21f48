"""``make refusals``: send requests that are refused to a real server and write its answers as a table.

The requests are those of the tests (`tests/refusal_cases.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import tritonclient.grpc

from tools.export import repository_with
from tools.paths import OUTPUTS, ROOT
from tools.server import EmbeddedServer, Ports
from tools.shapes.dataset import CLASSES

sys.path.append(str(ROOT / "tests"))
from refusal_cases import INVALID_ARGUMENT, Refusal, cases

DOCUMENT = ROOT / "docs" / "refusals.md"


def table(refusals: Sequence[tuple[Refusal, str]]) -> str:
    """A Markdown table of requests and the messages that they were answered with."""
    lines = [
        "# What is refused, and what the answer says",
        "",
        f"Written by `make refusals`, which sent these {len(refusals)} requests to a server with the shapes network "
        f"({len(CLASSES)} classes). Each was answered",
        "with INVALID_ARGUMENT, and so is each alone in a batch with good ones. Requests go to `explain` unless their "
        "tensors are those",
        "of `integrated_gradients` or `heatmap`. Parameters are checked by the step that reads them, if it runs.",
        "Numbers in messages are settings in the models' `config.pbtxt`.",
    ]
    for group in dict.fromkeys(refusal.group for refusal, _ in refusals):
        lines += ["", f"## {group}", "", "| sent | answer |", "|---|---|"]
        lines += [
            f"| {refusal.what} | {_escaped(message)} |" for refusal, message in refusals if refusal.group == group
        ]
    return "\n".join(lines) + "\n"


def _escaped(message: str) -> str:
    return message.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.refusals", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    answers = []
    with EmbeddedServer(repository_with("shapes"), Ports.free(), log_file=OUTPUTS / "refusals.log") as server:
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        for refusal in cases():
            answer = refusal.send(client)
            if answer is None or answer.status() != INVALID_ARGUMENT:
                raise SystemExit(f"not refused as it should be: {refusal.what}: {answer}")
            answers.append((refusal, answer.message()))
    arguments.out.write_text(table(answers))
    print(f"wrote {len(answers)} refusals to {arguments.out}")


if __name__ == "__main__":
    main()
