"""What of a network can be pruned, and why the rest can not: no data, no parameters, a trace alone.

    python -m kdsearch_jax.inspect --model vit
    python -m kdsearch_jax.inspect --model mypkg.models:make_net --input-shape 224 224 3 [--json]
    python -m kdsearch_jax.inspect --model mypkg.models:Encoder --inputs int32[128] mask=bool[128]
    python -m kdsearch_jax.inspect --model vit --measure --budget.batch-size 8
    python -m kdsearch_jax.inspect --teacher RUN/student      a network that was saved

Groups that are named alike but for numbers share a line: what they cost together, where all of them could be emptied.
What is frozen is listed by reason. The smallest student keeps one unit of each group (one multiple of budget.round_to)
and no residual branch. `--measure` builds both with random parameters and measures time and memory of a call on this
device; whether a budget on these can be met is known only then.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

import json
from dataclasses import dataclass

from kdsearch_jax import inspect
from kdsearch_jax.runs import command_line

# Shape and classes of data sets that need not be read to be known; others are taken for ImageNet.
KNOWN = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
}
IMAGENET = ((224, 224, 3), 1000)


@dataclass(frozen=True)
class InspectOptions(command_line.RunOptions):
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
    options, experiment = command_line.parse(argv, InspectOptions, "kdsearch_jax.inspect", inspect.__doc__ or "")
    from kdsearch_jax.runs import inspection  # jax and flax, which --help does not need

    chosen = any(token.startswith(("--config", "--data", "--workdir", "--resume")) for token in argv)
    own = any(token.startswith("--model") for token in argv) and not chosen
    shape, classes = IMAGENET if own else KNOWN.get(experiment.data.name, IMAGENET)
    if experiment.data.image_size:
        shape = (experiment.data.image_size,) * 2 + shape[2:]
    shape = options.input_shape or shape
    call = inspection.described(options.inputs, shape, options.input_dtype, experiment.model.eval_kwargs)
    network, record = inspection.traced(experiment, call, classes, options.measure, options.trust_code)
    if options.json:
        print(json.dumps(record, indent=1))
        return 0
    print(inspection.heading(record))
    inspection.show(("group", "kind", "groups", "units", "MACs", "parameters"), inspection.group_lines(network))
    inspection.show(("frozen because", "axes", "of"), inspection.frozen_lines(network))
    return 0


if __name__ == "__main__":
    command_line.run(main)
