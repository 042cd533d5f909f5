"""From samples to token rows: the tokenizer, the encoding of parts, packing, batches made ahead.

Everything is a function of the seed, the step and the stage, so a run can stop and go on.
"""

import json
import multiprocessing
import os
from collections import deque

import torch

import corpus

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
            " + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
VARIANTS = {"mixed": dict(independent=0.5), "full": dict(independent=0.0),
            "mixed-sink": dict(independent=0.5, sink=True)}


def write_json(path, value):
    with open(path, "w") as f:
        f.write(json.dumps(value, indent=1) + "\n")


def make_tokenizer(folder, vocab, sink):
    """Byte-level BPE over the corpus, single digits, special tokens last; returns their ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    os.makedirs(folder, exist_ok=True)
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    samples = (corpus.Generator(f"tokenizer-{i}", chunks=(1, 3)).sample() for i in range(8000))
    texts = ("".join(p[0] for p in sample) for sample in samples)
    texts = (t.replace("<|im_start|>", "").replace("<|im_end|>", "") for t in texts)
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tok.add_special_tokens(SPECIAL)
    tok.save(folder + "/tokenizer.json")
    ids = [tok.token_to_id(s) for s in SPECIAL]
    added = {str(i): dict(content=s, special=True, lstrip=False, rstrip=False, single_word=False,
                          normalized=False) for i, s in zip(ids, SPECIAL)}
    write_json(folder + "/tokenizer_config.json", dict(
        tokenizer_class="Qwen2Tokenizer", eos_token=SPECIAL[2], pad_token=SPECIAL[0],
        unk_token=None, bos_token=SPECIAL[0] if sink else None, add_prefix_space=False,
        add_bos_token=False, clean_up_tokenization_spaces=False, model_max_length=4096,
        chat_template=("{{ '" + SPECIAL[0] + "' }}" if sink else "") + TEMPLATE, errors="replace",
        split_special_tokens=False, added_tokens_decoder=added))
    write_json(folder + "/generation_config.json", dict(
        eos_token_id=[ids[2], ids[0]], pad_token_id=ids[0], do_sample=False))
    return ids


def encode(tok, parts, dice):
    """A sample -> int tensor (4, tokens): id, block, sees, loss weight in percent of the token as a
    target. The first answer token decides between answering and not knowing and weighs more; of
    the other text a quarter is learnt, lightly."""
    columns = []
    for (_, block, sees, weight), e in zip(parts, tok.encode_batch(
            [p[0] for p in parts], add_special_tokens=False)):
        a = torch.empty(4, len(e.ids), dtype=torch.int32)
        a[0], a[1], a[2] = torch.tensor(e.ids), block, sees
        a[3] = 100 if weight else 0
        if weight:
            a[3, 0] = 400
        else:
            a[3] = torch.tensor([20 * (dice.random() < 0.25) for _ in e.ids])
        columns.append(a)
    return torch.cat(columns, 1)


_tokenizer = None


def make_batch(folder, seed, index, stage, variant):
    """Packed rows (5, rows, T): id, sample (0: padding), block, sees, weight; best fit first."""
    global _tokenizer
    from tokenizers import Tokenizer
    torch.set_num_threads(1)
    _tokenizer = _tokenizer or Tokenizer.from_file(folder + "/tokenizer.json")
    _, batch, t, chunks, facts, drill, mix = stage
    out, pool, n = torch.zeros(5, batch // t, t, dtype=torch.int32), [], 0
    for row in range(batch // t):
        at = sample = 0
        while t - at > 24:
            while len(pool) < 16:
                g = corpus.Generator(f"{seed}-{index}-{n}", facts, chunks, drill, mix,
                                     **VARIANTS[variant])
                pool.append(encode(_tokenizer, g.sample(), g.dice))
                n += 1
            fits = [k for k, s in enumerate(pool) if s.shape[1] <= t - at]
            if not fits and at:
                break
            s = pool.pop(max(fits, key=lambda k: pool[k].shape[1]) if fits else 0)[:, :t - at]
            m, sample = s.shape[1], sample + 1
            place = out[:, row, at:at + m]
            place[0], place[1], place[2:] = s[0], sample, s[1:]
            at += m
    return out.numpy()


def batches(a, plan, first):
    """Batches of the plan's steps from `first` on, made ahead by worker processes."""
    with multiprocessing.get_context("spawn").Pool(a.workers) as pool:
        queue = deque()
        for index in range(first, len(plan)):
            queue.append(pool.apply_async(
                make_batch, (a.out, a.seed, index, plan[index][0], a.variant)))
            if len(queue) > 2 * a.workers + 1:
                yield torch.from_numpy(queue.popleft().get())
        for made in queue:
            yield torch.from_numpy(made.get())
