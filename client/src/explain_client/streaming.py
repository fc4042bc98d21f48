"""``explain --stream``: one image after the other, its prediction at once, then a line for each level."""

from __future__ import annotations

import argparse
import sys

from explain_client.batch import sources_of
from explain_client.client import ExplainClient
from explain_client.errors import ExplainError, UnavailableError
from explain_client.options import contract_parameters
from explain_client.output import NO_SERVER, Output, finish, stream_line, write_whole
from explain_client.results import Level


def explain_streamed(options: argparse.Namespace) -> int:
    """Explain image by image: print the prediction at once, then a line for each level."""
    sources, output = sources_of(options), Output(options, None)
    with ExplainClient(options.url, options.timeout) as client:
        for source in sources:
            try:
                responses = client.explain_stream(
                    source.read(),
                    target=options.target,
                    top_k=options.top_k,
                    want=["heatmap"],
                    **contract_parameters(options),
                )
                for response in responses:
                    output.line(stream_line(source, response, options.json))
                    if isinstance(response, Level):
                        write_whole(source.heatmap, response.heatmap_png or b"")
            except UnavailableError as error:
                print(f"{options.url} cannot be reached: {error}; try explain doctor", file=sys.stderr)
                return NO_SERVER
            except (ExplainError, OSError) as error:
                output.failures.append(f"{source.name}: {error}")
    return finish(options, output)
