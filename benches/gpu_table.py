"""The table of benches/gpu.sh, from the raw output in a folder.

    python3 benches/gpu_table.py FOLDER
"""

import json
import sys
from pathlib import Path

# Weights that a token of Qwen3-8B's shape reads, all but the embedding; two bytes each.
READ_BYTES = {"qwen3-8b": 2 * 7.57e9}


class Folder:
    def __init__(self, path):
        self.path = Path(path)

    def status(self, name):
        """`None`: it was not run."""
        file = self.path / f"{name}.status"
        return int(file.read_text()) if file.exists() else None

    def last(self, name):
        """The JSON that a bench ends with, if it came that far."""
        if self.status(name) != 0:
            return None
        return json.loads((self.path / f"{name}.txt").read_text().splitlines()[-1])


def percent(share):
    return f"{100 * share:.0f} %"


def checks(folder):
    names = {
        "tests": "tests that name a device",
        "memcheck": "compute-sanitizer memcheck",
        "racecheck": "compute-sanitizer racecheck",
    }
    for name, what in names.items():
        status = folder.status(name)
        yield what, {None: "not run", 0: "clean"}.get(status, f"FAILED, see {name}.txt")


def kernels(folder):
    found = folder.last("kernels")
    if found is None or "copied_bytes_per_second" not in found:
        yield "kernels", "not of a GPU, see kernels.txt"
        return
    yield "copy, GB/s read and written", f"{found['copied_bytes_per_second'] / 1e9:.0f}"
    yield "bf16 products, T/s", f"{found['bf16_operations_per_second'] / 1e12:.0f}"
    for row in found["rows"]:
        if row["op"].startswith("prefill"):
            yield row["op"], percent(row["share_of_bf16"]) + " of bf16 (goal 50 %)"
        elif row["share_of_bf16"] > row["share_of_copy"]:
            told = f"{1e6 * row['seconds']:.1f} us, {percent(row['share_of_bf16'])} of bf16"
            yield row["op"], told
        else:
            goal = " (goal 80 %)" if row["op"].startswith("decode") else ""
            text = f"{1e6 * row['seconds']:.1f} us, {percent(row['share_of_copy'])} of copy{goal}"
            yield row["op"], text


def throughput(folder):
    names = {
        "throughput": "strand",
        "throughput-deterministic": "strand, deterministic",
        "peer": "PyTorch",
    }
    for name, who in names.items():
        found = folder.last(name)
        told = "not run" if folder.status(name) is None else "FAILED"
        if found is not None:
            told = f"{found['output_tokens_per_second']:.0f} output tokens/s"
            told += f" in {found['seconds']:.1f} s"
        model = found.get("model", "Qwen3-0.6B's shape") if found else "Qwen3-0.6B's shape"
        yield f"nano-vLLM's workload, {model}, {who}", told


def latency(folder):
    yield from latency_of(folder, "latency", "decode of a large model")
    yield from latency_of(folder, "latency-quantized", "decode with weights in blocks")


def latency_of(folder, name, what):
    found, ceilings = folder.last(name), folder.last("kernels") or {}
    if found is None:
        yield what, "FAILED"
        return
    copied = ceilings.get("copied_bytes_per_second")
    for row in found["rows"]:
        speed = row["tokens_per_second"]
        told = f"{speed:.1f} tokens/s"
        bytes_read = next((b for name, b in READ_BYTES.items() if name in found["model"]), None)
        if copied and bytes_read and row["batch_size"] == 1:
            told += f", {percent(speed * bytes_read / copied)} of copy (goal 85 %)"
        what = f"{found['model']}, batch {row['batch_size']}, prompt {row['prompt_len']}"
        yield what, told


def reuse(folder):
    found = folder.last("reuse")
    if found is None:
        yield "first token over chunks", "FAILED"
        return
    tokens = found["num_chunks"] * found["chunk_len"]
    for row in found["rows"]:
        what = f"first token, {tokens} tokens of chunks, {row['policy']}, {row['scene']}"
        yield what, f"{1e3 * row['median_seconds']:.1f} ms"
    yield "switching a chunk", f"{1e6 * found['toggle_seconds']:.0f} us"


def main():
    folder = Folder(sys.argv[1])
    card = folder.path / "card.txt"
    print(f"| what | {card.read_text().strip() if card.exists() else 'no card'} |")
    print("|---|---|")
    for part in (checks, kernels, throughput, latency, reuse):
        for what, told in part(folder):
            print(f"| {what} | {told} |")


if __name__ == "__main__":
    main()
