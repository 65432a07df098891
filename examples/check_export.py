"""Check the exported graphs against PyTorch: prefill and cached decoding, batches, and padding.

The reference is the plainest there is: every sequence alone, without padding, mask or cache, read anew from
its first token.  Run ``python examples/check_export.py``; it fails where a difference reaches the tolerance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from export import GRAPHS, read_weights
from model import TinyLlama
from runner import Runner

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4
#: Prompt lengths of each case; the shorter prompts of a batch are padded on their left.
CASES: tuple[tuple[int, ...], ...] = ((1,), (7,), (64,), (9, 9), (5, 12), (1, 33))


def compare(graph: Path, model: TinyLlama, lengths: tuple[int, ...], steps: int = 6, seed: int = 0) -> float:
    """Largest absolute difference of the logits over a prefill and ``steps`` decoding steps."""
    generator = np.random.default_rng(seed)
    vocabulary = model.config.vocab_size
    rows = [generator.integers(0, vocabulary, length + steps) for length in lengths]
    width = max(lengths)
    prompt = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(prompt)
    for index, length in enumerate(lengths):
        prompt[index, width - length :] = rows[index][:length]
        mask[index, width - length :] = 1
    runner = Runner(graph)
    runner.reset(len(rows))
    outputs = [runner.step(prompt, mask)]
    for step in range(steps):
        token = np.array([[row[length + step]] for row, length in zip(rows, lengths, strict=True)], np.int64)
        outputs.append(runner.step(token))
    logits = np.concatenate(outputs, axis=1)
    if not np.isfinite(logits).all():
        raise AssertionError(f"{graph.name}: padding made the logits of {lengths} infinite or NaN")
    for name, cache in runner.past.items():
        if cache.shape[2] != width + steps:
            raise AssertionError(f"{graph.name}: {name} came out with length {cache.shape[2]}")
    worst = 0.0
    for index, row in enumerate(rows):
        with torch.inference_mode():
            expected = model(torch.from_numpy(row)[None])[0][0].numpy()
        worst = max(worst, float(np.abs(logits[index, width - lengths[index] :] - expected).max()))
    return worst


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=HERE, help="where the graphs are (default: %(default)s)"
    )
    folder = parser.parse_args().folder
    failed = False
    for style, name in GRAPHS.items():
        model = read_weights(folder / name, style)
        for lengths in CASES:
            worst = compare(folder / name, model, lengths)
            failed |= not worst < TOLERANCE
            print(f"{name}  prompts {lengths!s:<10}  max abs difference {worst:.2e}")
    if failed:
        raise SystemExit(f"a difference reaches {TOLERANCE}")


if __name__ == "__main__":
    main()
