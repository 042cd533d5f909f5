#!/usr/bin/env bash
# The clients that people use against the real server with the bundled model: OpenAI's for Python
# and Node, and three libraries built on it, unpatched. Installs what requirements.txt and
# package-lock.json pin, beside the build; a second run finds it there.
#
#     tests/clients/run.sh [PROGRAM]      [default: what the tests are built with]
cd "$(dirname "$0")"
. ./serve.sh

installed venv requirements.txt --only-binary :all:
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
serve

failed=0
"$work/venv/bin/python" clients.py "$address" "$key" || failed=1
node "$work/node/clients.mjs" "$address" "$key" || failed=1
# whatever clients did, the server is still there
kill -0 "$server" || failed=1
exit "$failed"
