#!/usr/bin/env bash
# The clients that people use against the real server with the bundled model: OpenAI's for Python
# and Node, and three libraries built on it, unpatched. Installs what requirements.txt and
# package-lock.json pin, beside the build; a second run finds it there.
#
#     tests/clients/run.sh [PROGRAM]      [default: what the tests are built with]
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
target=${CARGO_TARGET_DIR:-$here/../../target}
mkdir -p "$target"
work=$(cd "$target" && pwd)/clients

program=${1:-}
if [ -z "$program" ]; then
    cargo build --locked --quiet --workspace --manifest-path ../../Cargo.toml
    program=$target/debug/strand
fi
program=$(realpath "$program")

# a folder is complete when it holds the list that it was made from
if ! cmp -s requirements.txt "$work/venv/requirements.txt"; then
    rm -rf "$work/venv"
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --no-compile --only-binary :all: -r requirements.txt
    cp requirements.txt "$work/venv/"
fi
if ! cmp -s package-lock.json "$work/node/installed.json"; then
    rm -rf "$work/node"
    mkdir -p "$work/node"
    cp package.json package-lock.json clients.mjs "$work/node/"
    (cd "$work/node" && npm ci --ignore-scripts --silent)
    cp package-lock.json "$work/node/installed.json"
fi
# node looks for packages beside the script
cp clients.mjs "$work/node/"

# litellm has a list of prices, and would look for a newer one
export LITELLM_LOCAL_MODEL_COST_MAP=True
data=$(mktemp -d)
key=key-of-a-test-$$
"$program" serve --addr 127.0.0.1:0 --api-key "$key" --data-dir "$data" 2>"$data/log" &
server=$!
stop() {
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    rm -rf "$data"
}
trap stop EXIT

address=
for _ in $(seq 600); do
    address=$(sed -n 's/^listening on //p' "$data/log")
    [ -n "$address" ] && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
if [ -z "$address" ]; then
    echo "the server did not start:" >&2
    cat "$data/log" >&2
    exit 1
fi

failed=0
"$work/venv/bin/python" clients.py "$address" "$key" || failed=1
node "$work/node/clients.mjs" "$address" "$key" || failed=1
# whatever clients did, the server is still there
kill -0 "$server" || failed=1
exit "$failed"
