#!/usr/bin/env bash
# Other people's judges against the real server with the bundled model: schemathesis on our own
# OpenAPI document and on the one that OpenAI's SDK is made of, and lm-eval with tasks of our own,
# whose log-likelihoods must be those of `strand generate --prompt-logprobs`. Installs what
# judges.txt pins, beside the build.
#
#     tests/clients/judges.sh [PROGRAM]      [default: what the tests are built with]
cd "$(dirname "$0")"
. ./serve.sh

installed judges judges.txt --prefer-binary
python=$work/judges/bin/python
# a server that refuses soon, and that judges can't keep busy for long
serve --max-body 1MiB --max-n 4 --max-model-len 512
failed=0

examples=${EXAMPLES:-50}
judge() {
    printf '\n-- schemathesis on %s\n' "$1"
    # one at a time, so that a seed replays
    "$work/judges/bin/schemathesis" --no-color run "$2" --url "$3" --seed 1 -n "$examples" \
        -H "Authorization: Bearer $key" --phases "$4" --checks "$5" --workers 1 \
        --request-timeout 60 --suppress-health-check all --generation-database none \
        --warnings off || failed=1
}
whole=not_a_server_error,status_code_conformance,content_type_conformance
whole=$whole,response_schema_conformance,ignored_auth,unsupported_method,use_after_free
judge "our document" "$address/openapi.json" "$address" coverage,fuzzing,stateful "$whole"
"$python" openai_types.py >"$data/openai.json"
answers=not_a_server_error,content_type_conformance,response_schema_conformance
judge "OpenAI's types" "$data/openai.json" "$address/v1" coverage,fuzzing "$answers"

printf '\n-- lm-eval\n'
export OPENAI_API_KEY=$key HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$data/hf TOKENIZERS_PARALLELISM=false
model=model=strand-demo,base_url=$address/v1/completions,tokenizer_backend=remote
(cd tasks && "$work/judges/bin/lm_eval" run --model local-completions --include_path . \
    --model_args "$model,tokenized_requests=True,auth_token=$key,num_concurrent=4,max_length=256" \
    --tasks strand_choice,strand_answer,strand_text --log_samples --output_path "$data/eval" \
    2>"$data/eval.log") || { failed=1 && tail -20 "$data/eval.log" >&2; }
"$python" agree.py "$program" "$address" "$key" "$data/eval" || failed=1

kill -0 "$server" || failed=1
if grep -q panicked "$data/log"; then
    grep panicked "$data/log" >&2
    failed=1
fi
exit "$failed"
