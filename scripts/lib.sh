# shellcheck shell=bash
# What every script here shares: speaking, failing, elevating, asking the engine. Sourced, never run.

say()  { printf '%s\n' "$*"; }
step() { printf '==> %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }

# die MESSAGE... : each argument is a line; the first says what failed, the rest what to do.
die() {
    printf 'error: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '       %s\n' "$@" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Root runs a command as it is; anybody else elevates that single command, so that nothing in the tree becomes root's.
elevated() {
    if ((EUID == 0)); then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "this needs root and there is no sudo: $*" "run that command as root, then start again"
    fi
}

# The version of the engine that docker talks to; fails if none answers. Bounded, since a half-dead engine accepts
# connections and says nothing.
engine_version() {
    have docker || return 1
    timeout 15 docker version --format '{{.Server.Version}}' 2>/dev/null
}

# The process ids of programs of that name; without pgrep, which a small system lacks.
pids_of() { grep -lx "$1" /proc/[0-9]*/comm 2>/dev/null | cut -d/ -f3; }

PUBLIC_BASE_IMAGE=debian:bookworm-slim

# Whether a public image could be fetched. Asks for its manifest only: a refusal comes at once, a silent network is given up on.
registry_reachable() { have docker && timeout 8 docker manifest inspect "$PUBLIC_BASE_IMAGE" >/dev/null 2>&1; }

# How docker compose is called here: the client's plugin, or the program of its own that it once was.
compose_command() {
    if docker compose version >/dev/null 2>&1; then
        echo docker compose
    else
        have docker-compose && echo docker-compose
    fi
}
