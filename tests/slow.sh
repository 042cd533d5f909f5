#!/usr/bin/env bash
# What takes too long for every run of the suite: thousands of histories, hundreds of kills, ten
# minutes of many clients.
# Prints what was run, on what, and how it ended; results are kept in tests/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TERM_COLOR=never

printf 'commit %s, %s\n' "$(git rev-parse --short HEAD)" "$(rustc --version)"
grep -m1 'model name' /proc/cpuinfo

run() {
    printf '\n== %s\n' "$*"
    env "${@:2}" cargo test --locked --workspace --test tests -- --nocapture "$1" 2>/dev/null |
        grep -E '^(test |[0-9]+ histories|[0-9]+ kills|[0-9]+ clients|test result)'
}

run histories STRAND_HISTORIES="${HISTORIES:-2000}"
run processes STRAND_KILLS="${KILLS:-300}"
run server_soak STRAND_SOAK_SECONDS="${SOAK_SECONDS:-600}"
