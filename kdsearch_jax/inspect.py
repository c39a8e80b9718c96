"""What of a network can be pruned, and why the rest can not: no data, no parameters, a trace alone.

    python -m kdsearch_jax.inspect --model vit
    python -m kdsearch_jax.inspect --model mypkg.models:make_net --input-shape 224 224 3 [--json]
    python -m kdsearch_jax.inspect --model mypkg.models:Encoder --inputs int32[128] mask=bool[128]

Groups that are named alike but for numbers share a line: what they cost together, where all of them could be emptied.
What is frozen is listed by reason. The smallest student keeps one unit of each group and no residual branch.
"""

# No `from __future__ import annotations` here: the command line is read off the types.

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdsearch_jax import budget, cli
from kdsearch_jax.call import Call
from kdsearch_jax.config import Experiment
from kdsearch_jax.models import build, takes
from kdsearch_jax.network import Network, trace

# Shape and classes of data sets that need not be read to be known; others are taken for ImageNet.
KNOWN = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
}
IMAGENET = ((224, 224, 3), 1000)
SHOWN = 4  # names of frozen parameters to a reason

Table = list[tuple[str, ...]]


@dataclass(frozen=True)
class InspectOptions(cli.RunOptions):
    """What the network is called with, and how the answer is printed."""

    input_shape: tuple[int, ...] | None = None
    """One example of the only input, without the batch axis; if left out that of the data set, or else 224 224 3."""
    input_dtype: str = "float32"
    """Its type."""
    inputs: tuple[str, ...] = ()
    """Several inputs instead, as `float32[224,224,3]`, or `mask=bool[16]` for one that is given by keyword."""
    json: bool = False
    """One JSON object, with a record for every group and everything frozen."""


def main(argv: list[str]) -> int:
    """Traces the network that the command line names, and prints what was found."""
    options, experiment = cli.parse(argv, InspectOptions, "kdsearch_jax.inspect", __doc__ or "")
    chosen = any(token.startswith(("--config", "--data", "--workdir", "--resume")) for token in argv)
    own = any(token.startswith("--model") for token in argv) and not chosen
    shape, classes = IMAGENET if own else KNOWN.get(experiment.data.name, IMAGENET)
    if experiment.data.image_size:
        shape = (experiment.data.image_size,) * 2 + shape[2:]
    model, arguments = experiment.model.name, dict(experiment.model.arguments)
    if takes(model, "num_classes"):
        arguments.setdefault("num_classes", classes)
    call = described(options.inputs, options.input_shape or shape, options.input_dtype, experiment.model.eval_kwargs)
    module = build(model, arguments)
    call.check(module)
    start = time.perf_counter()
    network = trace(module, *call.example(2), **call.keywords(module, train=False))
    seconds = time.perf_counter() - start
    gates = experiment.gates
    network = network.select(gates.kinds, gates.include, gates.exclude)
    record = report(network, experiment)
    record |= {"model": model, "arguments": arguments, "inputs": call.to_json()["inputs"], "seconds": round(seconds, 3)}
    if options.json:
        print(json.dumps(record, indent=1))
        return 0
    print(heading(record))
    show(("group", "kind", "groups", "units", "MACs", "parameters"), group_lines(network))
    show(("frozen because", "axes", "of"), frozen_lines(network))
    return 0


def described(inputs: Sequence[str], shape: Sequence[int], dtype: str, keywords: Any) -> Call:
    """The call with these inputs, or with one of this shape and type.

    Raises:
      ValueError: an input that is not written as `int32[128]` or `name=int32[128]`.
    """
    written = inputs or (f"{dtype}[{','.join(map(str, shape))}]",)
    entries = {}
    for number, text in enumerate(written):
        name, _, spec = text.rpartition("=")
        if not re.fullmatch(r"\w+\[[\d,]*\]", spec):
            raise ValueError(f"--inputs: {text!r} is not understood; write float32[224,224,3], or mask=bool[16]")
        entries[name or f"input{number}"] = (f"{name}={name}" if name else f"input{number}", spec)
    return Call.from_json(
        {
            "arguments": [argument for argument, _ in entries.values()],
            "inputs": {name: spec for name, (_, spec) in entries.items()},
            "train": {},
            "eval": dict(keywords),
        }
    )


