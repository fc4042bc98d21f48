#!/usr/bin/env bash
# perf_analyzer over gRPC with a real image: perf MODEL [options of perf_analyzer ...]
# IMAGE is the picture's path, TRITON_URL the server. Decoupled models are measured as streams.
set -euo pipefail
if [[ $# -lt 1 ]]; then
    echo "usage: perf {classify,explain,explain_stream} [options of perf_analyzer ...]" >&2
    exit 2
fi
model=$1
shift
image=${IMAGE:-/opt/explaining/sample.jpg}
if [[ ! -r $image ]]; then
    echo "perf: $image cannot be read; IMAGE names the picture to send" >&2
    exit 1
fi
input=$(mktemp --suffix=.json)
trap 'rm -f "$input"' EXIT
# A BYTES element is its length, four bytes little-endian, and its content.
python3 - "$image" > "$input" << 'PYTHON'
import base64, json, struct, sys

content = open(sys.argv[1], "rb").read()
element = base64.b64encode(struct.pack("<I", len(content)) + content).decode()
print(json.dumps({"data": [{"IMAGE": {"b64": element, "shape": [1]}}]}))
PYTHON
options=(-m "$model" -u "${TRITON_URL:-localhost:8001}" -i grpc --input-data "$input")
if [[ $model == explain_stream ]]; then
    options+=(--streaming --async)
fi
perf_analyzer "${options[@]}" "$@"
