"""`make demo`: the example model on LPU, GPU and this computer, compiled, executed from disk, compared.

For each target: compile, then load the schedule from its directory alone and execute it for a prompt of 16
tokens of held-out text and 32 decoded ones. The tokens must be onnxruntime's; the logits must be within 1e-3
of its largest one where the target computes in float32. The LPU multiplies in float16: its logits must be as
near to a float64 forward pass as four times what NumPy reaches with the same storage formats, and a token may
differ only where onnxruntime's first two choices are nearer to each other than that. Ends with a table;
writes demo-out/.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mapper import driver
from mapper.decode import stream
from mapper.errors import MapperError
from mapper.report.html import Entry, write
from mapper.report.numbers import seconds
from mapper.report.terminal import console, decoded, results, table
from mapper.runtime.verify import Verification

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))  # schedules name the model by the path given
MODEL = HERE / "tiny-llama-op18.onnx"
OUT = Path("demo-out")
TARGETS = ("lpu", "gpu", "host")
PROMPT, TOKENS = 16, 32


def main() -> int:
    """Run the demonstration; 0 where everything agrees."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    prompt = tokenizer.encode((HERE / "heldout.txt").read_text(encoding="utf-8")[:400]).ids[:PROMPT]
    OUT.mkdir(exist_ok=True)
    np.savez(OUT / "prompt.npz", input_ids=np.array([prompt]))
    print(f"prompt of {PROMPT} tokens: {tokenizer.decode(prompt)!r}")
    compiled, found = {}, {}
    for target in TARGETS:
        compiled[target], found[target] = demonstrate(target)
    screen = console()
    screen.print(*results([c.result for c in compiled.values()]), verified(found), sep="\n")
    entries = [Entry(c, found[t].record()) for t, c in compiled.items()]
    show_text(prompt, tokenizer)
    for target in TARGETS:
        print(f"trace of {target} (open it in https://ui.perfetto.dev): {OUT / target / 'trace.json'}")
    print(f"report: {write(entries, OUT / 'report.html')}")
    wrong = [t for t in TARGETS if not (found[t].ok and compiled[t].report.ok)]
    print(f"NOT as it should be: {', '.join(wrong)}" if wrong else "all checks hold and all results agree")
    return 1 if wrong else 0


def demonstrate(target: str) -> tuple[driver.Compiled, Verification]:
    """Compile for `target`, then execute the directory against onnxruntime."""
    began = time.perf_counter()
    compiled = driver.build(MODEL, target, prompt=PROMPT, out=OUT / target)
    compiled.report.raise_first()
    print(
        f"{target}: compiled and checked in {seconds(time.perf_counter() - began)}; executing from disk ...",
        flush=True,
    )
    began = time.perf_counter()
    found = driver.verify(OUT / target, inputs=OUT / "prompt.npz", tokens=TOKENS)
    print(f"{target}: {found.tokens} tokens executed in {seconds(time.perf_counter() - began)}", flush=True)
    return compiled, found


def show_text(prompt: list[int], tokenizer: Tokenizer) -> None:
    """Print what the model makes of the prompt on this computer, and its speed beside the prediction."""
    decoding = stream(MODEL, prompt, TOKENS)
    print(tokenizer.decode([*prompt, *decoding]))
    console().print(decoded(decoding.record()))


def verified(found: dict[str, Verification]) -> object:
    """What execution gave, a row per target."""
    numbers = ("tokens", "equal", "excused", "max error", "relative", "steps executed")
    made = table(
        f"executed from disk, against {found[TARGETS[0]].oracle}",
        "target",
        *numbers,
        "agrees",
        "rule",
        right=numbers,
    )
    for target, v in found.items():
        counts = v.tokens, v.tokens - v.tokens_differing, v.tokens_excused
        errors = f"{v.max_abs_err:.2g}", f"{v.max_rel_err:.2g}"
        agrees = "yes" if v.ok else f"no: {v.reason}"
        made.add_row(target, *map(str, counts), *errors, f"{v.steps_executed:,}", agrees, v.rule)
    return made


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MapperError as error:
        sys.exit(f"demo: {type(error).__name__}: {error}")
