"""The adapter for Flax NNX: how a `FunctionalModule` is traced, and which arrays hold a layer's sizes.

An NNX module makes its arrays before it is called, so its sizes are the shapes of its arrays: that is what an
architecture names, and the layers' attributes follow (`kdsearch_jax.adapters.functional_module`). See
`kdsearch_jax.adapters.base.Library`
for what each function promises.
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

from kdsearch_jax.adapters.base import Layer, Layers, Shapes, Sizes, bound, numbers_in
from kdsearch_jax.adapters.functional_module import FunctionalModule, path_name
from kdsearch_jax.tracing.program import Program, flatten


def variables(module: FunctionalModule, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Shapes of the module's variables."""
    flat = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in module.leaves if not leaf.random}
    return {"params": {}, **traverse_util.unflatten_dict(flat, sep="/")}


def jaxpr(module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operations of `module.apply`."""
    return jax.make_jaxpr(_call(module, kwargs))(variables, *inputs)


def traced(module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same, to be lowered."""
    return jax.jit(_call(module, kwargs)).trace(variables, *inputs)


def layers(
    module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Layer], Any]:
    """Every part of the module that holds arrays, and the operations of `module.apply`.

    Raises:
      ValueError: the output depends on random numbers.
    """
    nodes = _modules(module.skeleton())
    paths = sorted({leaf.place[0] for leaf in module.leaves if not leaf.random} | set(nodes))

    called: set[str] = set()

    def droppable(path: str) -> bool:
        """A layer of Flax's own that is called, and not read from outside; no other layer inside of it has arrays."""
        alone = not any(other.startswith(f"{path}/") for other in paths)
        return alone and path in called and type(nodes[path]).__module__.startswith("flax.nnx")

    def scoped(path: str, parent: str, call: Callable[[], Any]) -> Any:
        called.add(path)
        if not path:
            return call()
        with jax.named_scope(path.removeprefix(f"{parent}/")):  # the layer's name, on its operations
            return call()

    with watched(module, scoped):
        made = jaxpr(module, variables, inputs, kwargs)
    _check_certain(made)
    grouped = {path for path, node in nodes.items() if isinstance(node, nnx.Conv)}
    return {path: Layer(droppable(path), _shapes, path in grouped, _numbers(nodes.get(path))) for path in paths}, made


def cut(module: FunctionalModule, layers: Layers, dropped: Sequence[str]) -> FunctionalModule:
    """The module with arrays of these shapes."""
    return module.cut(layers, tuple(dropped))


def outputs(
    module: FunctionalModule, variables: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Each layer's first output that is one array."""
    seen: dict[str, Any] = {}

    def record(path: str, parent: str, call: Callable[[], Any]) -> Any:
        result = call()
        if isinstance(result, jax.Array) and not isinstance(result, jax.core.Tracer):
            seen.setdefault(path, result)
        return result

    with watched(module, record):
        _call(module, kwargs)(variables, *inputs)
    return seen


def _call(module: FunctionalModule, kwargs: Mapping[str, Any]) -> Any:
    def call(variables: Any, *inputs: Any) -> Any:
        args, keywords = bound(inputs, kwargs)
        return module.apply(variables, *args, **keywords)

    return call


def _shapes(before: Shapes, after: Shapes) -> Sizes:
    """The shapes of a layer's own arrays, by their names in it."""
    own = {name.partition("/")[2]: shape for name, shape in after.items() if name.count("/") == 1}
    return {name: shape for name, shape in own.items() if shape}


def _numbers(node: Any) -> dict[str, int]:
    """Whole numbers that a module of the user's own holds; those of Flax's layers follow their arrays."""
    if node is None or type(node).__module__.startswith("flax."):
        return {}
    return numbers_in({k: v for k, v in vars(node).items() if not isinstance(v, (nnx.Pytree, nnx.Variable))})


def _modules(root: Any) -> dict[str, nnx.Module]:
    """{path: module} of a module and all that are inside of it."""
    nodes = nnx.iter_graph(root, graph=True)
    return {path_name(path): node for path, node in nodes if isinstance(node, nnx.Module)}


_PATH = "_kdsearch_path"
OnCall = Callable[[str, str, Callable[[], Any]], Any]


@contextmanager
def watched(module: FunctionalModule, on_call: OnCall) -> Iterator[None]:
    """While it lasts, `on_call(path, path of the caller, call)` stands around every layer's call.

    NNX has no interceptors: the layers' classes are changed for the time, as `nnx.capture` does. Each layer is told its
    path, so that it is known as well where a transformation of NNX (`nnx.scan`, `nnx.remat`) has made it anew.
    """
    active: list[Any] = []

    def watching(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not active:  # the module itself, made for this call only
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
    own = {kind: vars(kind).get("__call__") for kind in kinds}
    try:
        for kind in kinds:
            kind.__call__ = watching(kind.__call__)  # type: ignore[method-assign]
        yield
    finally:
        for kind, original in own.items():
            if original is None:
                del kind.__call__
            else:
                kind.__call__ = original  # type: ignore[method-assign]


def _check_certain(closed: Any) -> None:
    """Raises ValueError where a program draws random numbers by the keys of the module's own streams."""
    program = flatten(closed)
    made = {value for op in program.ops for value in op.outputs}
    used = {value for op in program.ops for value in op.inputs} - made
    draws = next(_draws(program), None)
    if draws is not None and any(jnp.issubdtype(program.avals[v].dtype, jax.dtypes.prng_key) for v in used):
        raise ValueError(
            f"the module draws random numbers in inference mode ({draws}); let its layers follow `deterministic`, "
            "which nnx.Module.eval sets, or a keyword of the call"
        )


def _draws(program: Program) -> Iterator[str]:
    """Where random numbers are drawn, in loops and choices as well."""
    for op in program.ops:
        if op.name in ("random_bits", "random_gamma", "threefry2x32", "rng_bit_generator"):
            yield op.where()
        for value in op.params.values():
            for body in value if isinstance(value, tuple) else (value,):
                if hasattr(body, "jaxpr") and hasattr(body, "consts"):
                    yield from _draws(flatten(body))
