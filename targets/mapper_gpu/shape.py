"""A model's shape as sections of nodes, without a graph or weights: what `step_time` takes for a sweep.

The same nodes come out of a serving graph by `extract`; here they are written from a configuration's
numbers. One chip's part of them: heads, columns and experts are divided by the degrees of parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mapper.errors import UsageError
from mapper_gpu.degrees import Degrees
from mapper_gpu.hardware import COMPUTE, element_bytes
from mapper_gpu.nodes import Matrix, Node, Section, Value
from mapper_gpu.shape_experts import divide, write_experts

if TYPE_CHECKING:
    from mapper.zoo.config import Config, Latent, Layer


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: `count` experts of inner width `inner`, `chosen` per token; a shared one
    besides of width `shared` (0: none)."""

    count: int
    chosen: int
    inner: int
    shared: int = 0


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer: attention window (0: all), inner width of its MLP or its experts."""

    inner: int = 0
    window: int = 0
    experts: Mixture | None = None


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers. `heads` of `dim` columns, `kv_heads` in the cache."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    layers: tuple[LayerShape, ...]
    gated: bool = True
    head_norm: bool = False
    latent: Latent | None = None
    tied: bool = False

    @property
    def cache_columns(self) -> int:
        """Numbers that the cache holds per token and layer."""
        if self.latent:
            return self.latent.rank + self.latent.rope
        return 2 * self.kv_heads * self.dim


@dataclass(frozen=True)
class Precision:
    """Stored formats: weights, cache, activations between kernels; `head` of the last matrix."""

    weights: str = "bf16"
    cache: str = "bf16"
    activations: str = "bf16"
    head: str = "bf16"

    @property
    def operand(self) -> str:
        """Format in which a product's x is stored."""
        kind = COMPUTE[self.weights]
        return {"fp4": "nvfp4", "f32": "f32"}.get(kind, kind)


@dataclass(frozen=True)
class Work:
    """One step: `batch` sequences on these chips, `tokens` new ones each after `past`; `length` rows of
    cache.

    `logits` rows per sequence of the last matrix (1: only the last token's)."""

    batch: int
    tokens: int
    past: int
    length: int
    logits: int = 1


def of_config(config: Config) -> ModelShape:
    """The shape of a public configuration."""
    return ModelShape(
        config.name, config.hidden, config.heads, config.kv_heads, config.head_dim, config.vocab,
        tuple(_layer(layer) for layer in config.layers), config.gated, config.qk_norm != "none",
        config.latent,
        config.tied,
    )  # fmt: skip


def _layer(layer: Layer) -> LayerShape:
    experts = None
    if layer.experts is not None:
        e = layer.experts
        experts = Mixture(e.count, e.chosen, e.inner, e.shared)
    return LayerShape(layer.inner, layer.window or layer.chunk, experts)


def parameters(shape: ModelShape) -> float:
    """Elements of all matrices (embedding once more where the head is not tied)."""
    hidden = shape.hidden
    total = shape.vocab * hidden * (1 if shape.tied else 2)
    for layer in shape.layers:
        total += _attention_elements(shape)
        mats = 3 if shape.gated else 2
        if layer.experts:
            e = layer.experts
            total += hidden * (mats * (e.count * e.inner + e.shared) + e.count)
        else:
            total += mats * hidden * layer.inner
    return float(total)


def _attention_elements(shape: ModelShape) -> int:
    if shape.latent:
        c = shape.latent
        q = c.query * (shape.hidden + shape.heads * (c.nope + c.rope)) if c.query else (
            shape.hidden * shape.heads * (c.nope + c.rope)
        )  # fmt: skip
        kv = shape.hidden * (c.rank + c.rope) + c.rank * shape.heads * (c.nope + c.value)
        return q + kv + shape.heads * c.value * shape.hidden
    return shape.hidden * shape.dim * (2 * shape.heads + 2 * shape.kv_heads)


