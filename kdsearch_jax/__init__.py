"""kdsearch_jax: finds the sub-network that learns best from a teacher, cuts it out, and distils into it.

    python -m kdsearch_jax.search                        the whole road, on the bundled digits
    module, variables = kdsearch_jax.load("RUN/student")  the student that it leaves behind

For use from Python: `trace` a module, `fold` gates into its variables, `prune` and `verify` the student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdsearch_jax.search import search

__all__ = ["load", "search"]

__version__ = "0.1.0"


def load(path: str | Path, module: Any = None, *, trust_code: bool = False) -> tuple[Any, Any]:
    """(module, variables) of the network in a directory, such as RUN/student, RUN/teacher/network or gs://BUCKET/NAME.

    Variables are in boxes (`nn.Partitioned`) if those that were searched were.

    module: the model that was searched, for a network that the directory could not name, as its class is local or was
      given as an object: a module; an abstract one, `nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))`; or what makes one,
      a class or `functools.partial(Net, width=64)`. Its arguments are those of then; its parameters are not looked at.
    trust_code: a network of a package that you have not imported may import it, so that its code runs.

    Raises:
      ValueError, OSError: where it is not a network's directory, or damaged, or `module` is another one.
    """
    from kdsearch_jax import storage
    from kdsearch_jax.checkpoint import in_boxes, load_network

    with storage.named():
        module, variables, architecture, info = load_network(path, module, trust_code=trust_code)
    return module, in_boxes(module, variables, architecture, info)
