# For scripts here: `program` is what was given or what the tests are built with, `work` a folder
# beside the build; `serve FLAG...` starts it with the bundled model on a free port, under `key`,
# with `data`, and says its `address`. It ends with the script.
set -euo pipefail
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

# installed NAME LIST FLAG...: the packages of the list, in a folder of this name. It is complete
# when it holds the list that it was made from.
installed() {
    if ! cmp -s "$2" "$work/$1/$2"; then
        rm -rf "${work:?}/$1"
        python3 -m venv "$work/$1"
        "$work/$1/bin/pip" install --quiet --no-compile "${@:3}" -r "$2"
        cp "$2" "$work/$1/"
    fi
}

key=key-of-a-test-$$
data=$(mktemp -d)
address=
server=
stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$server" ] || wait "$server" 2>/dev/null || true
    rm -rf "$data"
}
trap stop EXIT

serve() {
    "$program" serve --addr 127.0.0.1:0 --api-key "$key" --data-dir "$data" "$@" 2>"$data/log" &
    server=$!
    for _ in $(seq 600); do
        address=$(sed -n 's/^listening on //p' "$data/log")
        [ -z "$address" ] || return 0
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    echo "the server did not start:" >&2
    cat "$data/log" >&2
    exit 1
}
