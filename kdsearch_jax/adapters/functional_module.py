"""An nnx.Module as a pure function of its variables, with the `init` and `apply` of a Linen module.

NNX stores parameters in the module. A `FunctionalModule` is the module without them: its graph (`nnx.split`) and the
place of each array. Its variables are a plain dictionary like Linen's,

    {"params": {"block": {"conv": {"kernel": …}}}, "batch_stats": …}

with one collection per type of Variable: `params` for `nnx.Param` and its subclasses, `arrays` for arrays outside of
Variables, and the type's name otherwise. The state of random streams is not part of them: `apply` seeds every stream
from the keys that it is given. A shared Variable appears once, at its first path.

`resized` returns a student: sizes are written into the graph, so `bind` returns a module of the user's own class whose
layers report their true sizes.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from kdsearch_jax.adapters.base import LayerSizes, replace_integer
from kdsearch_jax.adapters.nnx_layers import layer_attributes
from kdsearch_jax.adapters.nnx_leaves import (
    STUDENT,
    Leaf,
    initial_state,
    is_key,
    nest,
    path_name,
    require_keys,
    split_module,
    stream_keys,
    variable_array,
)

# Called with the module that `FunctionalModule.apply` creates for one call, before it is called.
module_hook: ContextVar[Callable[[nnx.Module], None] | None] = ContextVar("module_hook", default=None)


@dataclass(frozen=True)
class FunctionalModule:
    """An nnx.Module without its arrays. Modules of the same graph, sizes and base are equal.

    Attributes:
      graph: from `nnx.split`.
      leaves: its arrays, in order.
      kind: the module's class.
      factory: random streams → a fresh module; None if the module was passed as an instance.
      origin: (name, arguments) for `kdsearch_jax.adapters.registry.build`, if known.
      base: the module that a student was pruned from; None if this is not a student.
      layers, dropped: the student's sizes and dropped layers, relative to `base`, as in `Architecture`.
    """

    graph: Any
    leaves: tuple[Leaf, ...]
    kind: type[nnx.Module]
    factory: Callable[[nnx.Rngs], nnx.Module] | None = field(default=None, compare=False, repr=False)
    origin: tuple[str, Mapping[str, Any]] | None = field(default=None, compare=False, repr=False)
    base: FunctionalModule | None = field(default=None, repr=False)
    layers: LayerSizes = field(default_factory=dict, compare=False)  # implied by `leaves`
    dropped: tuple[str, ...] = ()

    @staticmethod
    def split(module: nnx.Module) -> tuple[FunctionalModule, dict[str, Any]]:
        """(the module as a function, its variables); the module itself is not changed.

        A student that `bind` returned keeps its base, unless its attributes or layers were changed since (`train` and
        `eval` aside).

        Raises:
          ValueError: a Variable does not hold one array.
        """
        graph, leaves, values = split_module(module)
        function = FunctionalModule(graph, leaves, type(module))
        student = vars(module).get(STUDENT)
        if student is not None and function._same_structure(student):
            function = replace(student, graph=graph, leaves=leaves)
        return function, {"params": {}, **nest(leaves, values)}

    def _same_structure(self, other: FunctionalModule) -> bool:
        """Whether arrays and attributes are those of `other`, dtypes and mode aside."""

        def arrays(module: FunctionalModule) -> list[Any]:
            return [(leaf.path, leaf.name, leaf.shape) for leaf in module.leaves]

        return arrays(self) == arrays(other) and self.in_mode("eval").graph == other.in_mode("eval").graph

    @property
    def mode(self) -> str | None:
        """ "train" or "eval", whichever the module is in; None if it is in neither, or they do not differ."""
        graphs = {mode: self.in_mode(mode).graph for mode in ("train", "eval")}
        same = [mode for mode, graph in graphs.items() if graph == self.graph]
        return same[0] if len(same) == 1 else None

    def in_mode(self, mode: str) -> FunctionalModule:
        """The module after `nnx.Module.train` or `eval`; `bind` returns it in that mode."""
        module = self.skeleton()
        module.train() if mode == "train" else module.eval()
        base = None if self.base is None else self.base.in_mode(mode)
        return replace(self, graph=split_module(module)[0], base=base)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = self.kind.__name__
        raise AttributeError(
            f"this {kind} as a function of its variables has no attribute {name!r}; bind(variables) gives the {kind}"
        )

    def __repr__(self) -> str:
        count = sum(not leaf.random for leaf in self.leaves)
        return f"<{self.kind.__name__} as a function of its {count} arrays{', pruned' if self.base else ''}>"

    def __hash__(self) -> int:
        return hash((self.kind, self.leaves, self.dropped))  # not of all that is compared: hashed at every `nnx.jit`

    @staticmethod
    def make(factory: Callable[..., nnx.Module], arguments: Mapping[str, Any]) -> FunctionalModule:
        """The module that `factory(**arguments, rngs=…)` creates, without allocating arrays.

        `rngs` is omitted if the factory has no such argument; `init` then does not depend on its key.
        """
        seeded = "rngs" in parameters_of(factory) and "rngs" not in arguments

        def build(rngs: nnx.Rngs) -> nnx.Module:
            return factory(**arguments, rngs=rngs) if seeded else factory(**arguments)

        results: list[tuple[Any, tuple[Leaf, ...], type[nnx.Module]]] = []

        def abstract() -> None:
            module = build(nnx.Rngs(0))
            if not isinstance(module, nnx.Module):
                raise ValueError(f"{factory!r} must return a flax.nnx.Module, got {type(module).__name__}")
            graph, leaves, _ = split_module(module)
            results.append((graph, leaves, type(module)))

        try:
            jax.eval_shape(abstract)
        except ValueError:  # variables with a sharding, but no mesh
            with nnx.use_eager_sharding(False):
                jax.eval_shape(abstract)
        return FunctionalModule(*results[-1], build)

    @cached_property
    def signature(self) -> inspect.Signature:
        """The signature of the module's call, with `train` added if it has none."""
        parameters = list(inspect.signature(self.kind.__call__).parameters.values())[1:]
        mode = inspect.Parameter("train", inspect.Parameter.KEYWORD_ONLY, default=False)
        last = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        return inspect.Signature(parameters if self._has_mode else [*parameters[:last], mode, *parameters[last:]])

    @cached_property
    def _has_mode(self) -> bool:
        return "train" in inspect.signature(self.kind.__call__).parameters

    def init(self, rngs: Any, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        """Fresh variables; those of a student are the first entries of its base's. `inputs` are ignored.

        Args:
          rngs: a key, or {stream: key}.

        Raises:
          ValueError: the module was passed as an instance, so it is not known how to create it.
        """
        if self.factory is None:
            raise ValueError(
                f"init: this {self.kind.__name__} was passed as an instance; use its own variables "
                "(FunctionalModule.split), or name the function that creates it (package.module:factory)"
            )
        rngs = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
        module = self.factory(nnx.Rngs(rngs.pop("params", None), **rngs))
        _, leaves, values = split_module(module)
        fresh = {leaf.name: value for leaf, value in zip(leaves, values, strict=True) if not leaf.random}
        arrays = [leaf for leaf in self.leaves if not leaf.random]
        return nest(arrays, [fresh[leaf.name][tuple(map(slice, leaf.shape))] for leaf in arrays])

    def apply(
        self, variables: Any, *inputs: Any, train: bool = False, rngs: Any = None, mutable: Any = False, **kwargs: Any
    ) -> Any:
        """The module's output; with `mutable`, (output, {collection: its new values}) for the collections named.

        Args:
          train: puts the module in training or inference mode (`nnx.Module.train`, `eval`), and is passed to the call
            if that takes `train`.
          rngs: a key, or {stream: key}; other streams draw from "default", else from "params" or "dropout".

        Raises:
          ValueError: the variables are not this module's, or a stream without a key is drawn from in training.
        """
        module = self._merged(variables, rngs)
        module.train() if train else module.eval()
        if train:
            require_keys(module, stream_keys(rngs))
        if (change := module_hook.get()) is not None:
            change(module)
        output = module(*inputs, **kwargs, **({"train": train} if self._has_mode else {}))
        if mutable is False:
            return output
        names = [mutable] if isinstance(mutable, str) else mutable
        after = dict(nnx.to_flat_state(nnx.split(module, graph=True)[1]))
        kept = [x for x in self.leaves if not x.random and (mutable is True or x.name.partition("/")[0] in names)]
        return output, nest(kept, [variable_array(after[leaf.path], leaf.path) for leaf in kept])

    def bind(self, variables: Any, seed: Any = None) -> nnx.Module:
        """A module of the user's own class with these variables, in the mode that the original was in.

        A student stores its base in an attribute that is copied with it; see `split`.

        Args:
          seed: for random streams: an int, a key, or {stream: key}.

        Raises:
          ValueError: the variables are not this module's.
        """
        module = self._merged(variables, seed)
        if self.base is not None:
            object.__setattr__(module, STUDENT, self)
        return module

    def _merged(self, variables: Any, seed: Any) -> nnx.Module:
        """The module with these variables."""
        arrays: dict[str, Any] = traverse_util.flatten_dict(dict(variables), sep="/")
        shapes = {leaf.name: leaf.shape for leaf in self.leaves if not leaf.random}
        for name in [*shapes, *arrays]:
            shape = tuple(arrays[name].shape) if name in arrays else None
            if shapes.get(name) != shape:
                expected = f"{shapes[name]} is" if name in shapes else "none is"
                raise ValueError(f"variables: {name} has shape {shape}, {expected} expected by {self.kind.__name__}")
        keys, state = stream_keys(seed), []
        for number, leaf in enumerate(self.leaves):
            state.append((leaf.path, initial_state(leaf, number, keys) if leaf.random else arrays[leaf.name]))
        return nnx.merge(self.graph, nnx.from_flat_state(state))

    def skeleton(self) -> nnx.Module:
        """The module with broadcast zeros for arrays, which take no memory."""
        zeros = [np.zeros((), np.uint32 if is_key(leaf) else leaf.dtype) for leaf in self.leaves]
        stand_ins = [np.broadcast_to(zero, leaf.shape) for zero, leaf in zip(zeros, self.leaves, strict=True)]
        return nnx.merge(self.graph, nnx.from_flat_state(zip((x.path for x in self.leaves), stand_ins, strict=True)))

    def resized(self, layers: LayerSizes, dropped: tuple[str, ...]) -> FunctionalModule:
        """The student with these sizes: its arrays, the matching attributes, and `Zeros` for dropped layers.

        Args:
          layers: {path of a module: {array: shape, integer (as in `base.integer_attributes`): value}}, relative to
            `base`; everything else keeps its size.
          dropped: paths of layers that return zeros.

        Raises:
          ValueError: there is no such layer or array.
        """
        base = self.base or self
        dtypes = {leaf.name: leaf.dtype for leaf in self.leaves if not leaf.random}
        places = [leaf.place if not leaf.random else ("", "") for leaf in base.leaves]
        nodes = nnx.iter_graph(base.skeleton(), graph=True)
        paths = {path for path, _ in places} | {path_name(path) for path, _ in nodes}
        _check_names(layers, dropped, paths, base)
        shapes = [
            tuple(layers.get(path, {}).get(name, x.shape)) for (path, name), x in zip(places, base.leaves, strict=True)
        ]
        student = replace(
            base,
            leaves=tuple(
                replace(x, shape=shape, dtype=x.dtype if x.random else dtypes.get(x.name, x.dtype))
                for x, shape in zip(base.leaves, shapes, strict=True)
            ),
        )
        module = student.skeleton()
        old, new = (dict(nnx.iter_graph(m, graph=True)) for m in (base.skeleton(), module))
        for path, node in new.items():
            if isinstance(node, nnx.Module):
                for name, value in layer_attributes(old[path], node).items():
                    setattr(node, name, value)
                _set_integers(node, path_name(path), layers.get(path_name(path), {}), set(places))
        _replace_by_zeros(module, {id(node) for path, node in new.items() if path_name(path) in dropped})
        graph, leaves, _ = split_module(module)
        by_path = {leaf.path: leaf for leaf in student.leaves}
        leaves = tuple(by_path[leaf.path] for leaf in leaves)  # the skeleton has integers for keys
        frozen = {path: dict(sizes) for path, sizes in layers.items()}
        return replace(student, graph=graph, leaves=leaves, base=base, layers=frozen, dropped=tuple(sorted(dropped)))


def parameters_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """{name: parameter} of a function or a module's class; the signature of an NNX class itself shows none."""
    if isinstance(factory, functools.partial):
        signature = inspect.Signature(list(parameters_of(factory.func).values()))
        bound = signature.bind_partial(*factory.args).arguments
        return {name: parameter for name, parameter in signature.parameters.items() if name not in bound}
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        return dict(list(inspect.signature(factory.__init__).parameters.items())[1:])
    return dict(inspect.signature(factory).parameters)


class Zeros(nnx.Module):
    """Replaces a layer whose residual branch was removed: returns zeros of its output's shape and holds no arrays."""

    def __init__(self, layer: FunctionalModule):
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shapes and dtypes that the layer would return; its parameters have the type of its inputs."""
        arrays = [leaf for leaf in self.layer.leaves if not leaf.random]
        floats = {leaf.dtype for leaf in jax.tree.leaves((args, kwargs)) if _is_float(leaf)}
        # Where all computes in bfloat16, float32 zeros would widen what they are added to.
        narrow = floats.pop() if len(floats) == 1 else None
        dtypes = [narrow if narrow == jnp.bfloat16 and leaf.dtype == jnp.float32 else leaf.dtype for leaf in arrays]
        variables = nest(
            arrays, [jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf, dtype in zip(arrays, dtypes, strict=True)]
        )
        output = jax.eval_shape(lambda leaves: self.layer.apply(leaves, *args, **kwargs), variables)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _check_names(layers: LayerSizes, dropped: tuple[str, ...], paths: set[str], base: FunctionalModule) -> None:
    """Raises ValueError if the module lacks a layer that is named, or an array would become larger."""
    kind, shapes = base.kind.__name__, {leaf.place: leaf.shape for leaf in base.leaves if not leaf.random}
    for path in [*layers, *dropped]:
        if path not in paths:
            near = difflib.get_close_matches(path, paths, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"architecture: the model has no layer {path!r}{hint} ({kind})")
        for name, size in layers.get(path, {}).items():
            shape = shapes.get((path, name))
            if shape is not None and (len(size) != len(shape) or any(a > b for a, b in zip(size, shape, strict=True))):
                raise ValueError(f"architecture: {name!r} of layer {path!r} is {tuple(size)}; in {kind} it is {shape}")


def _set_integers(node: nnx.Module, path: str, sizes: Mapping[str, Any], places: set[tuple[str, str]]) -> None:
    """Sets the integers among a layer's sizes: attributes, or integers inside them ("config.heads").

    Raises:
      ValueError: the layer has no such array or integer.
    """
    for name, value in sizes.items():
        if (path, name) in places:
            continue
        attribute, _, inside = name.partition(".")
        try:
            if attribute.startswith("_"):
                raise AttributeError(attribute)
            setattr(node, attribute, replace_integer(getattr(node, attribute), inside, value))
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"architecture: layer {path!r} has no array and no integer {name!r}") from error
        if isinstance(node, nnx.Conv):  # for groups that lose the same channels each, instead of whole groups
            node.in_features = node.kernel.shape[-2] * node.feature_group_count


def _replace_by_zeros(module: nnx.Module, gone: set[int]) -> None:
    """Replaces nodes by `Zeros` wherever the module refers to them."""
    replacements: dict[int, Zeros] = {}

    def replacement(value: Any) -> Any:
        if id(value) not in gone:
            return value
        if id(value) not in replacements:
            graph, leaves, _ = split_module(value)
            replacements[id(value)] = Zeros(FunctionalModule(graph, leaves, type(value)))
        return replacements[id(value)]

    for _, node in list(nnx.iter_graph(module, graph=True)):
        if not isinstance(node, nnx.Pytree) or id(node) in gone:
            continue
        for name, value in list(vars(node).items()):
            if id(value) in gone:
                setattr(node, name, replacement(value))
            elif isinstance(value, (list, tuple, dict)) and not name.startswith("_pytree__"):
                inside = jax.tree.map(replacement, value, is_leaf=lambda x: isinstance(x, (nnx.Pytree, nnx.Variable)))
                if any(a is not b for a, b in zip(*map(_tree_items, (value, inside)), strict=True)):
                    setattr(node, name, nnx.data(inside))


def _tree_items(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (nnx.Pytree, nnx.Variable)))
