"""Students of any origin as rows of a comparison: `--rows external:DIR`.

DIR is a network directory (`kdsearch_jax.storage.networks`, `kd.save`) or an exported student. The student is checked
before anything is written, copied to the row's directory, and trained like every other row. The row stores its digest,
so that a row is never resumed or reported with another student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.pruning.network import count
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs.comparison.rows import Row
from kdsearch_jax.runs.setup import PROOF_EXAMPLES, RunSetup, resolve_limits
from kdsearch_jax.runs.teacher_source import LoadedNetwork, check_network
from kdsearch_jax.storage import export_formats
from kdsearch_jax.storage.files import one_line, read_sealed
from kdsearch_jax.storage.networks import save_network

TOLERANCE = 0.005  # by which an external student may exceed the budget, as a share of it
KEY = "external"  # of a row's result, and of the info of its network: {"source", "digest"}


@dataclass(frozen=True)
class ExternalStudent:
    """A checked student; label: in tables; macs, params: counted anew, whatever its files say."""

    source: Path
    label: str
    network: LoadedNetwork
    digest: str
    macs: int
    params: int

    @property
    def record(self) -> dict[str, str]:
        """The origin that a row stores."""
        return {"source": str(self.source), "digest": self.digest}


def load_students(setup: RunSetup, rows: Sequence[Row], trust_code: bool = False) -> dict[str, ExternalStudent]:
    """{row: student} of all external rows, read and checked; writes nothing.

    Args:
      trust_code: students may import the packages that they name.

    Raises:
      ValueError: a student cannot be read, is of another task, or differs from the one that its row was made from.
    """
    students = {row.name: _read(setup, row, trust_code) for row in rows if row.how == "external"}
    for name, student in students.items():
        for directory in setup.directory.glob(f"seed-*/{name}"):
            check_same(directory, student)
    return students


def check_budget(setup: RunSetup, students: Mapping[str, ExternalStudent], budget: BudgetConfig) -> None:
    """Raises ValueError if a student costs more than the budget of all rows, beyond `TOLERANCE`."""
    if not students:
        return
    limits = resolve_limits(dataclasses.replace(setup.experiment, budget=budget), setup.trace_teacher())[0]
    for student in students.values():
        for name, unit, way_out in (
            ("macs", "MACs", "a larger --budget.macs"),
            ("params", "parameters", "--match macs"),
        ):
            cost, bound = getattr(student, name), getattr(limits, name)
            if bound is not None and cost > bound * (1 + TOLERANCE):
                raise ValueError(
                    f"rows: external:{student.source} has {cost:,} {unit}, more than the budget of {bound:,.0f}; give "
                    f"a smaller student, or {way_out}"
                )


def check_same(directory: Path, student: ExternalStudent) -> None:
    """Raises ValueError if the row in `directory` was made, or begun, with another student."""
    stored = None
    if (path := directory / "result.json").is_file():
        stored = read_sealed(path).get(KEY)
    elif (directory / "start" / "network.json").is_file():
        stored = LoadedNetwork.of(directory / "start", trust_code=True).info.get(KEY)
    if stored is not None and stored.get("digest") != student.digest:
        raise ValueError(
            f"rows: external:{student.source} has the digest {student.digest}, but {directory} was made from a student "
            f"with {stored.get('digest')}; restore that one, rename yours, or remove the row's directory"
        )


def copy(directory: Path, student: ExternalStudent) -> Path:
    """Copies the student to the network directory `directory`, unless that is done; returns `directory`."""
    if not (directory / "network.json").is_file():
        network = student.network
        info = {**network.info, "macs": student.macs, "params": student.params, KEY: student.record}
        save_network(directory, network.architecture, network.variables, info)
    return directory


def _read(setup: RunSetup, row: Row, trust_code: bool) -> ExternalStudent:
    path, setting = row.source, "rows"
    assert path is not None
    try:
        if export_formats.is_exported_student(path):
            network = LoadedNetwork(*export_formats.read_safetensors(path, trust_code=trust_code))
        else:
            network = LoadedNetwork.of(path, trust_code=trust_code)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"{setting}: external:{path} cannot be read: {one_line(error)}") from error
    outputs = check_network(f"external:{path}", network, setup.experiment, setup.dataset, setting)
    _check_task(path, network, outputs, setup)
    call = network.architecture.call_spec
    cost = count(network.module, *call.example(PROOF_EXAMPLES), **call.keywords(network.module, train=False))
    label = str(network.info.get("name") or row.label)
    return ExternalStudent(path, label, network, network.digest, cost.macs, cost.params)


def _check_task(path: Path, network: LoadedNetwork, outputs: Any, setup: RunSetup) -> None:
    """Raises ValueError if the student's outputs or normalisation are not those of the comparison."""
    call = setup.objective.call
    variables = setup.trace_teacher().adapter.abstract_variables(
        setup.module, call.example(1), call.keywords(setup.module, train=False)
    )
    expected = jax.eval_shape(
        lambda v, *xs: apply_eval(setup.module, v, xs, call_spec=call), variables, *call.example(1)
    )
    if outputs is not None and jax.tree.map(lambda x: x.shape, outputs) != jax.tree.map(lambda x: x.shape, expected):
        raise ValueError(
            f"rows: external:{path} has outputs {jax.tree.map(lambda x: x.shape[1:], outputs)}, the teacher "
            f"{jax.tree.map(lambda x: x.shape[1:], expected)}; give a student for the same task"
        )
    for name in ("mean", "std"):
        own, used = network.info.get(name), getattr(setup.dataset, name)
        if own and used and tuple(own) != tuple(used):
            raise ValueError(
                f"rows: external:{path} was made for images normalised with {name} {tuple(own)}, here it is "
                f"{tuple(used)}; give a student with the teacher's normalisation, or its own by --data.{name}"
            )
