"""Continue a prompt with an exported graph, under ONNX Runtime and with the key-value cache.

For example ``python examples/sample.py "And the king said" --tokens 120 --temperature 0.7 --seed 1``;
a temperature of 0 is greedy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from runner import Runner
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent


def sample(graph: Path, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation."""
    generator = np.random.default_rng(seed)
    ids: list[int] = tokenizer.encode(prompt).ids
    runner = Runner(graph)
    runner.reset(1)
    logits = runner.step(np.array([ids], np.int64))[0, -1].astype(np.float64)
    for _ in range(tokens):
        if temperature > 0:
            probabilities = np.exp((logits - logits.max()) / temperature)
            token = int(generator.choice(len(logits), p=probabilities / probabilities.sum()))
        else:
            token = int(logits.argmax())
        ids.append(token)
        logits = runner.step(np.array([[token]], np.int64))[0, -1].astype(np.float64)
    text: str = tokenizer.decode(ids)
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default="And the king said")
    parser.add_argument("--graph", type=Path, default=HERE / "tiny-llama-op23.onnx", help="graph to run")
    parser.add_argument("--tokens", type=int, default=120, help="tokens to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: %(default)s)")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    options = arguments.tokens, arguments.temperature, arguments.seed
    print(sample(arguments.graph, tokenizer, arguments.prompt, *options))


if __name__ == "__main__":
    main()
