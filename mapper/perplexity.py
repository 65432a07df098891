"""What a weight format costs: the error of the weights, and the perplexity of the model on a text.

Both are measured: the weights are quantised, and the host target's prefill program runs over the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mapper import backend as targets
from mapper import driver, execution
from mapper.errors import ModelError, UsageError
from mapper.tokens import Tokens

if TYPE_CHECKING:
    from mapper.ir.graph import Graph
    from mapper.ir.weights import WeightSymbol
    from mapper.runtime.execute import Session

Array = npt.NDArray[Any]
Advance = Callable[[], None]
ORIGINAL = "original"
ALL = "all"
TEXT = "heldout.txt"
BEGINNINGS = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "<|im_start|>")
"""What a text begins with, where the tokenizer knows one of these."""


@dataclass(frozen=True)
class Cost:
    """One weight format of one model.

    `bytes` and `bits_per_weight` are of the products' weights alone, scales and zeros included.
    `weight_error` is the root of the summed squared differences over the summed squares, `worst_error` the
    largest one of a single tensor. `perplexity` is exp of the mean negative log-likelihood per scored token.
    """

    format: str
    bytes: int
    bits_per_weight: float
    weight_error: float
    worst_error: float
    worst_weight: str
    perplexity: float
    bits_per_character: float


@dataclass(frozen=True)
class Text:
    """Token ids of a text: `ids` [N + 1], of which all but the first are scored."""

    name: str
    ids: Array
    characters: int

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return len(self.ids) - 1


def text_of(model: Path, file: Path | None, tokens: int | None = None) -> Text:
    """The text in `file`, or heldout.txt beside the model, by the tokenizer beside the model; its first
    `tokens` tokens where that is given. A text of no known beginning begins with its first token, unscored.

    Raises UsageError, ModelError.
    """
    path = file if file is not None else model.parent / TEXT
    if not path.is_file():
        raise UsageError(f"there is no text {path}; give one with --text")
    words = Tokens.beside(model)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    begin = [words.tokenizer.token_to_id(name) for name in BEGINNINGS]
    first = [number for number in begin if number is not None][:1]
    ids = np.array([*first, *words.encode(text)], np.int64)
    if tokens is not None and tokens + 1 < len(ids):
        ids = ids[: tokens + 1]
        text = words.text([int(i) for i in ids[len(first) :]])
    if len(ids) < 2:
        raise UsageError(f"{path} has no token to predict")
    return Text(str(path), ids, len(text))


def formats_of(asked: str) -> list[str]:
    """The formats that `all`, or a list separated by commas, names. Raises UsageError."""
    host = targets.load(execution.HOST)
    if asked == ALL:
        return list(host.formats)
    found = [targets.weight_format(host, name.strip()) for name in asked.split(",")]
    return [name for name in found if name is not None]


def costs(
    model: Path,
    formats: Sequence[str],
    text: Text,
    window: int = 256,
    external_root: str | Path | None = None,
    advance: Advance | None = None,
) -> Iterator[Cost]:
    """The costs of the model as it is, then in each format; `advance` is called after each window.

    A window holds `window` tokens and moves by half of that. Raises UsageError, and MapperError as
    `mapper.compile` does.
    """
    if window < 2:
        raise UsageError(f"window must be at least 2, not {window}")
    graph = driver.load(model, external_root)
    for name in (ORIGINAL, *formats):
        held = None if name == ORIGINAL else name
        done = driver.build(
            graph, execution.HOST, context=window, prompt=window, weights=held, phase="prefill"
        )
        done.report.raise_first()
        session = execution.session(done.schedule, model, external_root)
        loss = negative_log_likelihood(session, text.ids, window, advance)
        formatted = execution.in_format(graph, targets.load(execution.HOST), held)
        yield Cost(
            name,
            *weight_errors(formatted),
            perplexity=math.exp(loss / text.tokens),
            bits_per_character=loss / math.log(2) / text.characters,
        )


def windows(tokens: int, window: int) -> list[tuple[int, int, int]]:
    """(first, stop, first scored) inputs of each window: all tokens are scored once, all but those of the
    first window after more than window / 2 others."""
    found: list[tuple[int, int, int]] = []
    scored = 0
    while scored < tokens:
        begin = max(0, scored + window // 2 - window)
        stop = min(begin + window, tokens)
        found.append((begin, stop, scored))
        scored = stop
    return found


def negative_log_likelihood(
    session: Session, ids: Array, window: int, advance: Advance | None = None
) -> float:
    """Nats that a prefill program of `window` tokens spends on all `ids` but the first."""
    vocabulary = next(p.shape[-1] for p in session.schedule.ports if p.name == "logits")
    if not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ModelError(f"the tokenizer gives ids up to {ids.max()}; the model has {vocabulary} tokens")
    total = 0.0
    for begin, stop, scored in windows(len(ids) - 1, window):
        fed = np.zeros((1, window), np.int64)  # what follows the text does not reach back
        fed[0, : stop - begin] = ids[begin:stop]
        logits = session.run("prefill", {"input_ids": fed, "past_length": np.array(0)})["logits"][0]
        rows = logits[scored - begin : stop - begin].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        chosen = rows[np.arange(len(rows)), ids[scored + 1 : stop + 1]]
        total += float((np.log(np.exp(rows).sum(-1)) - chosen).sum())
        if advance is not None:
            advance()
    return total


def weight_errors(graph: Graph) -> tuple[int, float, float, float, str]:
    """(bytes, bits per weight, error, worst tensor's error, its name) of a graph's products' weights."""
    size = elements = 0
    error = power = worst = 0.0
    name = ""
    for symbol in product_weights(graph):
        size, elements = size + symbol.bytes, elements + symbol.elements
        if symbol.root is symbol:
            continue
        off, squares = _difference(symbol)
        error, power = error + off, power + squares
        relative = math.sqrt(off / squares) if squares else 0.0
        if relative > worst:
            worst, name = relative, symbol.root.name
    return size, 8 * size / max(elements, 1), math.sqrt(error / power) if power else 0.0, worst, name


def product_weights(graph: Graph) -> list[WeightSymbol]:
    """The weights that matrix products name, each once, by name."""
    from mapper.passes.quantise import PRODUCTS

    names = {
        name
        for section in graph.sections()
        for op in section.ops
        for attribute, slot in op.weights().items()
        if attribute in PRODUCTS.get(op.mnemonic, {})
        for name in section.table.get(slot, (slot,))
    }
    return [graph.weights[name] for name in sorted(names)]


def _difference(symbol: WeightSymbol) -> tuple[float, float]:
    """Summed squares of what a format changes in a weight, and of the weight. A weight that the model stores
    packed has no other values."""
    made = symbol.derivation or (symbol.packing and symbol.packing.values.derivation)
    if not made:
        return 0.0, 0.0
    source = made.source.load()
    source = source.swapaxes(-1, -2) if made.transposed else source
    wanted, got = source.astype(np.float64), symbol.load().astype(np.float64)
    return float(((got - wanted) ** 2).sum()), float((wanted**2).sum())


def record(model: Path, text: Text, window: int, found: Sequence[Cost]) -> dict[str, Any]:
    """The stable JSON of `mapper quantise --json`."""
    return {
        "model": str(model),
        "text": text.name,
        "tokens": text.tokens,
        "characters": text.characters,
        "window": window,
        "formats": [asdict(cost) for cost in found],
    }


def steps(text: Text, window: int, formats: Sequence[str]) -> int:
    """How often `costs` calls `advance`."""
    return (1 + len(formats)) * len(windows(text.tokens, window))
