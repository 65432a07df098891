"""Iterations of in-flight batching on GPU-like machines: the model's work, kernel by kernel, plus collectives
and the serving software's host time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from mapper.errors import CapacityError, UsageError
from mapper.serving.phases import Deployment, Iteration
from mapper_gpu import kernels
from mapper_gpu.collectives import all_reduce, gather
from mapper_gpu.rates import BITS, Rates
from mapper_gpu.stacks import Host
from mapper_gpu.work import Attention, Experts, Matrix, Norm, Work

TIGHT = 0.8
"""Share of the usual memory beyond which weights make a deployment give up some of its reserve."""


@dataclass(frozen=True)
class Parts:
    """Seconds of one iteration by what they are spent on."""

    products: float
    experts: float
    attention: float
    vectors: float
    collectives: float
    host: float

    @property
    def seconds(self) -> float:
        """All of it: kernels of one stream follow each other."""
        return self.products + self.experts + self.attention + self.vectors + self.collectives + self.host


@dataclass(frozen=True)
class GpuPhases:
    """`work` deployed on chips of `rates`; see `mapper.serving.phases.Phases`."""

    work: Work
    rates: Rates
    deployment: Deployment
    host: Host
    _known: dict[tuple[int, int], Parts] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        d = self.deployment
        if min(d.chips, d.experts, d.replicas) < 1 or d.chips % d.replicas or d.chips % d.experts:
            raise UsageError(f"{d.chips} chips are not whole groups of {d.experts} and {d.replicas}")
        for name in (self.weights, self.expert_weights, self.cache):
            if name not in BITS:
                raise UsageError(f"unknown format {name[:40]!r}; known: {', '.join(BITS)}")
        if self.capacity < 1:
            raise CapacityError(
                f"weights of {self.weight_bytes / 1e9:.1f} GB per chip leave no room for a cache in "
                f"{self.rates.memory * self.rates.most / 1e9:.1f} GB"
            )

    @property
    def weights(self) -> str:
        """Format of matrices; the head stays in bf16."""
        return self.deployment.weights or "bf16"

    @property
    def expert_weights(self) -> str:
        """Format of routed experts."""
        return self.deployment.expert_weights or self.weights

    @property
    def cache(self) -> str:
        """Format of the cache."""
        return self.deployment.cache or "bf16"

    @property
    def group(self) -> int:
        """Chips that share one sequence's attention."""
        return self.deployment.chips // self.deployment.replicas

    def _share(self, matrix: Matrix) -> tuple[float, float]:
        """[k, n] of a matrix on one chip."""
        chips = self.group if matrix.role == "attention" else self.deployment.chips
        if matrix.split == "none":
            return matrix.k, matrix.n
        return (matrix.k, matrix.n / chips) if matrix.split == "column" else (matrix.k / chips, matrix.n)

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of weights per chip; the embedding is shared out like the head."""
        total = self.work.embedding * 2 / self.deployment.chips
        for item, count in self.work.items:
            if isinstance(item, Matrix):
                k, n = self._share(item)
                total += count * k * n * BITS[self._format(item)] / 8
            elif isinstance(item, Experts):
                size = item.count * (item.k * item.n + item.inner * item.k) / self.deployment.chips
                total += count * size * BITS[self.expert_weights] / 8
            elif isinstance(item, Attention) and item.rank:
                total += (
                    count * item.rank * item.heads * (item.dim - item.rope + item.value_dim) / self.group * 2
                )
        return total

    def _format(self, matrix: Matrix) -> str:
        return "bf16" if matrix.role in ("head", "router") else self.weights

    @property
    def _roomy(self) -> bool:
        """Whether the weights leave a fair part to the cache; where not, less is held in reserve."""
        return self.weight_bytes < TIGHT * self.rates.memory * self.rates.usable

    @cached_property
    def capacity(self) -> int:
        """Tokens of cache that fit beside the weights: each replica's own, all layers at full length."""
        share = self.rates.usable if self._roomy else self.rates.most
        free = self.rates.memory * share - self.weight_bytes
        row = sum(
            count * item.row / min(self.group, item.kv_heads)
            for item, count in self.work.items
            if isinstance(item, Attention)
        )
        return int(max(0.0, free) / (row * BITS[self.cache] / 8) * self.deployment.replicas)

    def seconds(self, iteration: Iteration) -> float:
        """Time of one iteration."""
        return self.parts(iteration).seconds

    def parts(self, iteration: Iteration) -> Parts:
        """Time of one iteration by what it is spent on."""
        tokens = iteration.decode * iteration.width + iteration.prefill
        key = (tokens, iteration.decode * iteration.width + iteration.prompts)
        if key not in self._known:  # what does not hang on the context recurs from step to step
            self._known[key] = self._without_attention(*key)
        rest = self._known[key]
        attention = sum(
            count * self._attention(item, iteration)
            for item, count in self.work.items
            if isinstance(item, Attention)
        )
        host = self.host.iteration + self.host.sequence * (iteration.decode + iteration.prompts)
        return replace(rest, attention=attention, host=host)

    def _without_attention(self, tokens: int, logits: int) -> Parts:
        own = tokens / self.deployment.replicas
        products = experts = vectors = 0.0
        for item, count in self.work.items:
            if isinstance(item, Matrix):
                products += count * self._product(item, tokens, own, logits)
            elif isinstance(item, Experts):
                experts += count * self._experts(item, tokens)
            elif isinstance(item, Norm):
                vectors += count * self._norm(item, own)
        return Parts(products, experts, 0.0, vectors, self._collectives(tokens, own), 0.0)

    def _product(self, item: Matrix, tokens: float, own: float, logits: int) -> float:
        k, n = self._share(item)
        rows = {"head": logits, "attention": own}.get(item.role, tokens)
        form = self._format(item)
        seconds = kernels.product(self.rates, rows, k, n, form)
        if item.role == "mlp" and item.split == "column":
            seconds += kernels.vector(self.rates, rows * n)
        return seconds

    def _experts(self, item: Experts, tokens: float) -> float:
        whole = self.deployment.experts
        slices = self.deployment.chips // whole
        return kernels.experts(
            self.rates, tokens / whole, item.chosen, item.count / whole, item.k, item.n / slices,
            item.inner / slices, self.expert_weights,
        )  # fmt: skip

    def _attention(self, item: Attention, i: Iteration) -> float:
        seen = i.seen if not item.window else min(i.seen, item.window)
        context = i.context + i.width
        context = context if not item.window else min(context, item.window)
        decode, prefill = i.decode / self.deployment.replicas, i.prefill / self.deployment.replicas
        heads = item.heads / self.group
        row = item.row / min(self.group, item.kv_heads) * BITS[self.cache] / 8
        if item.rank:
            pair = 2 * heads * (2 * item.rank + item.rope)
            absorbed = item.rank * heads * (item.dim - item.rope + item.value_dim)
            seconds = kernels.product(self.rates, decode + prefill, item.rank, absorbed / item.rank, "bf16")
        else:
            pair, seconds = 2 * heads * (item.dim + item.value_dim), 0.0
        seconds += kernels.decode_attention(self.rates, decode, context, row, pair * i.width)
        seconds += kernels.prefill_attention(
            self.rates, prefill, seen, 2 * heads * (item.dim + item.value_dim)
        )
        return seconds + kernels.vector(self.rates, (decode * i.width + prefill) * heads * item.dim)

    def _norm(self, item: Norm, own: float) -> float:
        """Norms of the residual stream ride along with the all-reduce before them, where there is one; of
        those of queries and of keys or latent rows, one kernel does both."""
        if item.width != self.work.hidden:
            return kernels.vector(self.rates, own * item.width) / 2
        return 0.0 if self.group > 1 else kernels.vector(self.rates, own * item.width)

    def _collectives(self, tokens: float, own: float) -> float:
        chips = self.deployment.chips
        if chips == 1:
            return 0.0
        fabric, width = self.rates.fabric, self.work.hidden * kernels.WIDE
        layers = sum(count for item, count in self.work.items if isinstance(item, Attention))
        if self.group == chips:
            return layers * 2 * all_reduce(tokens * width, chips, fabric)
        inside = all_reduce(own * width, self.group, fabric) if self.group > 1 else 0.0
        around = 2 * gather(tokens * width, chips, fabric.latency, fabric.bandwidth, fabric.switched)
        return layers * (inside + around)
