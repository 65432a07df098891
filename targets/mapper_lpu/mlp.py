"""The gated MLP as chains."""

from __future__ import annotations

from mapper_lpu.chain import Imm, Mem, Res
from mapper_lpu.decoder import LOG2E, Builder, Residual, group
from mapper_lpu.isa import EAST, F16, F32, WEST
from mapper_lpu.storage import Stored, mem
from mapper_lpu.weights import tiles_of


def mlp(b: Builder, x: list[Residual], out: list[Residual]) -> None:
    """down(silu(gate(x)) * up(x)) + x."""
    m, rows = b.d.mlp, b.all_rows
    inverse: dict[int, Stored] = {}
    hidden: list[Stored] = []
    for t, (begin, end) in enumerate(tiles_of(m.gate.n)):
        gate = b.project(f"gate.{t}", m.gate, EAST, list(range(begin, end)), b.d.mlp_norm)
        up = b.project(f"up.{t}", m.up, WEST, list(range(begin, end)), b.d.mlp_norm)
        if not inverse:
            inverse = b.inverse_rms("mlp/norm", x, b.d.mlp_norm)
        chain = b.chain(f"mlp/gate.{t}", b.rows, m.op)
        g = chain.add("vxm.mul", b.projected(chain, gate, x, rows), Mem(inverse[EAST], rows))
        u = chain.add("vxm.mul", b.projected(chain, up, x, rows), Mem(inverse[WEST], rows))
        product = b.temp(f"mlp/product.{t}", F32, b.rows, group(WEST, 0))
        exponential = b.temp(f"mlp/exponential.{t}", F32, b.rows, group(EAST, 0))
        chain.write(chain.add("vxm.mul", g, u), product, rows)
        power = chain.add("vxm.exp2", chain.add("vxm.mul", g, Imm(-LOG2E)))
        chain.write(chain.add("vxm.add", power, Imm(1.0)), exponential, rows)
        side = t % 2
        chain = b.chain(f"mlp/silu.{t}", b.rows, m.op)
        root = chain.add("vxm.rsqrt", Mem(exponential, rows))
        sigmoid = chain.add("vxm.mul", root, root)
        gated = chain.add("vxm.mul", sigmoid, Mem(product, rows))
        hidden.append(b.temp(f"mlp/hidden.{t}", F16, b.rows, mem(side, 10, 2)))
        chain.write(chain.cast(gated, F16), hidden[-1], rows)
    down(b, hidden, x, out)


def down(b: Builder, hidden: list[Stored], x: list[Residual], out: list[Residual]) -> None:
    """The down projection: tiles of the hidden vector two by two, partial sums in f32, residual last."""
    m, rows = b.d.mlp, b.all_rows
    inputs = tiles_of(m.down.k)
    for n, (begin, end) in enumerate(tiles_of(b.d.width)):
        partial: Stored | None = None
        for first in range(0, len(inputs), 2):
            chain = b.chain(f"mlp/down.{n}.{first}", b.rows, m.op)
            total: Res | None = None
            for k in range(first, min(first + 2, len(inputs))):
                lanes = range(*inputs[k])
                stored = b.weights.matrix(
                    f"down.{n}.{k}", m.down, b.d.layers, k % 2, range(begin, end), lanes
                )
                weights = b.use(f"down.{n}.{k}", stored[0], m.op)
                part = b.matmul(chain, weights, hidden[k], rows)
                total = part if total is None else chain.add("vxm.add", total, part)
            assert total is not None
            if partial is not None:
                total = chain.add("vxm.add", total, Mem(partial, rows))
            if first + 2 >= len(inputs):
                chain.ir = m.residual_op
                b.write_residual(chain, chain.add("vxm.add", total, Mem(x[n].wide, rows)), out[n])
            else:
                partial = b.temp(f"mlp/partial.{n}.{first}", F32, b.rows, group(WEST, 0))
                chain.write(total, partial, rows)
