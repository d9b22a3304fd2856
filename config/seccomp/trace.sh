#!/bin/sh
# Prints every system call that representative workloads make, one a line, with how often: what default.json is derived from.
# Needs Docker, and strace on this machine: it is taken along into the container with its libraries.
# Usage: config/seccomp/trace.sh [IMAGE]        default: cellblock/data:latest
set -eu

image=${1:-cellblock/data:latest}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT INT TERM
strace=${STRACE:-$(command -v strace)} || { echo "strace is not installed here" >&2; exit 1; }

# The host's strace runs inside with its own loader and libraries, so the image needs nothing of it.
cp "$strace" "$folder/strace"
ldd "$strace" | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\//) print $i }' | while read -r library; do
    cp "$library" "$folder/"
done
cp "$(dirname "$0")/workloads.py" "$folder/workloads.py"
chmod -R a+rX "$folder"

trace() {
    docker run --rm --network none --read-only --user 201000:201000 --cap-drop ALL --cap-add SYS_PTRACE \
        --security-opt seccomp=unconfined --tmpfs /tmp:rw,exec,size=256m,uid=201000 \
        --tmpfs /workspace:rw,exec,size=256m,uid=201000 --env HOME=/workspace --workdir /workspace \
        --volume "$folder:/trace:ro" --entrypoint /bin/sh "$image" -c "
            loader=\$(ls /trace/ld-linux-*)
            \$loader --library-path /trace /trace/strace -f -qq -c -U calls,name -o /tmp/count $1 >/tmp/out 2>&1 \
                || { echo '$1:' >&2; tail -3 /tmp/out >&2; }
            cat /tmp/count"
}

{
    trace 'python3 /trace/workloads.py kernel'
    trace 'python3 /trace/workloads.py libraries'
    trace 'python3 /trace/workloads.py system'
    trace 'python3 /trace/workloads.py tools'
} | awk '$1 ~ /^[0-9]+$/ && $2 != "total" { calls[$2] += $1 } END { for (name in calls) print name, calls[name] }' | sort
