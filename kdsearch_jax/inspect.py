"""Shows which parts of a network can be pruned, and why the others cannot. Needs neither data nor parameters.

    python -m kdsearch_jax.inspect --model vit
    python -m kdsearch_jax.inspect --model mypkg.models:make_net --input-shape 224 224 3 [--json]
    python -m kdsearch_jax.inspect --model mypkg.models:Encoder --inputs int32[128] mask=bool[128]
    python -m kdsearch_jax.inspect --model vit --measure --budget.batch-size 8
    python -m kdsearch_jax.inspect --teacher RUN/student      a saved network
    python -m kdsearch_jax.inspect --config cifar10_resnet20 --target tpu:v5e:2x4 [--programs search forward]

Groups whose names differ only in numbers share a line, with the cost that removing all of them would save. Frozen axes
are listed by reason. The smallest student keeps one unit of each group (or budget.round_to units) and no residual
branch. `--measure` builds both with random parameters and measures latency and memory of a call on this device, which
decides whether budgets on these can be met.

`--target` compiles the steps of search and retraining, and the forward passes, for a TPU slice that is not here
(docs/tpu.md): whether they fit, and what the compiler expects them to take. For a saved student: whether it is faster
there than the network that it was cut from.
"""

# No `from __future__ import annotations` here: tyro reads the types at run time.

import json
import os
from dataclasses import dataclass

from kdsearch_jax import inspect
from kdsearch_jax.runs import command_line
from kdsearch_jax.runs.plain_tables import print_table

# Image shape, number of classes and training examples of well-known data sets; others default to ImageNet, streamed.
KNOWN = {
    "digits": ((8, 8, 1), 10, 1437),
    "mnist": ((28, 28, 1), 10, 54_000),
    "fashion_mnist": ((28, 28, 1), 10, 54_000),
    "cifar10": ((32, 32, 3), 10, 45_000),
    "cifar100": ((32, 32, 3), 100, 45_000),
}
IMAGENET = ((224, 224, 3), 1000, None)


@dataclass(frozen=True)
class InspectOptions(command_line.RunOptions):
    """The inputs of the network and the output format."""

    input_shape: tuple[int, ...] | None = None
    """Shape of one example of the only input, without the batch axis; by default the data set's, or 224 224 3."""
    input_dtype: str = "float32"
    """Type of the only input."""
    inputs: tuple[str, ...] = ()
    """Several inputs instead, such as `float32[224,224,3]`, or `mask=bool[16]` for a keyword argument."""
    measure: bool = False
    """Also measure latency and memory of the network and of the smallest student."""
    target: str | None = None
    """Compile the run for a TPU slice that is not here, such as tpu:v5e:2x4, and print what it would take there."""
    programs: tuple[str, ...] = ()
    """What to compile for it, of search, retrain, teacher, forward, `forward student` and `forward unpruned`."""
    json: bool = False
    """Print one JSON object with every group and every frozen axis."""


def main(argv: list[str]) -> int:
    """Traces the network that the command line names and prints its groups."""
    options, experiment = command_line.parse(argv, InspectOptions, "kdsearch_jax.inspect", inspect.__doc__ or "")
    if options.target is not None or experiment.budget.target is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compiles only; libtpu would look for a TPU that is not here
    from kdsearch_jax.runs import inspection, planning, targets  # jax and flax, which --help does not need

    target = None if options.target is None else targets.parse_target(options.target)

    names_data = any(token.startswith(("--config", "--data", "--workdir", "--resume")) for token in argv)
    names_model = any(token.startswith("--model") for token in argv)
    shape, classes, examples = IMAGENET if names_model and not names_data else KNOWN.get(experiment.data.name, IMAGENET)
    if experiment.data.image_size:
        shape = (experiment.data.image_size,) * 2 + shape[2:]
    shape = options.input_shape or shape
    call = inspection.parse_call(options.inputs, shape, options.input_dtype, experiment.model.eval_kwargs)
    network, call, record = inspection.inspect_network(experiment, call, classes, options.measure, options.trust_code)
    if target is not None:
        run = inspection.abstract_run(experiment, network, call, examples)
        record["target"] = planning.plan(run, target, options.programs)
    if options.json:
        print(json.dumps(record, indent=1))
        return 0
    print(inspection.summary(record))
    if target is not None:
        planning.print_plan(record["target"])
        return 0
    print_table(("group", "kind", "groups", "units", "MACs", "parameters"), inspection.group_lines(network))
    print_table(("frozen because", "axes", "of"), inspection.frozen_lines(network))
    return 0


if __name__ == "__main__":
    command_line.run(main)
