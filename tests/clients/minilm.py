"""The vectors that /v1/embeddings gives against those of sentence-transformers.

    minilm.py ADDRESS KEY FOLDER
"""

import base64
import json
import sys
import urllib.request

import numpy
from sentence_transformers import SentenceTransformer

LEAST = 0.9999
TEXTS = [
    "a",
    "The door of the harbour house is green.",
    "Anna lives in Lisbon, and her boat is called Aurora.",
    "THE SAME IN CAPITALS, WHICH THIS MODEL DOES NOT TELL APART.",
    "the same in capitals, which this model does not tell apart.",
    "Größe, naïve, Ångström, façade",
    "東京は日本の首都です。",
    "Привет, как дела?",
    "🙂 👍🏽 🇵🇹",
    "def f(x):\n    return x ** 2  # a comment",
    "https://example.org/a?b=c&d=%20#e",
    "  blanks   and\ttabs \n and lines  ",
    "[CLS] special tokens [SEP] in a text [MASK]",
    "internationalization " * 20,
    "word " * 240,
]


def asked(address, key, body):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(address + "/v1/embeddings", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def main():
    address, key, folder = sys.argv[1:]
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, normalize_embeddings=True)
    expected = expected.astype(numpy.float64)
    body = {"model": "all-MiniLM-L6-v2", "input": TEXTS}
    together = asked(address, key, body)
    assert together["model"] == "all-MiniLM-L6-v2", together["model"]
    ways = {
        "together": [entry["embedding"] for entry in together["data"]],
        "alone": [asked(address, key, {"input": text})["data"][0]["embedding"] for text in TEXTS],
        "base64": [
            numpy.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
            for entry in asked(address, key, body | {"encoding_format": "base64"})["data"]
        ],
    }
    worst = 1.0
    for way, vectors in ways.items():
        vectors = numpy.array(vectors, dtype=numpy.float64)
        assert vectors.shape == expected.shape == (len(TEXTS), 384), (way, vectors.shape)
        lengths = numpy.linalg.norm(vectors, axis=1)
        assert abs(lengths - 1).max() < 1e-5, (way, lengths)
        cosines = (vectors * expected).sum(axis=1) / lengths
        worst = min(worst, cosines.min())
        print(f"{way}: {len(TEXTS)} texts, least cosine {cosines.min():.9f}, "
              f"largest difference {abs(vectors - expected).max():.2e}")
    if worst <= LEAST:
        sys.exit(f"a cosine of {worst} is not above {LEAST}")


main()