def report(network: Network, experiment: Experiment) -> dict[str, Any]:
    """Everything that was found, as plain JSON."""
    topology = network.topology
    least = topology.cost(budget.smallest(topology))
    smallest = {
        name: {"count": cost, "share": cost / max(total, 1)}
        for name, cost, total in zip(("macs", "params"), least, topology.total(), strict=True)
    }
    return {**topology.to_json(), "smallest": smallest, "budget": _reach(network, experiment)}


def _reach(network: Network, experiment: Experiment) -> dict[str, Any]:
    """Whether the experiment's budget can be met, and if not why."""
    given = {"macs": experiment.budget.macs, "params": experiment.budget.params}
    try:
        budget.resolve(experiment.budget, network.topology)
    except budget.BudgetError as error:
        return {**given, "reachable": False, "reason": str(error)}
    return {**given, "reachable": True, "reason": None}


def heading(record: dict[str, Any]) -> str:
    """The network in three lines: what it is and costs, how small it can become, whether the budget can be met."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in record["arguments"].items())
    inputs = ", ".join(str(spec) for spec in record["inputs"].values())
    least, goal = record["smallest"], record["budget"]
    asked = " and ".join(f"{name} {goal[name]:g}" for name in ("macs", "params") if goal[name] is not None)
    return "\n".join(
        (
            f"{record['model']}({arguments}) of {inputs}: {record['macs']:,} MACs an example, "
            f"{record['params']:,} parameters; traced in {record['seconds']:.2f} s",
            f"smallest student: {least['macs']['count']:,} MACs ({least['macs']['share']:.1%}), "
            f"{least['params']['count']:,} parameters ({least['params']['share']:.1%})",
            f"budget of {asked}: {'within reach' if goal['reachable'] else goal['reason']}",
        )
    )


def group_lines(network: Network) -> Table:
    """A line for groups of one kind that are named alike: how many, units in all, what they cost together."""
    topology = network.topology
    macs, params = topology.total()
    alike: dict[tuple[str, str], list[Any]] = {}
    for group in topology.groups:
        alike.setdefault((pattern(group.name), group.kind), []).append(group)
    lines: Table = []
    for (name, kind), groups in alike.items():
        names = {group.name for group in groups}
        keep = {g.name: np.full(g.size, float(g.name not in names)) for g in topology.groups}
        less_macs, less_params = topology.cost(keep)
        shares = (f"{1 - less_macs / max(macs, 1):.1%}", f"{1 - less_params / max(params, 1):.1%}")
        title = groups[0].name if len(groups) == 1 else name
        lines.append((title, kind, str(len(groups)), f"{sum(g.size for g in groups):,}", *shares))
    return lines


def frozen_lines(network: Network) -> Table:
    """A line for each reason, numbers in names aside: how many axes must stay for it, and of which parameters."""
    reasons: dict[str, Counter[str]] = {}
    for item in network.topology.frozen:
        reason = pattern(re.sub(r"^(as in [^:]*(:branch)?: )+", "", item.reason))
        name = pattern(item.leaf.removeprefix("params/"))
        place = f"{name}[{item.axis}]" if item.axis >= 0 else name
        reasons.setdefault(reason, Counter())[place] += 1
    lines: Table = []
    for reason, places in sorted(reasons.items(), key=lambda entry: -entry[1].total()):
        shown = [f"{place} ×{count}" if count > 1 else place for place, count in places.most_common(SHOWN)]
        more = [f"and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
        lines.append((reason, str(places.total()), ", ".join(shown + more)))
    lines += [(f"operation {name} is not known", "", "what it touches") for name in network.topology.unknown]
    return lines


def pattern(name: str) -> str:
    """A name with # for each of its numbers."""
    return re.sub(r"\d+", "#", name)


def show(titles: Sequence[str], lines: Table) -> None:
    """Prints a table: by rich on a terminal, and as aligned text into a file or pipe."""
    if not lines:
        return
    numbers = [all(re.fullmatch(r"[\d,.%]*", line[i]) for line in lines) for i in range(len(titles))]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(box=None, header_style="bold")
        for title, number in zip(titles, numbers, strict=True):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for line in lines:
            table.add_row(*(cell.replace("[", r"\[") for cell in line))
        Console().print()
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    for line in [("",) * len(titles), tuple(titles), *lines]:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numbers, strict=True)]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    cli.run(main)
