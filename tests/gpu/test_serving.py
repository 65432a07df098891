"""Iterations of in-flight batching on a GPU: against parameters, bounds and closed forms."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from mapper.driver import load
from mapper.errors import CapacityError, LoweringError, UsageError
from mapper.ir.graph import Graph
from mapper.machine import Machine, find
from mapper.serving.batching import serve
from mapper.serving.phases import Deployment, Iteration, Policy
from mapper.serving.workload import Workload
from mapper.zoo.families import config
from mapper.zoo.files import params
from mapper_gpu import BACKEND, kernels, stacks
from mapper_gpu.compiled import CompiledPhases, shape_of
from mapper_gpu.model import step_time
from mapper_gpu.phases import GpuPhases
from mapper_gpu.rates import rates
from mapper_gpu.serving import phases
from mapper_gpu.shape import Work as Step
from mapper_gpu.shape import of_config
from mapper_gpu.work import Attention, Experts, Matrix, Work, work
from tests.command import inside

FILES = BACKEND.machine_files()


@cache
def graph(name: str) -> Graph:
    return load(f"zoo:{name}")


@cache
def machine(name: str) -> Machine:
    return find(name, FILES)


def made(model: str = "llama-3.1-8b", on: str = "h100-sxm", **options: object) -> GpuPhases:
    wanted = Deployment(**({"stack": "sglang"} | options))  # type: ignore[arg-type]
    found = phases(graph(model), machine(on), wanted)
    assert isinstance(found, GpuPhases)
    return found


def own(model: str = "llama-3.1-8b", on: str = "h100-sxm", **options: object) -> CompiledPhases:
    found = phases(graph(model), machine(on), Deployment(**options))  # type: ignore[arg-type]
    assert isinstance(found, CompiledPhases)
    return found


def stored(items: Work) -> int:
    """Elements of all weights that the work speaks of."""
    total = items.embedding
    for item, count in items.items:
        if isinstance(item, Matrix):
            total += count * item.k * item.n
        elif isinstance(item, Experts):
            total += count * item.count * (item.k * item.n + item.inner * item.k)
        elif isinstance(item, Attention):
            total += count * item.rank * item.heads * (item.dim - item.rope + item.value_dim)
    return total


@pytest.mark.parametrize(
    "name",
    ["llama-3.1-8b", "llama-3.1-405b", "mixtral-8x7b", "qwen3-32b", "qwen3-235b-a22b", "deepseek-v3",
     "kimi-k2", "gpt-oss-120b", "llama-4-maverick", "phi-3-mini-4k"],
)  # fmt: skip
def test_no_weight_is_lost_or_counted_twice(name: str) -> None:
    """What the work holds are the model's parameters, but for norms and biases."""
    assert stored(work(graph(name))) == pytest.approx(params(config(name)), rel=1e-3)


def test_the_cache_row_of_the_work_is_the_zoos() -> None:
    for name in ("llama-3.1-8b", "deepseek-v3", "gpt-oss-120b", "qwen3-30b-a3b"):
        rows = sum(c * i.row for i, c in work(graph(name)).items if isinstance(i, Attention))
        assert rows * 2 == config(name).cache_bytes()


def test_only_decoders_are_served() -> None:
    head = graph("llama-3.1-8b").clone()
    for op in list(head.op.body.walk()):
        if op.name == "dataflow.lm_head":
            op.parent_block().detach_op(op)  # type: ignore[union-attr]
            break
    with pytest.raises(LoweringError, match="no decoder"):
        work(head)


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("on", ["a100-80g-sxm", "h100-sxm", "gh200", "b200", "b300"])
@pytest.mark.parametrize("stack", [None, "vllm"])
def test_no_step_beats_the_bytes_that_it_reads(batch: int, on: str, stack: str | None) -> None:
    chip = machine(on)
    cache_bytes = batch * 2048 * config("llama-3.1-8b").cache_bytes()
    read = 2 * (params(config("llama-3.1-8b")) - 128256 * 4096) + cache_bytes
    bound = read / chip.value("memory.hbm.bandwidth")
    model = own(on=on) if stack is None else made(on=on, stack=stack)
    seconds = model.seconds(Iteration(batch, 2048))
    assert bound < seconds < 3 * bound


@pytest.mark.parametrize("on", [path.stem for path in FILES])
def test_every_machine_serves_on_kernels_of_its_own(on: str) -> None:
    chip, chips = machine(on), 4
    read = 2 * (params(config("llama-3.1-8b")) - 128256 * 4096) / chips
    seconds = own(on=on, chips=chips).seconds(Iteration(1, 128))
    assert read / chip.value("memory.hbm.bandwidth") < seconds < 0.05


