"""`kd.save` and `kd.load`: a student, or any network, as a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.nnx

from kdsearch_jax import storage
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning.student import Student
from kdsearch_jax.storage.networks import in_boxes, load_network, module_info, save_network


def save(student: Student, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a student's directory: its architecture, and its arrays with digests. `load` reads it.

    path: a directory, or an address in an object store such as gs://BUCKET/NAME.

    Raises:
      OSError: there is something already, and not `overwrite`.
    """
    module, variables = student
    if isinstance(module, flax.nnx.Module):
        module, variables = FunctionalModule.split(module)
    with storage.named():
        save_network(path, student.architecture, variables, module_info(module, student.architecture), overwrite)


def load(path: str | Path, module: Any = None, *, trust_code: bool = False) -> Student:
    """The network in a directory, such as RUN/student, RUN/teacher/network or gs://BUCKET/NAME.

    Args:
      module: the model that was searched, Linen or NNX, for a network that the directory could not name, as its class
        is local or was given as an object: a module; an abstract one, `nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))`;
        or what makes one, a class or `functools.partial(Net, width=64)`. Its arguments are those of then; its
        parameters are not looked at.
      trust_code: a network of a package that you have not imported may import it, so that its code runs.

    Raises:
      ValueError, OSError: it is not a network's directory, or damaged, or `module` is another one.
    """
    with storage.named():
        found, variables, architecture, info = load_network(path, module, trust_code=trust_code)
        variables = in_boxes(found, variables, architecture, info)
    if isinstance(found, FunctionalModule):
        found = found.bind(variables)
    return Student(found, variables, architecture)
