"""The command ``explain``: explain images through a server, print a table, write the heatmaps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from explain_client.client import ExplainClient, ExplainError, Explanation

HEADER = f"{'image':28} {'label':14} {'prob.':>6} {'explained':>14} {'steps':>5} {'delta':>9} {'ms':>7}"


def main() -> None:
    """Entry point. Exit status: 0 all explained, 1 some images failed, 2 wrong usage."""
    arguments = _parser().parse_args()
    parameters = {
        name: value
        for name in ("n_steps", "method", "baseline", "output", "overlay", "polarity", "colormap", "clip_percentile")
        if (value := getattr(arguments, name)) is not None
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    failures = []
    print(HEADER)
    with ExplainClient(arguments.url) as client:
        for image in arguments.images:
            try:
                explanation = client.explain(image, target=arguments.target, **parameters)
            except (ExplainError, OSError) as error:
                failures.append(f"{image}: {error}")
                continue
            (arguments.out / f"{image.stem}.heatmap.png").write_bytes(explanation.heatmap_png)
            print(_row(image, explanation), flush=True)
    print(f"heatmaps in {arguments.out}/")
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)


def _row(image: Path, explanation: Explanation) -> str:
    best = explanation.predictions[0]
    labels = {prediction.index: prediction.label for prediction in explanation.predictions}
    explained = labels.get(explanation.explained_class, str(explanation.explained_class))
    return (
        f"{image.name:28.28} {best.label:14.14} {best.probability:6.1%} {explained:>14.14} {explanation.n_steps:5} "
        f"{explanation.convergence_delta:9.4f} {explanation.milliseconds:7.0f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="explain", description="Explain what an image classifier saw in images.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP files")
    parser.add_argument("--url", default="localhost:8001", help="host and gRPC port (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("explanations"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--target", type=int, help="class to explain (default: the predicted one)")
    parser.add_argument("--n-steps", type=int, help="points of the integration path (default: 50)")
    parser.add_argument("--method", help="quadrature rule, by Captum's name (default: gausslegendre)")
    parser.add_argument("--baseline", help="zero, black, white, gray or blur (default: zero)")
    parser.add_argument("--output", help="what is explained: logit or probability (default: logit)")
    parser.add_argument("--overlay", help="blend, heatmap or masked (default: blend)")
    parser.add_argument("--polarity", help="positive, negative, absolute or all (default: positive)")
    parser.add_argument("--colormap", help="a matplotlib colour map (default: inferno)")
    parser.add_argument("--clip-percentile", type=float, help="where the colours saturate (default: 99)")
    return parser


if __name__ == "__main__":
    main()
