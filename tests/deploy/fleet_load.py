"""Sends requests until its input ends, then prints what became of them; runs in a pod, by itself, as `python -c`.

Arguments: the URLs of `explain` and of `classify`, clients of each kind, and gradients of an explanation.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter

from explain_client import ExplainClient, ExplainError

IMAGE = "/opt/explaining/sample.jpg"
answered: Counter[str] = Counter()
failures: list[str] = []
is_over = threading.Event()


def ask(kind: str, url: str, n_steps: int) -> None:
    with ExplainClient(url, timeout=300) as client:
        while not is_over.is_set():
            try:
                if kind == "classify":
                    client.classify(IMAGE)
                elif kind == "stream":
                    list(client.explain_stream(IMAGE, n_steps=n_steps))
                else:
                    client.explain(IMAGE, n_steps=n_steps)
                answered[kind] += 1
            except ExplainError as error:
                failures.append(f"{kind}: {error.status} {error}")
                time.sleep(0.2)


def main() -> None:
    explain, classify, clients, n_steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    kinds = [("explain", explain), ("stream", explain), ("classify", classify)]
    threads = [
        threading.Thread(target=ask, args=(*kinds[number % len(kinds)], n_steps))
        for number in range(len(kinds) * clients)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    is_over.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"answered": answered, "failures": failures}))


if __name__ == "__main__":
    main()
