#!/usr/bin/env bash
# JupyterLab whose kernels are sessions of this server; notebooks stay on your machine. More of its options may follow: jupyterlab.sh --no-browser --port 8889
set -euo pipefail

exec jupyter lab --gateway-url="$CELLBLOCK_URL/t/$CELLBLOCK_API_KEY" "$@"