def test_no_prefill_beats_the_arithmetic() -> None:
    flops = 2 * 8192 * (params(config("llama-3.1-8b")) - 2 * 128256 * 4096)
    bound = flops / machine("h100-sxm").value("tensor.bf16")
    for model in (made(), own()):
        assert bound < model.seconds(Iteration(prefill=8192, seen=4096, prompts=1)) < 4 * bound


def test_more_work_takes_longer() -> None:
    model = made(stack="vllm")
    base = model.seconds(Iteration(16, 1000))
    assert base < model.seconds(Iteration(16, 4000)) < model.seconds(Iteration(64, 4000))
    assert base < model.seconds(Iteration(16, 1000, prefill=512, seen=256, prompts=1))
    assert base < model.seconds(Iteration(16, 1000, width=4))
    apart = base + model.seconds(Iteration(prefill=512, seen=256, prompts=1))
    assert model.seconds(Iteration(16, 1000, prefill=512, seen=256, prompts=1)) < apart


def test_chips_share_weights_and_pay_for_exchange() -> None:
    one, four = made(), made(chips=4)
    a, b = one.parts(Iteration(16, 1000)), four.parts(Iteration(16, 1000))
    assert a.collectives == 0 < b.collectives
    assert a.products / 4 < b.products < a.products
    assert four.weight_bytes == pytest.approx(one.weight_bytes / 4)
    assert four.capacity > 4 * one.capacity


def test_replicas_of_attention_hold_their_own_caches() -> None:
    options = {"chips": 8, "experts": 8, "weights": "fp8", "on": "b200"}
    shared = made("deepseek-v3", **options)  # type: ignore[arg-type]
    apart = made("deepseek-v3", replicas=8, **options)  # type: ignore[arg-type]
    assert apart.capacity > 5 * shared.capacity  # one latent row per token, not one on each chip
    assert apart.weight_bytes > shared.weight_bytes
    assert apart.seconds(Iteration(512, 4000)) < shared.seconds(Iteration(512, 4000))


def test_low_bit_weights_are_read_faster_and_need_units_to_be_computed_faster() -> None:
    step, prefill = Iteration(4, 1000), Iteration(prefill=8192, seen=4096, prompts=1)
    for on, gains in (("h100-sxm", False), ("b200", True)):
        wide, narrow = made(on=on, stack="vllm"), made(on=on, stack="vllm", weights="nvfp4")
        assert narrow.seconds(step) < wide.seconds(step)
        assert (narrow.seconds(prefill) < wide.seconds(prefill)) == gains
    with pytest.raises(UsageError, match="unknown format 'fp3'"):
        made(weights="fp3")
    with pytest.raises(UsageError, match="no products"):
        lacking = without(machine("tpu-v6e"), "tensor.bf16")
        phases(graph("llama-3.1-8b"), lacking, Deployment(stack="vllm")).seconds(step)


def without(source: Machine, key: str) -> Machine:
    return source.model_copy(update={"constants": {k: c for k, c in source.constants.items() if k != key}})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CapacityError, match="no room for a cache"):
        made("llama-3.1-70b")
    with pytest.raises(UsageError, match="whole groups"):
        made(chips=6, replicas=4)
    with pytest.raises(UsageError, match="no serving software called 'nope'"):
        made(stack="nope")


def test_experts_are_read_as_tokens_reach_them() -> None:
    chip = rates(machine("h100-sxm"), stacks.kernels())
    few = kernels.experts(chip, 1, 8, 256, 7168, 512, 256, "fp8")
    many = kernels.experts(chip, 4096, 8, 256, 7168, 512, 256, "fp8")
    alone = 8 * (7168 * 512 + 256 * 7168) / (chip.bandwidth * chip.stream)
    assert few == pytest.approx(alone + 5 * chip.kernel, rel=0.03)
    assert many > 256 / 8 * alone


def test_waves_are_quantised() -> None:
    """One tile more than the cores hold costs a part of another wave, never less than the work itself."""
    chip = replace(rates(machine("h100-sxm"), stacks.kernels()), tensor=1.0)
    at = [kernels.waves(chip, 8192, 4096, n, "bf16") for n in range(2048, 8192, 128)]
    ideal = [2 * 8192 * 4096 * n / chip.product["bf16"] for n in range(2048, 8192, 128)]
    ratios = [a / b for a, b in zip(at, ideal, strict=True)]
    assert at == sorted(at)
    assert all(1 <= r < 1.5 for r in ratios)
    assert max(ratios) > 1.02


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-8b",
        "qwen3-235b-a22b",
        "deepseek-v3",
        "gpt-oss-120b",
        "llama-4-maverick",
        "gpt2",
        "gemma-3-4b",
    ],
)
def test_the_shape_of_the_graph_is_the_shape_of_the_configuration(name: str) -> None:
    wanted = of_config(config(name))
    found = shape_of(name, work(graph(name)))
    assert sorted(x.window for x in found.layers) == sorted(x.window for x in wanted.layers)
    mlps = [Counter((x.inner, x.experts) for x in shape.layers) for shape in (found, wanted)]
    assert mlps[0] == mlps[1]  # which window goes with which MLP does not matter to a step
    assert replace(found, layers=()) == replace(wanted, layers=(), tied=False)


