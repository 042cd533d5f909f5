#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one call, as one table.
#
#   benches/gpu.sh STRAND [FOLDER]
#
# STRAND is the program built with --features cuda, FOLDER where the raw output goes (one file a
# bench; a temporary folder if none is named). Needs no network and no model: weights are random, in
# the shape of real models. Python makes the table (benches/gpu_table.py); where it has PyTorch, that
# runs the same workload (benches/gpu_peer.py).
#
#   DEVICE=cpu QUICK=1   a dry run: the same commands, small sizes and the bundled model, on the CPU
#   TESTS=BINARY         the integration tests, built with --features cuda; those of the GPU are run
#   PEER=0               without PyTorch
set -uo pipefail
strand=${1:?usage: benches/gpu.sh STRAND [FOLDER]}
out=${2:-$(mktemp -d)}
here=$(cd "$(dirname "$0")" && pwd)
device=${DEVICE:-cuda}
mkdir -p "$out"
rm -f "$out"/*.txt "$out"/*.status

if [ "${QUICK:-0}" = 1 ]; then
    # the bundled model
    small="" large="" blocks="" ops="--repeats 1 --only rms_norm" on="--device $device --max-num-batched-tokens 256"
    workload="--num-seqs 4 --min-input-len 8 --max-input-len 32 --min-output-len 4 --max-output-len 8"
    latency="--prompt-lens 32 --output-len 8 --repeats 1"
    chunks="--num-chunks 4 --chunk-len 32 --repeats 2 --cold-repeats 1 --max-model-len 512"
else
    small="--random-weights qwen3-0.6b" large="--random-weights qwen3-8b"
    blocks="--random-weights qwen3-0.6b:q4_k_m"
    ops="--repeats 15" on="--device $device --max-num-batched-tokens 16384"
    workload="--num-seqs 256"
    latency="--prompt-lens 128,1024 --output-len 128 --repeats 3"
    chunks="--num-chunks 32 --chunk-len 1024 --repeats 5 --cold-repeats 3 --max-model-len 34816"
fi

# run NAME COMMAND...: keeps what it says under NAME; the last line of a bench is JSON.
run() {
    local name=$1 started=$SECONDS status=0
    shift
    echo "== $name: $*" >&2
    "$@" >"$out/$name.txt" 2>"$out/$name.log" || status=$?
    echo "$status" >"$out/$name.status"
    [ $status = 0 ] || tail -n 2 "$out/$name.log" >&2
    echo "   status $status after $((SECONDS - started)) s" >&2
}

if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/card.txt"
fi

if [ -n "${TESTS:-}" ]; then
    run tests "$TESTS" gpu --test-threads 2
fi
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$strand" generate \
            --device "$device" --prompt-ids 1,2,3,4,5,6,7,8 --max-tokens 8 \
            --max-model-len 256 --kv-memory 16MiB --max-num-seqs 4
    done
fi

# every op, against what the card copies and multiplies
run kernels "$strand" bench kernels --device "$device" $ops
# nano-vLLM's workload, fast and deterministic, and PyTorch's way with it
run throughput "$strand" bench throughput $small $workload $on \
    --max-model-len 4096 --json
run throughput-deterministic "$strand" bench throughput $small $workload $on \
    --max-model-len 4096 --deterministic --json
if [ "${PEER:-1}" = 1 ] && python3 -c 'import torch' 2>/dev/null; then
    peer=$workload
    run peer python3 "$here/gpu_peer.py" --device "$device" $peer
fi
# one sequence of a large model: each token reads all weights once
run latency "$strand" bench latency $large --batch-sizes 1,8 $latency $on --json
# the same with weights in blocks, of a smaller one: random blocks take long to make
run latency-quantized "$strand" bench latency $blocks --batch-sizes 1,8 $latency $on --json
# the first token of a question over chunks: cold, on the device, the host, the disk; switches
run reuse "$strand" bench reuse $large $chunks --question-len 50 \
    --policy independent,exact --contexts 0 $on --json
run tiers "$strand" bench tiers $small --chunk-lens 64,1024 --num-chunks 2 \
    --questions 0 --max-model-len 4096 $on --json

python3 "$here/gpu_table.py" "$out" | tee "$out/table.md"
echo "raw output: $out" >&2
