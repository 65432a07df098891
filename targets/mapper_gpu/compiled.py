"""Iterations of in-flight batching on kernels of mapper's own: `mapper_gpu.model` asked at points of a grid.

A step's kernels are chosen by dynamic programming for its shape, which takes milliseconds; a served
workload asks for thousands of mixtures. So the time of everything but attention is a function of the number
of tokens, interpolated between counts of a geometric grid; that of decoding attention one of batch and
context, likewise; and that of prefill attention goes with the pairs of tokens that see each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, repeat

from mapper.errors import CapacityError, LoweringError, UsageError
from mapper.serving.phases import Deployment, Iteration
from mapper.zoo.config import Latent
from mapper_gpu.degrees import Degrees
from mapper_gpu.hardware import BITS, Gpu
from mapper_gpu.model import KernelTime, room_for, step_time
from mapper_gpu.shape import LayerShape, Mixture, ModelShape, Precision
from mapper_gpu.shape import Work as Step
from mapper_gpu.work import Attention, Experts, Matrix, Norm, Work

TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CONTEXTS = (64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PROMPTS = (16, 64, 256, 1024, 4096, 8192)


def shape_of(name: str, work: Work) -> ModelShape:
    """The shape whose layers have the items of `work`. Which attention goes with which MLP does not matter
    to a step's time. Raises LoweringError where layers are not one attention and one MLP each."""
    attentions = [i for i, n in work.items if isinstance(i, Attention) for _ in range(n)]
    ups = [(i, n) for i, n in work.items if isinstance(i, Matrix) and i.role == "mlp" and i.split == "column"]
    downs = [i.k for i, _ in work.items if isinstance(i, Matrix) and i.role == "mlp" and i.split == "row"]
    if not attentions or len({(a.heads, a.kv_heads, a.dim, a.rank) for a in attentions}) != 1:
        raise LoweringError(f"{name}: attentions of different shapes are not timed")
    gated = all(i.n in {2 * d for d in downs} for i, _ in ups) if ups else True
    width = 2 if gated else 1
    mlps: list[tuple[int, Mixture | None]] = []
    for place, (e, n) in enumerate(work.items):
        if isinstance(e, Experts):
            shared = _beside(work, place, ups)
            ups = [up for up in ups if up != shared]
            mlps += [(0, Mixture(e.count, e.chosen, e.inner, shared[0].n // width if shared else 0))] * n
    mlps += list(chain.from_iterable(repeat((u.n // width, None), m) for u, m in ups))
    if len(mlps) != len(attentions):
        raise LoweringError(f"{name}: {len(attentions)} attentions and {len(mlps)} MLPs do not make layers")
    layers = [LayerShape(inner, a.window, mix) for a, (inner, mix) in zip(attentions, mlps, strict=True)]
    a = attentions[0]
    norms = {i.width for i, _ in work.items if isinstance(i, Norm)}
    return ModelShape(
        name, work.hidden, a.heads, a.heads if a.rank else a.kv_heads, a.dim, work.vocabulary,
        tuple(sorted(layers, key=str)), gated, a.dim in norms, _latent(a, work),
    )  # fmt: skip


def _beside(work: Work, place: int, ups: Sequence[tuple[Matrix, int]]) -> tuple[Matrix, int] | None:
    """The shared expert of the routed ones at `place`: the nearest MLP of as many layers, one behind them
    first."""
    near = [*work.items[place:], *work.items[:place][::-1]]
    return next((up for item in near for up in ups if up == item and up[1] == work.items[place][1]), None)


def _latent(a: Attention, work: Work) -> Latent | None:
    if not a.rank:
        return None
    ranks = [
        i.n for i, _ in work.items if isinstance(i, Matrix) and i.split == "none" and i.role == "attention"
    ]
    query = next((n for n in ranks if n != a.rank + a.rope), 0)
    return Latent(query, a.rank, a.dim - a.rope, a.rope, a.value_dim)


@dataclass(frozen=True)
class CompiledPhases:
    """A model on mapper's own kernels; see `mapper.serving.phases.Phases`."""

    shape: ModelShape
    chip: Gpu
    deployment: Deployment
    _known: dict[tuple[int, int, int], tuple[KernelTime, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        d = self.deployment
        if d.expert_weights not in (None, d.weights):
            raise UsageError(
                "compiled kernels hold one weight format; name a --stack to serve experts in another"
            )
        for name in (self.precision.weights, self.precision.cache):
            if name not in BITS:
                raise UsageError(f"unknown format {name[:40]!r}; known: {', '.join(BITS)}")
        if min(d.chips, d.experts, d.replicas) < 1 or d.chips % d.replicas or d.chips % d.experts:
            raise UsageError(f"{d.chips} chips are not whole groups of {d.experts} and {d.replicas}")
        if self.capacity < 1:
            raise CapacityError(f"the weights leave no room for a cache on {d.chips} x {self.chip.name}")

    @property
    def precision(self) -> Precision:
        """Formats of weights and cache."""
        return Precision(self.deployment.weights or "bf16", self.deployment.cache or "bf16")

    @property
    def parallel(self) -> Degrees:
        """Degrees of parallelism."""
        d = self.deployment
        return Degrees(tensor=d.chips // d.replicas, data=d.replicas, expert=d.experts)

    @cached_property
    def capacity(self) -> int:
        """Tokens of cache beside the weights, of all replicas."""
        return room_for(self.shape, self.chip, self.precision, self.parallel, 1) * self.deployment.replicas

    def seconds(self, iteration: Iteration) -> float:
        """Time of one iteration."""
        i, share = iteration, self.deployment.replicas
        tokens = (i.decode * i.width + i.prefill) / share
        total = self.chip.step + between(self._rest, TOKENS, tokens)
        if i.decode:
            total += between(lambda b: self._attend(b, i.context + i.width), BATCHES, i.decode / share) * (
                1.0 if i.width == 1 else self._wider(i.width)
            )
        if i.prefill:
            total += i.prefill / share * i.seen * self._pair(max(1, i.prefill // max(i.prompts, 1)))
        return total

    def _wider(self, width: int) -> float:
        """How much longer attention of `width` new tokens takes than that of one: what is beyond reading the
        cache once."""
        one, more = (self._kernels(8, w, 1024) for w in (1, width))
        return attention(more) / attention(one)

    def _rest(self, tokens: int) -> float:
        return sum(k.total for k in self._kernels(tokens, 1, 1) if k.kind != "attention")

    def _attend(self, batch: int, context: float) -> float:
        return between(lambda c: self._attend_at(batch, c), CONTEXTS, context)

    def _attend_at(self, batch: int, context: int) -> float:
        return attention(self._kernels(batch, 1, context))

    def _pair(self, prompt: int) -> float:
        """Seconds of attention per pair of a token and one that it sees, in prompts of `prompt` tokens."""
        return self._pair_at(min(PROMPTS, key=lambda p: abs(p - prompt)))

    def _pair_at(self, prompt: int) -> float:
        return attention(self._kernels(1, prompt, prompt)) / (prompt * (prompt + 1) / 2)

    def _kernels(self, batch: int, tokens: int, length: int) -> tuple[KernelTime, ...]:
        key = (batch, tokens, length)
        if key not in self._known:
            step = Step(batch, tokens, max(length - tokens, 0), max(length, tokens))
            found = step_time(self.shape, self.chip, step, self.precision, self.parallel, overhead=False)
            self._known[key] = found.kernels
        return self._known[key]


def attention(kernels: Sequence[KernelTime]) -> float:
    """Seconds of the attention kernels among `kernels`."""
    return sum(k.total for k in kernels if k.kind == "attention")


def between(of: Callable[[int], float], grid: Sequence[int], at: float) -> float:
    """`of` at `at`, linear between the two points of `grid` around it; beyond its ends on the last line."""
    high = min(max(bisect_right(grid, at), 1), len(grid) - 1)
    low = high - 1
    if at == grid[low]:
        return of(grid[low])
    if at <= grid[0]:
        return of(grid[0])
    a, b = of(grid[low]), of(grid[high])
    return a + (b - a) * (at - grid[low]) / (grid[high] - grid[low])
