"""Speculative decoding: a draft of `draft` tokens per step, of which a prefix is kept.

Each drafted token is accepted with probability `acceptance`, independently; a step then yields
(1 - a^(n+1)) / (1 - a) tokens on average, the one that the model itself adds included (Leviathan et al.,
"Fast Inference from Transformers via Speculative Decoding", equation 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from mapper.errors import UsageError


@dataclass(frozen=True)
class Speculation:
    """`draft` tokens are guessed per step and verified at once, in one iteration `draft` + 1 tokens wide.

    Making the draft takes `step` seconds per drafted token and `step_each` more for each sequence of the
    batch.
    """

    draft: int = 0
    acceptance: float = 0.0
    step: float = 0.0
    step_each: float = 0.0

    def __post_init__(self) -> None:
        if self.draft < 0 or not 0.0 <= self.acceptance <= 1.0:
            raise UsageError(
                f"speculation takes a draft length >= 0 and an acceptance in 0..1, not {self.draft} and "
                f"{self.acceptance}"
            )

    @property
    def gain(self) -> float:
        """Mean number of tokens that one step yields per sequence, 1 .. draft + 1."""
        if self.acceptance == 1.0:
            return self.draft + 1.0
        return float((1.0 - self.acceptance ** (self.draft + 1)) / (1.0 - self.acceptance))

    def seconds(self, batch: int) -> float:
        """Time of making one step's drafts for `batch` sequences."""
        return self.draft * (self.step + self.step_each * batch)


NONE = Speculation()
