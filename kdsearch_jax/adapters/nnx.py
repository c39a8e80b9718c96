"""The adapter for Flax NNX: how a `FunctionalModule` is traced, and which arrays hold a layer's sizes.

An NNX module creates its arrays before it is called, so an architecture holds the shapes of its arrays; the layers'
attributes follow from them (`kdsearch_jax.adapters.nnx_layers`). The functions implement
`kdsearch_jax.adapters.base.Adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx, traverse_util

from kdsearch_jax.adapters.base import LayerInfo, LayerSizes, Shapes, Sizes, apply_function, integer_attributes
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.adapters.nnx_leaves import path_name
from kdsearch_jax.tracing.program import Program, flatten_jaxpr


def abstract_variables(module: FunctionalModule, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Shapes of the module's variables."""
    flat = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in module.leaves if not leaf.random}
    return {"params": {}, **traverse_util.unflatten_dict(flat, sep="/")}


def jaxpr(module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operations of `module.apply`."""
    return jax.make_jaxpr(apply_function(module, kwargs))(variables, *inputs)


def traced(module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The traced call, to be lowered."""
    return jax.jit(apply_function(module, kwargs)).trace(variables, *inputs)


def trace_layers(
    module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, LayerInfo], Any]:
    """Every submodule, and the operations of `module.apply`.

    Raises:
      ValueError: the output depends on random numbers.
    """
    nodes = _modules(module.skeleton())
    paths = sorted({leaf.place[0] for leaf in module.leaves if not leaf.random} | set(nodes))

    called: set[str] = set()

    def droppable(path: str) -> bool:
        """Whether it is one of Flax's own layers that is called and has no layers inside of it."""
        alone = not any(other.startswith(f"{path}/") for other in paths)
        return alone and path in called and type(nodes[path]).__module__.startswith("flax.nnx")

    def scoped(path: str, parent: str, call: Callable[[], Any]) -> Any:
        called.add(path)
        if not path:
            return call()
        with jax.named_scope(path.removeprefix(f"{parent}/")):  # puts the layer's name on its operations
            return call()

    with watched(module, scoped):
        closed = jaxpr(module, variables, inputs, kwargs)
    _check_deterministic(closed)
    grouped = {path for path, node in nodes.items() if isinstance(node, nnx.Conv)}
    return {
        path: LayerInfo(droppable(path), _own_arrays, path in grouped, _integers(nodes.get(path))) for path in paths
    }, closed


def resized(module: FunctionalModule, layers: LayerSizes, dropped: Sequence[str]) -> FunctionalModule:
    """The module with arrays of these shapes."""
    return module.resized(layers, tuple(dropped))


def layer_outputs(
    module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The output of each layer's first call, if it is one array."""
    seen: dict[str, Any] = {}

    def record(path: str, parent: str, call: Callable[[], Any]) -> Any:
        result = call()
        if isinstance(result, jax.Array):
            seen.setdefault(path, result)
        return result

    with watched(module, record):
        apply_function(module, kwargs)(variables, *inputs)
    return seen


def _own_arrays(before: Shapes, after: Shapes) -> Sizes:
    """The shapes of a layer's own arrays, by their names in it."""
    shapes = {name.partition("/")[2]: shape for name, shape in after.items() if name.count("/") == 1}
    return {name: shape for name, shape in shapes.items() if shape}


def _integers(node: Any) -> dict[str, int]:
    """Integers that a module of the user's own holds; those of Flax's layers follow from their arrays."""
    if node is None or type(node).__module__.startswith("flax."):
        return {}
    return integer_attributes({k: v for k, v in vars(node).items() if not isinstance(v, (nnx.Pytree, nnx.Variable))})


def _modules(root: Any) -> dict[str, nnx.Module]:
    """{path: module} of a module and everything inside of it."""
    nodes = nnx.iter_graph(root, graph=True)
    return {path_name(path): node for path, node in nodes if isinstance(node, nnx.Module)}


_PATH = "_kdsearch_path"
OnCall = Callable[[str, str, Callable[[], Any]], Any]


@contextmanager
def watched(module: FunctionalModule, on_call: OnCall) -> Iterator[None]:
    """Replaces every layer's call by `on_call(path, path of the caller, call)`.

    NNX has no interceptors, so the layers' classes are patched, as `nnx.capture` does. Each layer stores its path,
    which is kept by NNX transformations (`nnx.scan`, `nnx.remat`) that recreate the layer.
    """
    active: list[Any] = []

    def watching(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not active:  # the root module, which `apply` creates for this call
                for path, node in _modules(self).items():
                    setattr(node, _PATH, path)
            path = getattr(self, _PATH, None)
            if path is None or any(self is other for other in active):
                return original(self, *args, **kwargs)
            parent = getattr(active[-1], _PATH) if active else ""
            active.append(self)
            try:
                return on_call(path, parent, lambda: original(self, *args, **kwargs))
            finally:
                active.pop()

        return call

    kinds = {type(node) for node in _modules(module.skeleton()).values() if callable(node)}
    originals = {kind: vars(kind).get("__call__") for kind in kinds}
    try:
        for kind in kinds:
            kind.__call__ = watching(kind.__call__)  # type: ignore[method-assign]
        yield
    finally:
        for kind, original in originals.items():
            if original is None:
                del kind.__call__
            else:
                kind.__call__ = original  # type: ignore[method-assign]


def _check_deterministic(closed: Any) -> None:
    """Raises ValueError if a program draws random numbers from the module's own streams."""
    program = flatten_jaxpr(closed)
    computed = {value for op in program.ops for value in op.outputs}
    used = {value for op in program.ops for value in op.inputs} - computed
    draws = next(_draws(program), None)
    if draws is not None and any(jnp.issubdtype(program.avals[v].dtype, jax.dtypes.prng_key) for v in used):
        raise ValueError(
            f"the module draws random numbers in inference mode ({draws}); let its layers follow `deterministic`, "
            "which nnx.Module.eval sets, or a keyword of the call"
        )


def _draws(program: Program) -> Iterator[str]:
    """The operations that draw random numbers, including those in loops and conditionals."""
    for op in program.ops:
        if op.name in ("random_bits", "random_gamma", "threefry2x32", "rng_bit_generator"):
            yield op.where()
        for value in op.params.values():
            for body in value if isinstance(value, tuple) else (value,):
                if hasattr(body, "jaxpr") and hasattr(body, "consts"):
                    yield from _draws(flatten_jaxpr(body))
