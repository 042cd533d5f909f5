#!/usr/bin/env bash
# What takes too long for every run of the suite: thousands of histories, hundreds of kills, ten
# minutes of many clients, hundreds of probes of who has what, millions of blows, minutes of
# fuzzing, other people's judges of the server, their vectors of a real model, and the kernels on a
# processor that is not here. Prints what was run, on what, and how it ended; results are kept in
# tests/results/.
#
#     tests/slow.sh [STEP...]      [default: all of them, in the order below]
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TERM_COLOR=never

printf 'commit %s, %s\n' "$(git rev-parse --short HEAD)" "$(rustc --version)"
grep -m1 'model name' /proc/cpuinfo

run() {
    printf '\n== %s\n' "$*"
    env "${@:2}" cargo test --locked --workspace ${FEATURES:+--features "$FEATURES"} --test tests \
        -- --nocapture "$1" 2>/dev/null |
        grep -E '^(test |[0-9]+ histories|[0-9]+ kills|[0-9]+ clients|[0-9]+ idle|[a-z]+: [0-9]+ probes|blows|test result)'
}

# Needs nightly's coverage and `cargo install cargo-fuzz`; its findings lie in fuzz/artifacts.
fuzz() {
    local target=${CARGO_TARGET_DIR:-target}/fuzz seconds=${FUZZ_SECONDS:-300} found
    printf '\n== fuzz requests FUZZ_SECONDS=%s\n' "$seconds"
    command -v cargo-fuzz >/dev/null || cargo install --locked --quiet cargo-fuzz
    found=$(mktemp -d)
    # what it finds on the way is not for the repository: the corpus stays as it is
    cargo +nightly fuzz run --sanitizer none --target-dir "$target" requests \
        "$found" fuzz/corpus/requests -- -max_total_time="$seconds" -max_len=65536 -timeout=10 \
        -print_final_stats=1 2>&1 | grep -E '^(stat::|Done|#[0-9]+.*(INITED|DONE)|.*(panicked|ERROR))'
    rm -rf "$found"
}

# Needs `rustup target add aarch64-unknown-linux-gnu`, a linker for it and qemu-user.
neon() {
    local target=aarch64-unknown-linux-gnu cpu
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    for cpu in max cortex-a72; do # with products of bytes, and without
        printf '\n== neon, qemu-aarch64 -cpu %s\n' "$cpu"
        local run="qemu-aarch64 -cpu $cpu -L /usr/aarch64-linux-gnu"
        export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$run"
        cargo test --locked -p strand-kernels --lib --target "$target" 2>/dev/null |
            grep -E '^(test result|test .*FAILED)'
    done
}

all='histories processes soak timing blows fuzz spans judges minilm neon'
for step in "${@:-$all}"; do
    for name in $step; do
        case $name in
        histories) run histories STRAND_HISTORIES="${HISTORIES:-2000}" ;;
        processes) run processes STRAND_KILLS="${KILLS:-300}" ;;
        soak) run server_soak STRAND_SOAK_SECONDS="${SOAK_SECONDS:-600}" ;;
        timing) run server_timing STRAND_PROBES="${PROBES:-500}" ;;
        blows) run server_reading STRAND_BLOWS="${BLOWS:-3000000}" ;;
        fuzz) fuzz ;;
        spans) FEATURES=otel run server_traces ;;
        judges) printf '\n== judges\n' && tests/clients/judges.sh ;;
        minilm) printf '\n== minilm\n' && tests/clients/minilm.sh ;;
        neon) neon ;;
        *) echo "there is no step $name" >&2 && exit 2 ;;
        esac
    done
done
