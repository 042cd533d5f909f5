"""Whether what lm-eval read off the server is what `strand generate` computes, to the last digit
that both print.

    python agree.py PROGRAM ADDRESS KEY FOLDER

FOLDER has the samples that `lm_eval --log_samples` wrote. Log-likelihoods are computed again from
`--prompt-logprobs`, answers by greedy generation; lm-eval's own code says which tokens are scored.
The exit status is 1 where anything differs.
"""

import json
import subprocess
import sys
from pathlib import Path

from lm_eval.utils import RemoteTokenizer, get_rolling_token_windows, make_disjoint_window

PROGRAM, ADDRESS, KEY, FOLDER = sys.argv[1:]
# as judges.sh says it to lm-eval, which keeps a token for what is generated and one before a window
WINDOW = 256 - 2
# sums of up to 256 numbers with nine digits each
TOLERANCE = 1e-5
tokenizer = RemoteTokenizer(ADDRESS + "/v1/completions", auth_token=KEY)
FLAGS = ["--json", "--max-model-len", "512", "--temperature", "0"]


def generate(ids, *flags):
    command = [PROGRAM, "generate", "--prompt-ids", ",".join(map(str, ids)), *FLAGS, *flags]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def likelihood(context, continuation):
    """Log-likelihood of token ids behind others, and whether each is the likeliest."""
    found = generate(context + continuation, "--prompt-logprobs", "1", "--max-tokens", "1")
    scored = found["prompt_logprobs"][len(context) :]
    assert [one["token_id"] for one in scored] == continuation
    return sum(one["logprob"] for one in scored), all(
        one["logprob"] >= one["top"][0][1] for one in scored
    )


def of_choice(arguments):
    """Tokens as lm-eval parts them: blanks at the end of a context begin what follows."""
    context, continuation = arguments["arg_0"], arguments["arg_1"]
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    return likelihood(whole[:start], whole[start:])


def of_text(text):
    prefix = tokenizer.bos_token_id or tokenizer.eos_token_id
    windows = get_rolling_token_windows(tokenizer.encode(text), prefix, WINDOW, 1)
    return sum(likelihood(*make_disjoint_window(window))[0] for window in windows)


def samples(task):
    [file] = Path(FOLDER).glob(f"*/samples_{task}_*.jsonl")
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        for arguments, [told] in zip(sample["arguments"].values(), sample["resps"]):
            yield arguments, told


largest, compared, wrong = 0.0, 0, []


def compare(name, told, own):
    global largest, compared
    compared += 1
    largest = max(largest, abs(float(told) - own))
    if abs(float(told) - own) > TOLERANCE:
        wrong.append(f"{name}: lm-eval has {told}, generate {own}")


for arguments, (told, greedy) in samples("strand_choice"):
    own, likeliest = of_choice(arguments)
    compare(arguments["arg_1"], told, own)
    if greedy != str(likeliest):
        wrong.append(f"{arguments['arg_1']}: lm-eval says greedy is {greedy}")
for arguments, told in samples("strand_text"):
    compare(arguments["arg_0"][:40], told, of_text(arguments["arg_0"]))
answers = 0
for arguments, told in samples("strand_answer"):
    answers += 1
    own = generate(tokenizer.encode(arguments["arg_0"]), "--max-tokens", "16", "--stop", "\n")
    if own["text"] != told:
        wrong.append(f"{arguments['arg_0'][-40:]!r}: lm-eval read {told!r}, not {own['text']!r}")
print(f"{compared} log-likelihoods, largest difference {largest:.2g}; {answers} answers compared")
print("\n".join(wrong) or "all agree")
sys.exit(bool(wrong) or compared < 40 or answers < 10)
