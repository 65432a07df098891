"""Greedy decoding with the host target, and text in and out through the tokenizer beside the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapper.errors import ModelError, UsageError

if TYPE_CHECKING:
    from mapper.cost.estimate import Estimate
    from mapper.runtime.execute import Session
    from mapper.schedule.tables import Schedule

MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class Tokens:
    """Text <-> token ids. Without a tokenizer a token's text is its number."""

    tokenizer: Any = None

    @classmethod
    def beside(cls, model: Path) -> Tokens:
        """The tokenizer.json in the model's folder. Raises UsageError where there is none, ModelError."""
        path = model.parent / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"no tokenizer.json beside {model}; give --ids instead of --prompt")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelError(f"{path} is larger than {MAX_TOKENIZER_BYTES} bytes")
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises UsageError where there are none."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise UsageError("the prompt is empty")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`; a character whose bytes are not complete yet is left out."""
        if self.tokenizer is None:
            return "".join(f"{i} " for i in ids)
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text.rstrip("\N{REPLACEMENT CHARACTER}")


@dataclass
class Decoding:
    """An iterator over the decoded tokens; times each step as it goes."""

    session: Session
    schedule: Schedule
    prefill: Estimate
    decode: Estimate
    ids: tuple[int, ...]
    tokens: int
    prefill_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Run each program once, so that compiled kernels are in place, and clear the cache again."""
        for _ in zip(range(2), self, strict=False):
            pass
        self.session.reset()
        self.steps_s.clear()

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        began = time.perf_counter()
        logits = self.session.run("prefill", {"input_ids": np.array([self.ids]), "past_length": np.array(0)})[
            "logits"
        ]
        self.prefill_s = time.perf_counter() - began
        for past in range(len(self.ids), len(self.ids) + self.tokens):
            token = int(logits[0, -1].argmax())
            yield token
            if past + 1 == len(self.ids) + self.tokens:
                return
            began = time.perf_counter()
            step = {"input_ids": np.array([[token]]), "past_length": np.array(past)}
            logits = self.session.run("decode", step)["logits"]
            self.steps_s.append(time.perf_counter() - began)

    def record(self) -> dict[str, Any]:
        """What was measured beside what was predicted, in seconds: median of the decode steps; prefill."""
        import statistics

        measured = statistics.median(self.steps_s) if self.steps_s else None
        return {
            "machine": self.schedule.machine,
            "tokens": len(self.steps_s) + 1,
            "tokens_per_s": len(self.steps_s) / sum(self.steps_s) if self.steps_s else None,
            "decode": {"measured_s": measured, **_predicted(self.decode)},
            "prefill": {"measured_s": self.prefill_s, **_predicted(self.prefill)},
        }


def _predicted(e: Estimate) -> dict[str, float]:
    return {"predicted_s": e.time_s, "low_s": e.low_s, "high_s": e.high_s}


def stream(model: Path, ids: Sequence[int], tokens: int, external_root: str | Path | None = None) -> Decoding:
    """Compile `model` for the host, long enough for `ids` and `tokens` more, and get ready to decode.

    Raises MapperError like `mapper.compile`; UsageError for ids outside of the vocabulary.
    """
    from mapper import driver, execution

    done = driver.build(
        model, execution.HOST, context=len(ids) + tokens, prompt=len(ids), external_root=external_root
    )
    done.report.raise_first()
    vocabulary = next(p.shape[-1] for p in done.schedule.ports if p.name == "logits")
    if not all(0 <= i < vocabulary for i in ids):
        raise UsageError(f"token ids must be 0 to {vocabulary - 1}")
    phases = done.result.phases
    session = execution.session(done.schedule, model, external_root)
    decoding = Decoding(session, done.schedule, phases["prefill"], phases["decode"], tuple(ids), tokens)
    decoding.warm_up()
    return decoding