@dataclass
class Writer:
    """Collects the nodes of a section."""

    shape: ModelShape
    precision: Precision
    parallel: Degrees
    work: Work
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.work.batch * self.work.tokens

    def value(self, name: str, width: int, dtype: str, head: int = 0, state: str = "", rows: int = 0) -> str:
        self.values[name] = Value(rows or self.rows, width, dtype, head, state)
        return name

    def add(
        self, kind: str, inputs: Sequence[str], out: str, weights: Sequence[Matrix] = (), **attrs: Any
    ) -> str:
        self.nodes.append(Node(kind, tuple(inputs), out, tuple(weights), attrs))
        return out

    def linear(
        self, x: str, out: str, n: int, k: int, split: str = "n", dtype: str = "", out_dtype: str = "",
        count: int = 1, total: int = 1, rows: int = 0, head: int = 0,
    ) -> str:  # fmt: skip
        weight = Matrix(out, n, k, dtype or self.precision.weights, count, total, split)
        self.value(out, n * (count if rows else 1), out_dtype or self.precision.activations, head)
        attrs: dict[str, Any] = {"name": out}
        if rows:
            attrs |= {"rows": rows, "groups": count}
        return self.add("linear", [x], out, [weight], **attrs)


def sections(
    shape: ModelShape, precision: Precision, parallel: Degrees, work: Work, embed: bool = True
) -> tuple[Section, ...]:
    """Sections of one chip: prologue, a section per kind of layer (with its count), epilogue."""
    found: list[Section] = []
    w = Writer(shape, precision, parallel, work)
    w.value("ids", 1, "f32")
    w.value("x", shape.hidden, precision.activations)
    if embed:
        w.add("embed", ["ids"], "x", [Matrix("embedding", shape.vocab, shape.hidden, precision.head)])
        found.append(Section("embedding", 1, tuple(w.nodes), dict(w.values), frozenset(("x",))))
    kinds = sorted({layer: shape.layers.count(layer) for layer in shape.layers}.items(), key=lambda p: -p[1])
    for number, (layer, count) in enumerate(kinds):
        found.append(_layer_section(shape, layer, precision, parallel, work, count, number))
    found.append(_head(shape, precision, parallel, work))
    return tuple(found)


def _layer_section(
    shape: ModelShape, layer: LayerShape, precision: Precision, parallel: Degrees, work: Work, count: int,
    number: int,
) -> Section:  # fmt: skip
    w = Writer(shape, precision, parallel, work)
    w.value("x", shape.hidden, precision.activations)
    _norm(w, "x", "attention_in")
    (_latent_attention if shape.latent else _attention)(w, layer)
    _residual(w, "attention_out", "x", "middle")
    _norm(w, "middle", "mlp_in")
    if layer.experts is not None:
        write_experts(w, layer.experts)
    else:
        _mlp(w, layer.inner)
    _residual(w, "mlp_out", "middle", "y")
    outputs = frozenset(n.output for n in w.nodes if w.values[n.output].state) | {"y"}
    return Section(
        f"layer{number}" if number else "layer", count, tuple(w.nodes), w.values, outputs, {"x": "y"}
    )


def _norm(w: Writer, x: str, out: str) -> None:
    w.value(out, w.values[x].width, w.precision.operand)
    w.add("norm", [x], out, name="norm")


def _residual(w: Writer, part: str, x: str, out: str) -> None:
    if w.parallel.tensor > 1:
        w.value(f"{part}.sum", w.shape.hidden, w.precision.activations)
        part = w.add("allreduce", [part], f"{part}.sum", name="allreduce")
    w.value(out, w.shape.hidden, w.precision.activations)
    w.add("point", [part, x], out, fn="add", name="add")


def _attention(w: Writer, layer: LayerShape) -> None:
    s, t, work = w.shape, w.parallel.tensor, w.work
    heads, kv = divide(s.heads, t), divide(s.kv_heads, t)
    act = w.precision.activations
    names = {"q": heads, "k": kv, "v": kv}
    for name, count in names.items():
        w.linear("attention_in", name, count * s.dim, s.hidden, head=s.dim)
    for name in ("q", "k"):
        if s.head_norm:
            w.value(f"{name}.norm", names[name] * s.dim, act, s.dim)
            w.add("head_norm", [name], f"{name}.norm", name="head_norm")
        w.value(f"{name}.rope", names[name] * s.dim, act, s.dim)
        w.add("rope", [f"{name}.norm" if s.head_norm else name], f"{name}.rope", name="rope")
    for name, source in (("k", "k.rope"), ("v", "v")):
        w.value(f"cache.{name}", kv * s.dim, w.precision.cache, s.dim, f"cache.{name}", work.length)
        w.add("append", [source], f"cache.{name}", name="append")
    w.value("attended", heads * s.dim, w.precision.operand)
    w.add(
        "attention", ["q.rope", "cache.k", "cache.v"], "attended", batch=work.batch, heads=heads, kv_heads=kv,
        dim=s.dim, value_dim=s.dim, tokens=work.tokens, past=work.past, length=work.past + work.tokens,
        element=element_bytes(w.precision.cache), engine=_score_engine(w.precision), window=layer.window,
        name="attention",
    )  # fmt: skip
    w.linear("attended", "attention_out", s.hidden, heads * s.dim, "k")