def test_compiled_iterations_are_those_of_the_model_where_it_was_asked() -> None:
    model, chip = own(), machine("h100-sxm")
    shape = of_config(config("llama-3.1-8b"))
    step = step_time(shape, chip, Step(8, 1, 2047, 2048)).seconds
    assert model.seconds(Iteration(8, 2047)) == pytest.approx(step, rel=0.02)
    whole = step_time(shape, chip, Step(1, 1024, 0, 1024)).seconds
    assert model.seconds(Iteration(prefill=1024, seen=512.5, prompts=1)) == pytest.approx(whole, rel=0.1)
    mixed = model.seconds(Iteration(8, 2047, prefill=1024, seen=512.5, prompts=1))
    assert whole < mixed < step + whole
    assert model.seconds(Iteration(8, 2047)) < model.seconds(Iteration(8, 2047, width=4)) < 2 * step
    between_points = [model.seconds(Iteration(8, c)) for c in range(2000, 4200, 100)]
    assert between_points == sorted(between_points)


def test_compiled_phases_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(UsageError, match="one weight format"):
        own("gpt-oss-120b", chips=4, expert_weights="mxfp4")
    with pytest.raises(CapacityError, match="no room for a cache"):
        own("llama-3.1-70b")
    with pytest.raises(UsageError, match="unknown format"):
        own(weights="fp3")


def test_at_concurrency_one_the_time_per_token_is_the_mean_step() -> None:
    model = made(stack="vllm")
    served = serve(model, Workload(1, 500, 201, concurrency=1), Policy())
    steps = [model.seconds(Iteration(1, 500 + i)) for i in range(200)]
    assert served[0].tpot == pytest.approx(sum(steps) / 200, rel=1e-3)
    assert served[0].ttft == pytest.approx(model.seconds(Iteration(prefill=500, seen=250.5, prompts=1)))


def test_stacks_have_policies_and_host_times() -> None:
    names = {s.name: s for s in stacks.stacks()}
    assert {"trtllm", "vllm", "sglang", "trtllm-2024", "vllm-2024"} <= set(names)
    assert (
        made(stack="vllm-2024").parts(Iteration(64, 100)).host
        > made(stack="vllm").parts(Iteration(64, 100)).host
    )
    assert names["trtllm"].policy.reserve and not names["vllm"].policy.reserve


def test_serve_prints_what_the_model_says() -> None:
    line = ("serve", "zoo:llama-3.1-8b", "--target", "gpu", "--in", "200", "--out", "50")
    done = inside(*line, "--concurrency", "16", "--stack", "vllm", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rate = found["requests"] / found["seconds"]
    assert found["mean_in_system"] == pytest.approx(rate * found["latency_s"]["mean"], rel=1e-9)
    assert found["ttft_s"]["p50"] <= found["ttft_s"]["p99"]
    faster = inside(*line, "--draft", "3", "--acceptance", "0.8", "--json")
    plain = inside(*line, "--json")
    gain = json.loads(plain.stdout)["tpot_s"]["mean"] / json.loads(faster.stdout)["tpot_s"]["mean"]
    assert 2 < gain < (1 - 0.8**4) / (1 - 0.8)
    table = inside(*line)
    assert "time to first token" in table.stdout and table.returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stack", "nope"), "no serving software called 'nope'"),
        (("--concurrency", "4", "--rate", "2"), "either a concurrency or an arrival rate"),
        (("--weights", "fp3"), "unknown format"),
        (("--acceptance", "2"), "acceptance in 0..1"),
        (("--in", "900000"), "does not fit the cache"),
        (("--machine", "groq-lpu1"), "unknown machine"),
    ],
)
def test_errors_are_one_line(options: tuple[str, ...], message: str) -> None:
    done = inside("serve", "zoo:llama-3.1-8b", "--target", "gpu", *options)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_target_without_serving_view_says_so() -> None:
    done = inside("serve", "zoo:llama-3.1-8b", "--target", "lpu")
    assert done.returncode == 2 and "no serving view" in done.stderr
