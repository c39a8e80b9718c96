"""An nnx.Module as a pure function of its variables, called as a Linen module is: `init` and `apply`.

NNX keeps parameters in the module itself. `FunctionalModule` holds what is left without them: the graph of the module
(`nnx.split`), and where each array belongs. Its variables are a plain dictionary like Linen's,

    {"params": {"block": {"conv": {"kernel": …}}}, "batch_stats": …}

with a collection for each type of Variable: `params` for `nnx.Param` and what derives from it, `arrays` for arrays that
are no Variables, and the type's name otherwise. The state of random streams is not among them: `apply` seeds every
stream from the keys that it is given. A Variable that is reached by two paths is there once, by its first path.

`cut` makes the student: sizes are written into the graph, so it is a module of the user's own class whose layers tell
their true sizes, and `bind` gives it back as such. This file knows nothing about search or slicing.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from kdsearch_jax.adapters.base import with_number
from kdsearch_jax.adapters.nnx_attributes import attributes

Layers = Mapping[str, Mapping[str, Any]]  # {path: {attribute that is an array: its shape}}
_STUDENT = "_kdsearch_student"  # an attribute of modules that `FunctionalModule.bind` returns: the student's

# Changes a module that `FunctionalModule.apply` has made for one call, before it is called.
prepare: ContextVar[Callable[[nnx.Module], None] | None] = ContextVar("prepare", default=None)


@dataclass(frozen=True)
class Leaf:
    """An array of the module. path: as NNX has it; name: "params/conv/kernel", or the tag of a random stream."""

    path: tuple[Any, ...]
    name: str
    shape: tuple[int, ...]
    dtype: Any
    random: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """(path of what holds it, its name there)."""
        path, _, attribute = self.name.partition("/")[2].rpartition("/")
        return path, attribute


@dataclass(frozen=True)
class FunctionalModule:
    """A module without its arrays; equal to another of the same graph, sizes and cuts.

    graph: from `nnx.split`; leaves: its arrays, in their order; kind: the module's class.
    factory: random streams → a fresh module; None where the module came as an instance.
    origin: (name, arguments) by which `kdsearch_jax.adapters.registry.build` makes it, if any.
    base, layers, dropped: what `cut` was given; None, (), () for a module that was not cut. A module that was cut more
      than once has the first base, and all that was cut from that.
    """

    graph: Any
    leaves: tuple[Leaf, ...]
    kind: type[nnx.Module]
    factory: Callable[[nnx.Rngs], nnx.Module] | None = field(default=None, compare=False, repr=False)
    origin: tuple[str, Mapping[str, Any]] | None = field(default=None, compare=False, repr=False)
    base: FunctionalModule | None = field(default=None, repr=False)
    layers: Layers = field(default_factory=dict, compare=False)  # `leaves` say as much
    dropped: tuple[str, ...] = ()

    @staticmethod
    def split(module: nnx.Module) -> tuple[FunctionalModule, dict[str, Any]]:
        """(the module's function, its variables); the module itself is not changed.

        A student that `bind` returned is recognized: its base and its cuts are known again. One whose attributes or
        layers were changed since then (`train` and `eval` aside) is a module of its own, without a base.

        Raises:
          ValueError: a Variable holds something else than one array.
        """
        graph, leaves, values = _split(module)
        own = FunctionalModule(graph, leaves, type(module))
        student = vars(module).get(_STUDENT)
        if student is not None and own.is_still(student):
            own = replace(student, graph=graph, leaves=leaves)
        return own, {"params": {}, **_nested(leaves, values)}

    def is_still(self, other: FunctionalModule) -> bool:
        """Whether arrays and attributes are those of `other`, but for dtypes and the mode."""

        def known(functional: FunctionalModule) -> list[Any]:
            return [(leaf.path, leaf.name, leaf.shape) for leaf in functional.leaves]

        return known(self) == known(other) and self.in_mode("eval").graph == other.in_mode("eval").graph

    @property
    def mode(self) -> str | None:
        """ "train" or "eval", whichever put the module as it is; None where neither did, or both do the same."""
        graphs = {mode: self.in_mode(mode).graph for mode in ("train", "eval")}
        same = [mode for mode, graph in graphs.items() if graph == self.graph]
        return same[0] if len(same) == 1 else None

    def in_mode(self, mode: str) -> FunctionalModule:
        """The module after `nnx.Module.train` or `eval`; `bind` gives it in that mode."""
        module = self.skeleton()
        module.train() if mode == "train" else module.eval()
        base = None if self.base is None else self.base.in_mode(mode)
        return replace(self, graph=_split(module)[0], base=base)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = self.kind.__name__
        raise AttributeError(
            f"this {kind} as a function of its variables has no attribute {name!r}; bind(variables) gives the {kind}"
        )

    def __repr__(self) -> str:
        count = sum(not leaf.random for leaf in self.leaves)
        return f"<{self.kind.__name__} as a function of its {count} arrays{', cut' if self.base else ''}>"

    def __hash__(self) -> int:
        return hash((self.kind, self.leaves, self.dropped))  # not of all that is compared: hashed at every `nnx.jit`

    @staticmethod
    def make(factory: Callable[..., nnx.Module], arguments: Mapping[str, Any]) -> FunctionalModule:
        """The module that `factory(**arguments, rngs=…)` would make; no array is.

        `rngs` is left out where the factory has no such argument; `init` then gives whatever the factory does.
        """
        seeded = "rngs" in parameters_of(factory) and "rngs" not in arguments

        def build(rngs: nnx.Rngs) -> nnx.Module:
            return factory(**arguments, rngs=rngs) if seeded else factory(**arguments)

        found: list[tuple[Any, tuple[Leaf, ...], type[nnx.Module]]] = []

        def abstract() -> None:
            module = build(nnx.Rngs(0))
            if not isinstance(module, nnx.Module):
                raise ValueError(f"{factory!r} must return a flax.nnx.Module, got {type(module).__name__}")
            graph, leaves, _ = _split(module)
            found.append((graph, leaves, type(module)))

        try:
            jax.eval_shape(abstract)
        except ValueError:  # variables that are to be sharded, and no mesh
            with nnx.use_eager_sharding(False):
                jax.eval_shape(abstract)
        return FunctionalModule(*found[-1], build)

    @cached_property
    def signature(self) -> inspect.Signature:
        """Of a call in terms of `apply`: the module's own, and `train` where that has none."""
        own = list(inspect.signature(self.kind.__call__).parameters.values())[1:]
        mode = inspect.Parameter("train", inspect.Parameter.KEYWORD_ONLY, default=False)
        last = next((i for i, p in enumerate(own) if p.kind is p.VAR_KEYWORD), len(own))
        return inspect.Signature(own if self._has_mode else [*own[:last], mode, *own[last:]])

    @cached_property
    def _has_mode(self) -> bool:
        return "train" in inspect.signature(self.kind.__call__).parameters

    def init(self, rngs: Any, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        """Fresh variables; a cut module has the first entries of what its base would have. `inputs` are not looked at.

        Args:
          rngs: a key, or {stream: key}.

        Raises:
          ValueError: the module came as an instance, so nobody knows how it is made.
        """
        if self.factory is None:
            raise ValueError(
                f"init: this {self.kind.__name__} was given as an instance; use its own variables (Functional.split), "
                "or name the function that makes it (package.module:factory)"
            )
        rngs = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
        module = self.factory(nnx.Rngs(rngs.pop("params", None), **rngs))
        _, leaves, values = _split(module)
        made = {leaf.name: value for leaf, value in zip(leaves, values, strict=True) if not leaf.random}
        own = [leaf for leaf in self.leaves if not leaf.random]
        return _nested(tuple(own), [made[leaf.name][tuple(map(slice, leaf.shape))] for leaf in own])

    def apply(
        self, variables: Any, *inputs: Any, train: bool = False, rngs: Any = None, mutable: Any = False, **kwargs: Any
    ) -> Any:
        """The module's output; with `mutable`, (output, {collection: its new values}) for the collections named.

        Args:
          train: sets the module to training or inference (`nnx.Module.train`, `eval`), and is passed on to a module
            that takes `train` itself.
          rngs: a key, or {stream: key}; streams not named there draw from "default", else from "params" or "dropout".

        Raises:
          ValueError: the variables are not this module's, or a stream is drawn from in training without a key.
        """
        module = self._merged(variables, rngs)
        module.train() if train else module.eval()
        if train:
            _silence(module, _keys(rngs))
        if (change := prepare.get()) is not None:
            change(module)
        output = module(*inputs, **kwargs, **({"train": train} if self._has_mode else {}))
        if mutable is False:
            return output
        names = [mutable] if isinstance(mutable, str) else mutable
        after = dict(nnx.to_flat_state(nnx.split(module, graph=True)[1]))
        kept = [x for x in self.leaves if not x.random and (mutable is True or x.name.partition("/")[0] in names)]
        return output, _nested(tuple(kept), [_array(after[leaf.path], leaf.path) for leaf in kept])

    def bind(self, variables: Any, seed: Any = None) -> nnx.Module:
        """A module of the user's own class that holds these variables, in the mode that the original was in.

        A student remembers what it was cut from, in an attribute that copies of it have as well; see `split`.

        Args:
          seed: for random streams: a number, a key, or {stream: key}.

        Raises:
          ValueError: the variables are not this module's.
        """
        module = self._merged(variables, seed)
        if self.base is not None:
            object.__setattr__(module, _STUDENT, self)
        return module

    def _merged(self, variables: Any, seed: Any) -> nnx.Module:
        """The module with these variables."""
        given: dict[str, Any] = traverse_util.flatten_dict(dict(variables), sep="/")
        own = {leaf.name: leaf.shape for leaf in self.leaves if not leaf.random}
        for name in [*own, *given]:
            shape = tuple(given[name].shape) if name in given else None
            if own.get(name) != shape:
                expected = f"{own[name]} is" if name in own else "none is"
                raise ValueError(f"variables: {name} has shape {shape}, {expected} expected by {self.kind.__name__}")
        keys, state = _keys(seed), []
        for number, leaf in enumerate(self.leaves):
            state.append((leaf.path, _stream(leaf, number, keys) if leaf.random else given[leaf.name]))
        return nnx.merge(self.graph, nnx.from_flat_state(state))

    def skeleton(self) -> nnx.Module:
        """The module with stand-ins for arrays, which have a shape and take no memory."""
        zeros = [np.zeros((), np.uint32 if _is_key(leaf) else leaf.dtype) for leaf in self.leaves]
        stand_ins = [np.broadcast_to(zero, leaf.shape) for zero, leaf in zip(zeros, self.leaves, strict=True)]
        return nnx.merge(self.graph, nnx.from_flat_state(zip((x.path for x in self.leaves), stand_ins, strict=True)))

    def cut(self, layers: Layers, dropped: tuple[str, ...]) -> FunctionalModule:
        """The module with arrays of these shapes, its layers' attributes to match, and `Zeros` for dropped layers.

        Args:
          layers: {path of a module: {name of an array: its shape, name of a number (`library.numbers_in`): its value}};
            what is not named keeps its size.

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
        resized = replace(
            base,
            leaves=tuple(
                replace(x, shape=shape, dtype=x.dtype if x.random else dtypes.get(x.name, x.dtype))
                for x, shape in zip(base.leaves, shapes, strict=True)
            ),
        )
        module = resized.skeleton()
        old, new = (dict(nnx.iter_graph(m, graph=True)) for m in (base.skeleton(), module))
        for path, node in new.items():
            if isinstance(node, nnx.Module):
                for name, value in attributes(old[path], node).items():
                    setattr(node, name, value)
                _set_numbers(node, path_name(path), layers.get(path_name(path), {}), set(places))
        _drop(module, {id(node) for path, node in new.items() if path_name(path) in dropped})
        graph, leaves, _ = _split(module)
        own = {leaf.path: leaf for leaf in resized.leaves}
        leaves = tuple(own[leaf.path] for leaf in leaves)  # stand-ins of keys are numbers
        frozen = {path: dict(sizes) for path, sizes in layers.items()}
        return replace(resized, graph=graph, leaves=leaves, base=base, layers=frozen, dropped=tuple(sorted(dropped)))


def parameters_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a function or a module's class takes, by name; the signature of an NNX class itself says nothing."""
    if isinstance(factory, functools.partial):
        own = inspect.Signature(list(parameters_of(factory.func).values()))
        bound = own.bind_partial(*factory.args).arguments
        return {name: parameter for name, parameter in own.parameters.items() if name not in bound}
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        return dict(list(inspect.signature(factory.__init__).parameters.items())[1:])
    return dict(inspect.signature(factory).parameters)


class Zeros(nnx.Module):
    """Stands where a layer was whose residual branch is gone: returns its zeros, computes nothing, holds no arrays."""

    def __init__(self, layer: FunctionalModule):
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of what the layer would return."""
        variables = _nested(
            tuple(own := [leaf for leaf in self.layer.leaves if not leaf.random]),
            [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in own],
        )
        output = jax.eval_shape(lambda leaves: self.layer.apply(leaves, *args, **kwargs), variables)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)


class _Silent(nnx.RngStream):
    """A random stream that has no key."""

    def __call__(self) -> jax.Array:
        raise ValueError(
            f"rngs: the module draws random numbers from the stream {self.tag!r} in training; give "
            f"rngs={{{self.tag!r}: key}}"
        )


def _silence(module: nnx.Module, keys: Mapping[str, Any]) -> None:
    """Streams without a key refuse to be drawn from; nnx.RNN draws from "carry" for initial zeros, and may."""
    for _, node in nnx.iter_graph(module, graph=True):
        if type(node) is nnx.RngStream and node.tag != "carry" and _key(node.tag, keys) is None:
            object.__setattr__(node, "__class__", _Silent)


def _keys(rngs: Any) -> dict[str, Any]:
    """{stream: key} of what a user may give."""
    if rngs is None:
        return {}
    if isinstance(rngs, Mapping):
        return dict(rngs)
    return {"default": jax.random.key(rngs) if isinstance(rngs, int) else rngs}


def _key(tag: str, keys: Mapping[str, Any]) -> Any:
    return next((keys[name] for name in (tag, "default", "params", "dropout") if name in keys), None)


def _stream(leaf: Leaf, number: int, keys: Mapping[str, Any]) -> Any:
    """The state of a random stream at its start: a key of its own, or its count."""
    if not _is_key(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)
    key = _key(leaf.name, keys)
    if key is None:  # a constant, of which tracing sees no operation
        with jax.ensure_compile_time_eval():
            return jax.random.split(jax.random.key(number), leaf.shape) if leaf.shape else jax.random.key(number)
    key = jax.random.fold_in(key, number)
    return jax.random.split(key, leaf.shape) if leaf.shape else key


def _is_key(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _split(module: nnx.Module) -> tuple[Any, tuple[Leaf, ...], list[Any]]:
    """(graph, leaves, their values), without what the module noted down at earlier calls."""
    _mark_arrays(module)
    student = vars(module).pop(_STUDENT, None)
    try:
        graph, state = nnx.split(module, graph=True)
    finally:
        if student is not None:
            object.__setattr__(module, _STUDENT, student)
    flat = list(nnx.to_flat_state(state))
    if any(isinstance(value, nnx.Intermediate) for _, value in flat):
        module = nnx.merge(graph, state)
        nnx.pop(module, nnx.Intermediate)
        graph, state = nnx.split(module, graph=True)
        flat = list(nnx.to_flat_state(state))
    leaves, values = [], []
    for path, value in flat:
        array, random = _array(value, path), isinstance(value, nnx.RngState)
        name = value.tag if random else f"{_collection(value)}/{path_name(path)}"
        leaves.append(Leaf(tuple(path), name, tuple(array.shape), array.dtype, random))
        values.append(array)
    names = [leaf.name for leaf in leaves if not leaf.random]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the module has two arrays that would be called {min(twice)!r}; rename one")
    return graph, tuple(leaves), values


def _array(value: Any, path: tuple[Any, ...]) -> Any:
    """The array of a Variable, or the array itself."""
    inner = value.get_value() if isinstance(value, nnx.Variable) else value
    if isinstance(inner, (bool, int, float, complex)):
        return jnp.asarray(inner)
    if not hasattr(inner, "shape") or not hasattr(inner, "dtype"):
        raise ValueError(
            f"{path_name(path)}: a {type(value).__name__} that holds a {type(inner).__name__} is not "
            "supported; let it hold one array"
        )
    return inner


def _mark_arrays(module: nnx.Module) -> None:
    """Attributes that are arrays while a function is traced are data, as they would be outside of it."""
    for _, node in list(nnx.iter_graph(module, graph=True)):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if isinstance(value, jax.Array):
                    setattr(node, name, nnx.data(value))


def _collection(value: Any) -> str:
    if isinstance(value, nnx.Param):
        return "params"
    if isinstance(value, nnx.BatchStat):
        return "batch_stats"
    if not isinstance(value, nnx.Variable):
        return "arrays"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(value).__name__).lower()


def path_name(path: Sequence[Any]) -> str:
    """A path as NNX has it, as "blocks/0/conv"."""
    parts = (".".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in path)
    return "/".join(part.replace("/", ".") for part in parts)


def _nested(leaves: tuple[Leaf, ...], values: list[Any]) -> dict[str, Any]:
    flat = {x.name: value for x, value in zip(leaves, values, strict=True) if not x.random}
    return traverse_util.unflatten_dict(flat, sep="/")


def _check_names(layers: Layers, dropped: tuple[str, ...], paths: set[str], base: FunctionalModule) -> None:
    """Raises ValueError where an architecture names a layer that the module has not, or makes an array larger."""
    kind, shapes = base.kind.__name__, {leaf.place: leaf.shape for leaf in base.leaves if not leaf.random}
    for path in [*layers, *dropped]:
        if path not in paths:
            near = difflib.get_close_matches(path, paths, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"architecture: the model has no layer {path!r}{hint} ({kind})")
        for name, size in layers.get(path, {}).items():
            own = shapes.get((path, name))
            if own is not None and (len(size) != len(own) or any(a > b for a, b in zip(size, own, strict=True))):
                raise ValueError(f"architecture: {name!r} of layer {path!r} is {tuple(size)}; in {kind} it is {own}")


def _set_numbers(node: nnx.Module, path: str, sizes: Mapping[str, Any], places: set[tuple[str, str]]) -> None:
    """Sets the whole numbers among a layer's sizes: attributes, or numbers inside them ("config.heads").

    Raises:
      ValueError: the layer has no such array, and no such number.
    """
    for name, value in sizes.items():
        if (path, name) in places:
            continue
        attribute, _, inside = name.partition(".")
        try:
            if attribute.startswith("_"):
                raise AttributeError(attribute)
            setattr(node, attribute, with_number(getattr(node, attribute), inside, value))
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"architecture: layer {path!r} has no array {name!r}, and no such number") from error
        if isinstance(node, nnx.Conv):  # groups that lose the same channels each, and not whole groups
            node.in_features = node.kernel.shape[-2] * node.feature_group_count


def _drop(module: nnx.Module, gone: set[int]) -> None:
    """Puts `Zeros` in the place of nodes, wherever the module holds them."""
    stand_ins: dict[int, Zeros] = {}

    def stand_in(value: Any) -> Any:
        if id(value) not in gone:
            return value
        if id(value) not in stand_ins:
            graph, leaves, _ = _split(value)
            stand_ins[id(value)] = Zeros(FunctionalModule(graph, leaves, type(value)))
        return stand_ins[id(value)]

    for _, node in list(nnx.iter_graph(module, graph=True)):
        if not isinstance(node, nnx.Pytree) or id(node) in gone:
            continue
        for name, value in list(vars(node).items()):
            if id(value) in gone:
                setattr(node, name, stand_in(value))
            elif isinstance(value, (list, tuple, dict)) and not name.startswith("_pytree__"):
                inside = jax.tree.map(stand_in, value, is_leaf=lambda x: isinstance(x, (nnx.Pytree, nnx.Variable)))
                if any(a is not b for a, b in zip(*map(_items, (value, inside)), strict=True)):
                    setattr(node, name, nnx.data(inside))


def _items(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (nnx.Pytree, nnx.Variable)))