def _score_engine(precision: Precision) -> str:
    kind = COMPUTE[precision.cache]
    return "bf16" if kind in ("fp4", "int8") else kind


def _latent_attention(w: Writer, layer: LayerShape) -> None:
    """The absorbed form: queries pass through the key half of the up-projection, results through the value
    half."""
    s, work, act = w.shape, w.work, w.precision.activations
    c = s.latent
    assert c is not None
    heads = divide(s.heads, w.parallel.tensor)
    wide = c.nope + c.rope
    w.linear("attention_in", "latent", c.rank + c.rope, s.hidden, "")
    w.value("latent.norm", c.rank + c.rope, act, c.rank + c.rope)
    w.add("head_norm", ["latent"], "latent.norm", name="norm")
    w.values["latent"] = replace(w.values["latent"], head=c.rank + c.rope)
    w.value("cache.latent", c.rank + c.rope, w.precision.cache, c.rank + c.rope, "cache.latent", work.length)
    w.add("append", ["latent.norm"], "cache.latent", name="append")
    source, k = "attention_in", s.hidden
    if c.query:
        w.linear("attention_in", "q.rank", c.query, s.hidden, "")
        _norm(w, "q.rank", "q.rank.norm")
        source, k = "q.rank.norm", c.query
    w.linear(source, "q", heads * wide, k, head=wide)
    w.value("q.rope", heads * wide, act, wide)
    w.add("rope", ["q"], "q.rope", name="rope")
    rows = w.rows
    w.linear("q.rope", "q.latent", c.rank, c.nope, count=heads, total=heads, rows=rows)
    w.value("attended", heads * c.rank, act)
    w.add(
        "attention",
        ["q.latent", "q.rope", "cache.latent"],
        "attended",
        batch=work.batch,
        heads=heads,
        kv_heads=1,
        dim=c.rank + c.rope,
        value_dim=c.rank,
        tokens=work.tokens,
        past=work.past,
        length=work.past + work.tokens,
        element=element_bytes(w.precision.cache),
        engine=_score_engine(w.precision),
        window=layer.window,
        shared=True,
        name="attention",
    )
    w.linear("attended", "attended.value", c.value, c.rank, count=heads, total=heads, rows=rows)
    w.linear("attended.value", "attention_out", s.hidden, heads * c.value, "k")


def _mlp(w: Writer, inner: int) -> None:
    width = divide(inner, w.parallel.tensor)
    w.linear("mlp_in", "up", width, w.shape.hidden)
    w.value("inner", width, w.precision.operand)
    if w.shape.gated:
        w.linear("mlp_in", "gate", width, w.shape.hidden)
        w.add("gate", ["gate", "up"], "inner", name="gate")
    else:
        w.add("point", ["up"], "inner", fn="act", name="act")
    w.linear("inner", "mlp_out", w.shape.hidden, width, "k")


def _head(shape: ModelShape, precision: Precision, parallel: Degrees, work: Work) -> Section:
    w = Writer(shape, precision, parallel, replace(work, tokens=min(work.logits, work.tokens)))
    w.value("x", shape.hidden, precision.activations)
    w.value("last", shape.hidden, precision.head)
    w.add("norm", ["x"], "last", name="norm")
    w.linear("last", "logits", divide(shape.vocab, parallel.tensor), shape.hidden, dtype=precision.head,
             out_dtype="f32")  # fmt: skip
    out = "logits"
    if parallel.tensor > 1:
        w.value("gathered", shape.vocab, "f32")
        out = w.add("allgather", ["logits"], "gathered", name="allgather")
    return Section("head", 1, tuple(w.nodes), w.values, frozenset((out,)))


def check(parallel: Degrees, shape: ModelShape) -> None:
    """Raises UsageError for degrees that cut nothing in this model."""
    if min(parallel.tensor, parallel.pipeline, parallel.expert, parallel.data) < 1:
        raise UsageError("gpu: degrees of parallelism must be at least 1")
    if parallel.tensor > shape.heads:
        raise UsageError(f"gpu: {parallel.tensor} chips cannot share {shape.heads} heads")
    if parallel.pipeline > len(shape.layers):
        raise UsageError(f"gpu: {parallel.pipeline} stages for {len(shape.layers)} layers")
