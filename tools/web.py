"""``make web``: start the server and, when it is ready, the live page of the client; both end with Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys

from explain_client import ExplainError, web
from explain_client.options import UsageError
from tools.classifiers.source import ExportError
from tools.export import describe_served, ensure_exported
from tools.server import EmbeddedServer, Ports
from tools.triton.process import ServerError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.web", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=web.DEFAULT_PORT, help="of the page (default: %(default)s)")
    arguments = parser.parse_args()
    print("starting Triton ...", flush=True)
    try:
        ensure_exported(network=os.environ.get("NETWORK"))
        print(f"serves {describe_served()}", flush=True)
        with EmbeddedServer(ports=Ports.free()) as server:
            sys.exit(web.main(["--url", server.grpc_url, "--port", str(arguments.port)]))
    except (ServerError, ExportError, UsageError, ExplainError) as error:
        sys.exit(f"web: {error}")
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
