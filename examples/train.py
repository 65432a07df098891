"""Train, evaluate and export the example model: a 3.5-million-parameter Llama on public-domain English.

Typical use, from the repository's root::

    python examples/train.py fit       # download the text, train the tokenizer and the model
    python examples/train.py export    # write the two ONNX graphs and their shared weights
    python examples/train.py eval      # bits per character of the exported model and of a 5-gram model

The text is that of Debian's packages bible-kjv-text 4.38 (King James Version) and r-cran-janeaustenr 1.0.0-1
(Jane Austen's novels), all of it in the public domain; corpus.py says under which licences, and what is held
out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import corpus
import ngram
import numpy as np
import torch
import torch.nn.functional as F
from model import AttentionStyle, Config, TinyLlama
from runner import Runner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
CHECKPOINT = CACHE / "checkpoint.pt"
TOKENIZER = HERE / "tokenizer.json"
HELD_OUT = HERE / "heldout.txt"
FIGURES = HERE / "training.json"

SEED = 1611
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256
STRIDE = 128
BATCH = 8
PEAK_LR = 2e-3
FINAL_LR = 1e-4
WARMUP = 100


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and move it in place, so that nobody reads half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer learned from the training documents only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=Config().vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


class Windows:
    """Training windows: every epoch cuts the text anew, at a shifted offset and in another order."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.per_epoch = (len(tokens) - CONTEXT - 1) // CONTEXT // BATCH

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, a function of the step alone so that training can be resumed."""
        epoch, index = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(SEED + epoch)
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        order = torch.randperm(self.per_epoch * BATCH, generator=generator)
        starts = offset + CONTEXT * order[index * BATCH : (index + 1) * BATCH]
        rows = self.tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to the final rate."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def save(path: Path, model: TinyLlama, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save a checkpoint from which training and the export can go on."""
    temporary = path.with_name(f".{path.name}.partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    os.replace(temporary, path)


def load_model(path: Path, style: AttentionStyle = "sdpa") -> TinyLlama:
    """The model of a checkpoint, ready for inference."""
    model = TinyLlama(style=style)
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model.eval()


def fit(steps: int, threads: int, cache: Path, checkpoint: Path, resume: bool) -> None:
    """Train the tokenizer and the model, and write the checkpoint and the figures of the training."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    split = corpus.load(cache)
    write_text(HELD_OUT, split.held_out_text)
    tokenizer = train_tokenizer([document.text for document in split.train])
    write_text(TOKENIZER, tokenizer.to_str())
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch([document.text for document in split.train])
    tokens = torch.tensor([token for encoding in encodings for token in (end, *encoding.ids)])
    windows = Windows(tokens)
    model = TinyLlama()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {len(split.train_text)} characters, {len(tokens)} tokens", flush=True)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    first = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started, running = time.monotonic(), 0.0
    for step in range(first, steps):
        inputs, targets = windows.batch(step)
        loss = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        value = loss.item()
        running = value if step == first else 0.95 * running + 0.05 * value
        if (step + 1) % 20 == 0:
            rate = (step + 1 - first) * BATCH * CONTEXT / (time.monotonic() - started)
            print(f"step {step + 1}/{steps}  loss {running:.3f}  {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save(checkpoint, model, optimizer, step + 1)
    update_figures(
        parameters=parameters,
        config=asdict(Config()),
        seed=SEED,
        steps=steps,
        tokens_per_step=BATCH * CONTEXT,
        tokens_trained=steps * BATCH * CONTEXT,
        train_tokens=len(tokens),
        train_characters=len(split.train_text),
        final_training_loss_nats_per_token=round(running, 4),
    )


def update_figures(**figures: object) -> None:
    """Merge figures into training.json."""
    old = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    write_text(FIGURES, json.dumps({**old, **figures}, indent=2) + "\n")


def bits_of_graph(graph: Path, tokenizer: Tokenizer, text: str, threads: int) -> float:
    """Bits that an exported graph spends on a text, by a sliding window.

    A window covers ``CONTEXT`` tokens and moves on by ``STRIDE``.  Each token is scored once: the text's
    first ones from the few tokens before them, all others from more than ``CONTEXT - STRIDE`` tokens, none
    from more than ``CONTEXT``.  The first token follows the end-of-text token, which is not scored.
    """
    runner = Runner(graph, threads)
    ids = np.array([tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(text).ids], np.int64)
    inputs, targets = ids[:-1], ids[1:]
    bits, scored = 0.0, 0
    while scored < len(targets):
        begin = max(0, scored + STRIDE - CONTEXT)
        window = slice(begin, begin + CONTEXT)
        runner.reset(1)
        logits = runner.step(inputs[None, window])[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = targets[window]
        log_probabilities = logits[np.arange(len(chosen)), chosen] - np.log(np.exp(logits).sum(-1))
        bits -= float(log_probabilities[scored - begin :].sum()) / math.log(2)
        scored = begin + len(chosen)
    return bits


def evaluate(graphs: list[Path], cache: Path, threads: int, order: int, record: bool) -> None:
    """Print bits per character on the held-out text: the exported graphs' and a character n-gram's."""
    text = HELD_OUT.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokens = len(tokenizer.encode(text).ids)
    print(f"held-out text: {len(text)} characters, {tokens} tokens")
    model_bits = {}
    for graph in graphs:
        bits = bits_of_graph(graph, tokenizer, text, threads) / len(text)
        print(f"{graph.name}: {bits:.4f} bits/char (window {CONTEXT} tokens, stride {STRIDE})", flush=True)
        model_bits[graph.name] = round(bits, 4)
    figures: dict[str, object] = {
        "held_out_characters": len(text),
        "held_out_tokens": tokens,
        "bits_per_character": model_bits,
        "evaluation": {
            "command": "python examples/train.py eval",
            "window_tokens": CONTEXT,
            "stride_tokens": STRIDE,
        },
    }
    if order:
        try:
            train_text = corpus.load(cache).train_text
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"n-gram baseline skipped, its training text could not be fetched: {error}")
        else:
            bits = ngram.KneserNey(train_text, order).bits(text) / len(text)
            print(f"character {order}-gram, interpolated modified Kneser-Ney: {bits:.4f} bits/char")
            figures[f"bits_per_character_{order}gram"] = round(bits, 4)
    if record:
        update_figures(**figures)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where downloads go (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="checkpoint (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    fitting = commands.add_parser("fit", help="download the text, train the tokenizer and the model")
    fitting.add_argument("--steps", type=int, default=3200, help="optimiser steps (default: %(default)s)")
    fitting.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    commands.add_parser("export", help="write the ONNX graphs and their shared weights file")
    evaluating = commands.add_parser("eval", help="bits per character on the held-out text")
    evaluating.add_argument(
        "--order", type=int, default=5, help="of the n-gram, 0 for none (default: %(default)s)"
    )
    evaluating.add_argument("--record", action="store_true", help="write the figures to training.json")
    arguments = parser.parse_args()
    if arguments.command == "fit":
        fit(arguments.steps, arguments.threads, arguments.cache, arguments.checkpoint, arguments.resume)
    else:
        # Imported late: the exporter is of no use to the training.
        import export

        if arguments.command == "export":
            if os.environ.get("PYTHONHASHSEED") != "0":
                # The exporter iterates over sets of symbols: only fixed hashes always give one graph.
                os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
            export.export(load_model, arguments.checkpoint, HERE)
        else:
            graphs = [HERE / name for name in export.GRAPHS.values()]
            evaluate(graphs, arguments.cache, arguments.threads, arguments.order, arguments.record)


if __name__ == "__main__":
    main()
