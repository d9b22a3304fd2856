#!/usr/bin/env bash
# A session with curl: made, asked twice, ended. CELLBLOCK_URL is where the server is, CELLBLOCK_API_KEY a key of it.
set -euo pipefail

ask() { curl -fsS -H "Authorization: Bearer $CELLBLOCK_API_KEY" -H "Content-Type: application/json" "$@"; }

session=$(ask -d '{}' "$CELLBLOCK_URL/v1/sessions" | grep -oE 'ses[0-9a-z]{26}' | head -n 1)
trap 'ask -X DELETE "$CELLBLOCK_URL/v1/sessions/$session" >/dev/null' EXIT

ask -d '{"code": "x = 40"}' "$CELLBLOCK_URL/v1/sessions/$session/executions" >/dev/null
ask -d '{"code": "print(x + 2)"}' "$CELLBLOCK_URL/v1/sessions/$session/executions"
