"""Kernels of mixtures of experts: a task streams a tile of columns of the experts of a run of blocks.

Which expert a block of rows has, and which (token, choice) pairs are its rows, is read from memory; a block
that is not there (expert -1), and rows that pad a block (pair -1), are neither read nor written. The meaning
of the instructions is in expert_ops."""

from __future__ import annotations

from typing import Any

from mapper_gpu.triton_code import ACTIVATIONS, Frame, Group, Json, Statements, join, load, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_frames import columns
from mapper_gpu.triton_names import Parameters
from mapper_gpu.triton_products import (
    Strip,
    Turn,
    coded,
    finish,
    multiply,
    rounded,
    step,
    stored,
    tuning,
    turns,
    weight,
    zeros,
)

Context = dict[str, Any]


class Mixture(Statements):
    """Statements that know the instructions of experts, too."""

    def operand_of(self, register: str) -> Json:
        """The operand that a register is read from."""
        return self.operand(self.made[register][2])

    def load_of(self, register: str, row: str, column: str, mask: str) -> str:
        """The load of some rows and columns of a register that is read."""
        o = self.operand_of(register)
        return load(self.parameters.name(o), o, row, column, mask)

    # rows of tokens ------------------------------------------------------------------------------

    def _weighted_sum(self, frame: Frame, out: str, x: str, routing: str, places: str, weighted: bool
                      ) -> list[str]:  # fmt: skip
        chosen = int(self.operand_of(places)["width"])
        at, made = self.fresh("at"), self.fresh("combined")
        share = self._share(frame, routing, chosen) if weighted else ""
        lines = [f"{at} = {self.load_of(places, frame.row, 'j', frame.row_mask)}.to(tl.int32)"]
        for g in frame.groups:
            term = self.load_of(x, at, g.index, join(frame.row_mask, g.mask))
            lines.append(f"{made}{g.suffix} += {share}{term}")
        self._over_choices(chosen, [f"{made}{g.suffix} = 0.0" for g in frame.groups], lines)
        return [f"{made}{g.suffix}" for g in frame.groups]

    def _share_bias(self, frame: Frame, out: str, x: str, routing: str, table: str, weighted: bool
                    ) -> list[str]:  # fmt: skip
        chosen = int(self.operand_of(routing)["width"]) // 2
        values = self.value(x, frame)
        at, made = self.fresh("chosen"), self.fresh("biased")
        share = self._share(frame, routing, chosen) if weighted else ""
        lines = [f"{at} = {self.load_of(routing, frame.row, 'j', frame.row_mask)}.to(tl.int32)"]
        for g in frame.groups:
            term = self.load_of(table, at, g.index, join(frame.row_mask, g.mask))
            lines.append(f"{made}{g.suffix} += {share}{term}")
        first = [f"{made}{g.suffix} = {v}" for g, v in zip(frame.groups, values, strict=True)]
        self._over_choices(chosen, first, lines)
        return [f"{made}{g.suffix}" for g in frame.groups]

    def _share(self, frame: Frame, routing: str, chosen: int) -> str:
        return self.load_of(routing, frame.row, f"({chosen} + j)", frame.row_mask) + " * "

    def _over_choices(self, chosen: int, first: list[str], lines: list[str]) -> None:
        """A loop over a token's choices, unrolled, so that all of their loads are in flight together."""
        self.lines += [*first, f"for j in tl.static_range({chosen}):", *(f"    {line}" for line in lines)]

    # rows of blocks ------------------------------------------------------------------------------

    def _gather(self, frame: Frame, out: str, x: str, blocks: str, chosen: int, routing: str | None
                ) -> list[str]:  # fmt: skip
        share = "share * " if routing is not None else ""
        return self._assign("gathered", frame, [
            share + self.load_of(x, "token[:, None]", g.index, join(frame.row_mask, g.mask))
            for g in frame.groups
        ])  # fmt: skip

    def _expert_bias(self, frame: Frame, out: str, x: str, blocks: str, table: str) -> list[str]:
        return self._assign("biased", frame, [
            f"{v} + {self.load_of(table, 'expert', g.index, g.mask)}"
            for v, g in zip(self.value(x, frame), frame.groups, strict=True)
        ])  # fmt: skip

    def _expert_gate(self, frame: Frame, out: str, act: str, made: list[str], limit: float, offset: float
                     ) -> list[str]:  # fmt: skip
        parts = list(zip(*(self.value(m, frame) for m in made), strict=True))
        if len(made) == 1:
            return self._assign("active", frame, [ACTIVATIONS[act].format(v) for (v,) in parts])
        found = []
        for g, (gate, up) in zip(frame.groups, parts, strict=True):
            if limit:
                low, high = self.fresh(f"gate{g.suffix}"), self.fresh(f"up{g.suffix}")
                self.lines += [f"{low} = tl.minimum({gate}, {limit})",
                               f"{high} = tl.minimum(tl.maximum({up}, {-limit}), {limit})"]  # fmt: skip
                gate, up = low, high
            found.append(f"({ACTIVATIONS[act].format(gate)}) * " + (f"({up} + {offset})" if offset else up))
        return self._assign("gated", frame, found)


