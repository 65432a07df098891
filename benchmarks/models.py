"""Makes a shape's ONNX model with random weights, once, in the cache; every layer has weights of its own.

    python -m benchmarks.models [125m 1.1b]

Weights are normal, scaled by 1 / sqrt(inputs); queries and keys by twice that, so that attention is not
uniform. The seed is fixed. The data file holds raw float32, each weight at a multiple of 4096 bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.shapes import SHAPES, Shape
from benchmarks.weights import folder, making

SEED = 20250701
PAGE = 4096
CHUNK = 1 << 22
"""Elements drawn at once."""


def onnx_model(shape: Shape) -> Path:
    """The ONNX file of a shape; made if it is not there yet."""
    base = folder(shape) / "onnx"
    if not base.is_dir():
        print(f"making {shape.name} in {base}", file=sys.stderr)
        with making(base) as made:
            _write(shape, made)
    return base / "model.onnx"


def _write(shape: Shape, into: Path) -> None:
    from mapper.zoo.build import decoder
    from mapper.zoo.config import Config, Layer, Rope

    layer = Layer(rope=Rope(shape.theta, shape.head_dim), inner=shape.inner)
    config = Config(
        f"llama-{shape.name}", "llama", shape.hidden, shape.heads, shape.kv_heads, shape.head_dim,
        shape.vocab, shape.context, (layer,) * shape.layers, eps=shape.eps,
    )  # fmt: skip
    writer = decoder(config, "f32", "model.onnx.data")
    table, end = {}, 0
    with (into / "model.onnx.data").open("wb") as stream:
        for number, (name, weight) in enumerate(writer.weights.items()):
            writer.weights[name] = replace(weight, offset=end)
            table[name] = {"offset": end, "shape": list(weight.shape)}
            stream.seek(end)
            rng, scale = np.random.default_rng([SEED, number]), weight.gain / np.sqrt(weight.fan_in)
            for first in range(0, weight.elements, CHUNK):
                count = min(CHUNK, weight.elements - first)
                drawn = rng.standard_normal(count, np.float32)
                (drawn * np.float32(scale) + np.float32(weight.mean)).tofile(stream)
            end += -(-4 * weight.elements // PAGE) * PAGE
        stream.truncate(end)
    (into / "model.onnx").write_bytes(writer.model().SerializeToString(deterministic=True))
    (into / "weights.json").write_text(json.dumps(table), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help="125m or 1.1b")
    for name in parser.parse_args().shapes:
        if name not in SHAPES:
            parser.error(f"no shape {name!r}; there are {', '.join(SHAPES)}")
        print(onnx_model(SHAPES[name]))


if __name__ == "__main__":
    main()
