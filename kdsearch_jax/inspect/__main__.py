"""`python -m kdsearch_jax.inspect --model NAME`: what of a network can be pruned, and why the rest can not."""

# No `from __future__ import annotations` here: the command line is read off the types.

import json
from dataclasses import dataclass

from kdsearch_jax import cli, inspect

# Shape and classes of data sets that need not be read to be known; others are taken for ImageNet.
KNOWN = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
}
IMAGENET = ((224, 224, 3), 1000)


@dataclass(frozen=True)
class InspectOptions(cli.RunOptions):
    """What the network is called with, and how the answer is printed."""

    input_shape: tuple[int, ...] | None = None
    """One example of the only input, without the batch axis; if left out that of the data set, or else 224 224 3."""
    input_dtype: str = "float32"
    """Its type."""
    inputs: tuple[str, ...] = ()
    """Several inputs instead, as `float32[224,224,3]`, or `mask=bool[16]` for one that is given by keyword."""
    measure: bool = False
    """Measure time and memory of a call as well, of the network and of the smallest student."""
    json: bool = False
    """One JSON object, with a record for every group and everything frozen."""


def main(argv: list[str]) -> int:
    """Traces the network that the command line names, and prints what was found."""
    options, experiment = cli.parse(argv, InspectOptions, "kdsearch_jax.inspect", inspect.__doc__ or "")
    from kdsearch_jax.inspect import tables  # jax and flax, which --help does not need

    chosen = any(token.startswith(("--config", "--data", "--workdir", "--resume")) for token in argv)
    own = any(token.startswith("--model") for token in argv) and not chosen
    shape, classes = IMAGENET if own else KNOWN.get(experiment.data.name, IMAGENET)
    if experiment.data.image_size:
        shape = (experiment.data.image_size,) * 2 + shape[2:]
    shape = options.input_shape or shape
    call = tables.described(options.inputs, shape, options.input_dtype, experiment.model.eval_kwargs)
    network, record = tables.traced(experiment, call, classes, options.measure)
    if options.json:
        print(json.dumps(record, indent=1))
        return 0
    print(tables.heading(record))
    tables.show(("group", "kind", "groups", "units", "MACs", "parameters"), tables.group_lines(network))
    tables.show(("frozen because", "axes", "of"), tables.frozen_lines(network))
    return 0


if __name__ == "__main__":
    cli.run(main)