def experts(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """Columns of the experts of a run of blocks: gathered rows, products, and what is done with them."""
    (program,), record = stage.programs, stage.record["experts"]
    tile, height = record["tile"], int(record["rows"])
    work = Mixture(program, parameters, setting.batch)
    products = [i for i in program["code"] if i[0] == "expert_matmul"]
    _, _, x, blocks, _, form = products[0]
    vector, rows = tile["engine"] == "vector", power(height)
    cols = columns(f"column * {tile['n']}", tile["n"], record["n"], None, 1 if vector else 16)
    codes = coded(work, products[0][4])
    bits = int(codes[6]) if codes else 0
    k = int(stored(work, products[0][4])["width"])
    block = step(vector, rows, cols.extent * len(products), form, k, bits)
    strip = Strip(block, k)
    frame = Frame("k", "m[:, None]", "m_ok[:, None]", (Group("", "k[None, :]", strip.mask),), rows)
    names = work.value(x, frame)
    load_x = rounded(work.take(), names[0], form, vector)
    (group,) = cols.groups
    results = Frame("n", "m[:, None]", "m_ok[:, None]", cols.groups, rows)
    before: list[str] = []
    sums: list[str] = []
    for _, out, _, _, stack, _ in products:
        name = work.fresh("acc")
        w = weight(work, stack, group, strip, cols.extent, "expert")
        before += w.before
        work.lines += [*turns(w, work.lines), *multiply(name, names[0], w.value, form, vector, rows)]
        sums.append(name)
        work.bind(out, results, [name])
    body = work.take()
    work.store(results)
    turn = Turn(cols.extent * len(products), form, block, bits)
    return {
        "template": "experts.py.j2", "columns": list(cols.lines), "rows": rows, "height": height,
        "run": tile["run"], "most": record["blocks"], "across": -(-record["n"] // tile["n"]),
        "blocks": parameters.name(work.operand_of(blocks)), "gathered": _gathered(work, x), "before": before,
        "zeros": [f"{name} = {zeros(vector, rows, group, cols, block)}" for name in sums], "length": k,
        "block": block, "k_mask": bool(strip.mask), "x": load_x, "body": body,
        "after": [line for name in sums for line in finish(name, vector, rows)], "epilogue": work.take(),
        "what": f"{tile['n']} columns of {tile['run']} blocks of {height} rows on {tile['engine']}",
        **tuning(tile["engine"], height, [turn], stage.tasks, setting.gpu),
    }  # fmt: skip


def _gathered(work: Mixture, x: str) -> list[str]:
    """Statements that find the tokens of a block's rows, and their shares where these enter the experts."""
    made = work.made[x]
    if made[0] != "gather":
        return []
    _, _, _, _, chosen, routing = made
    lines = [f"token = tl.maximum(pair, 0) // {chosen}"]
    if routing is not None:
        choice = f"({chosen} + tl.maximum(pair, 0) % {chosen})[:, None]"
        lines.append(f"share = {work.load_of(routing, 'token[:, None]', choice, 'm_ok[:, None]')}")
    return lines
