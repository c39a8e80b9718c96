"""Models by name: one of `kdsearch_jax.models`, or one of another package as `package.module:factory`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
from flax import errors, nnx

from kdsearch_jax.adapters.call_spec import class_of
from kdsearch_jax.adapters.functional_module import FunctionalModule, parameters_of

OBJECT_PREFIX = "given:"  # begins the name of a network whose module was passed as an object and cannot be named


def identify(module: Any) -> tuple[str, dict[str, Any]]:
    """(name, arguments) with which `build` creates an equal module; otherwise a name with `OBJECT_PREFIX`, and {}.

    A module can be named if its class can be imported by its qualified name and, called with JSON values of its
    attributes, returns an equal module. For an NNX module, these are the attributes named like the arguments of its
    `__init__`.
    """
    kind = class_of(module)
    package = sys.modules.get(kind.__module__)
    identity = None
    if kind.__module__ != "__main__" and getattr(package, kind.__qualname__, None) is kind:
        identity = _identify_nnx(module) if isinstance(module, FunctionalModule) else _identify_linen(module)
    elif isinstance(module, FunctionalModule):
        identity = module.origin
    if identity is None:
        return f"{OBJECT_PREFIX}{kind.__module__}.{kind.__qualname__}", {}
    return identity[0], dict(identity[1])


def built_in_models() -> Mapping[str, Callable[..., nn.Module]]:
    """{name: factory} of `kdsearch_jax.models`, which is imported by the first call."""
    from kdsearch_jax.models import MODELS

    return MODELS


Identity = tuple[str, Mapping[str, Any]] | None


def _identify_linen(module: Any) -> Identity:
    """(name, arguments) of a Linen module."""
    kind = type(module)
    if not isinstance(module, nn.Module):
        return None
    fields = [f for f in dataclasses.fields(kind) if f.init and f.name not in ("parent", "name")]
    arguments = {f.name: getattr(module, f.name) for f in fields if not _is_default(f.default, getattr(module, f.name))}
    try:
        plain = _plain(arguments)
        same = module.name is None and kind(**plain) == module
    except (TypeError, ValueError):
        return None
    return (f"{kind.__module__}:{kind.__qualname__}", plain) if same else None


@functools.lru_cache(maxsize=16)
def _identify_nnx(module: FunctionalModule) -> Identity:
    """(name, arguments) of an NNX module, if calling its class, abstractly, returns an equal module."""
    if module.origin is not None:
        return module.origin
    name, skeleton = f"{module.kind.__module__}:{module.kind.__qualname__}", module.skeleton()
    plain: dict[str, Any] = {}
    for key, parameter in parameters_of(module.kind).items():
        value = getattr(skeleton, key, parameter.default)
        with contextlib.suppress(TypeError, ValueError):  # not JSON
            plain |= {} if key == "rngs" or _is_default(parameter.default, value) else _plain({key: value})
    try:
        built, mode = build(name, plain), module.mode
        same = (built.in_mode(mode) if mode else built) == module
    except Exception:  # a constructor may raise anything for arguments guessed like this
        return None
    return (name, plain) if same else None


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(arguments, allow_nan=False))


def as_module(module: Any) -> Any:
    """A Linen module or `FunctionalModule` from what a user passed.

    Args:
      module: either of these, or a student of one; an nnx.Module, with arrays or abstract (`nnx.eval_shape`); or a
        factory: a class, or a function without arguments, such as `functools.partial(Net, width=64)`. An NNX class
        also gets `rngs` if it takes it.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(module, (nn.Module, FunctionalModule)):
        return module
    if isinstance(module, nnx.Module):
        return FunctionalModule.split(module)[0]
    if not callable(module):
        raise ValueError(f"module: got a {type(module).__name__}; pass a Flax module, or a class or function of one")
    called = module
    while isinstance(called, functools.partial):
        called = called.func
    try:
        if isinstance(called, type) and issubclass(called, nnx.Module):
            with contextlib.suppress(errors.TraceContextError):  # it draws from random streams outside of the trace
                factory: Any = module
                return FunctionalModule.make(factory, {})
        result = module()
    except TypeError as error:
        name = getattr(called, "__name__", repr(called))
        raise ValueError(f"module: {name} cannot be called ({error}); pass functools.partial({name}, …)") from error
    if callable(result) and not isinstance(result, (nn.Module, nnx.Module, FunctionalModule)):
        name = getattr(called, "__name__", called)
        raise ValueError(
            f"module: {name!r} returns a {type(result).__name__}; pass a function that returns a Flax module"
        )
    return as_module(result)


def check_class(name: str, module: Any) -> None:
    """Raises ValueError if `name`, as returned by `identify`, names another class than the module's.

    The class may have moved to another file. If `name` names a function, its class is not known.
    """
    kinds = [kind.__name__ for kind in class_of(module).__mro__]
    if name.startswith(OBJECT_PREFIX):
        expected = name.removeprefix(OBJECT_PREFIX)
    else:
        package, _, expected = name.partition(":")
        if not isinstance(getattr(sys.modules.get(package), expected, None), type):
            return
    if expected.rpartition(".")[2] not in kinds:
        raise ValueError(f"module: the network is a {expected}, but a {kinds[0]} was passed")


def _is_default(default: Any, value: Any) -> bool:
    try:
        return type(value) is type(default) and bool(value == default)
    except (TypeError, ValueError):  # arrays
        return False


def accepts(name: str, argument: str) -> bool:
    """Whether the model's factory has an argument of this name. Raises ValueError for an unknown model."""
    factory = _imported(name) if ":" in name and not name.startswith(OBJECT_PREFIX) else built_in_models().get(name)
    if factory is None:
        return True
    parameters = parameters_of(factory)
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build(name: str, arguments: Mapping[str, Any]) -> Any:
    """Creates a model: a Linen module, or the `FunctionalModule` of an NNX module.

    Args:
      name: one of `kdsearch_jax.models`, or `package.module:factory`, where `factory` is the class of a Linen or NNX
        module or a function annotated to return one. Nothing else is called, since the name may come from an untrusted
        file; but the package is imported, so its code runs.
      arguments: keyword arguments of the factory, JSON values.

    Raises:
      ValueError: there is no such model or argument, or the factory refuses a value.
    """
    if name.startswith(OBJECT_PREFIX):
        raise ValueError(
            f"a file cannot hold the module of this network, {name.removeprefix(OBJECT_PREFIX)}; pass an equal module, "
            "or a function that creates it: kdsearch_jax.load(path, module=…)"
        )
    if ":" in name:
        factory = _imported(name)
    elif name in (models := built_in_models()):
        factory = models[name]
    else:
        raise ValueError(
            f"model {name!r} is unknown{_nearest(name, models)}; there are {', '.join(sorted(models))}, "
            "and package.module:factory for your own"
        )
    _check_arguments(name, factory, arguments)
    if _returns(factory, nnx.Module):
        nnx_factory: Any = factory
        return dataclasses.replace(FunctionalModule.make(nnx_factory, arguments), origin=(name, dict(arguments)))
    module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model {name!r} must return a flax.linen.Module, got {type(module).__name__}")
    return module


def check_trust(name: str, trust_code: bool = False) -> None:
    """Raises ValueError if `build` would import a package that is not loaded yet, unless code is trusted.

    A network's directory may come from an untrusted source, and its `package.module:factory` may name any installed
    package. The code of a package that is loaded already has run.
    """
    package = name.partition(":")[0]
    if ":" in name and not name.startswith(OBJECT_PREFIX) and not trust_code and package not in sys.modules:
        raise ValueError(
            f"model {name!r}: building it would import the package {package!r} and run its code; if you trust it, pass "
            f"--trust-code (trust_code=True), or import {package} first"
        )


def _nearest(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _imported(name: str) -> Callable[..., Any]:
    """The callable that `package.module:factory` names."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ValueError(f"model {name!r} must read package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"model {name!r}: importing {module_name!r} failed ({error}); install the package or add its folder to "
            "PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        what = "has no" if factory is None else "cannot call its"
        factories = (n for n, v in vars(module).items() if callable(v) and _returns(v, (nn.Module, nnx.Module)))
        hint = _nearest(attribute, factories)
        raise ValueError(f"model {name!r}: module {module_name!r} {what} {attribute!r}{hint}")
    if not _returns(factory, (nn.Module, nnx.Module)):
        raise ValueError(
            f"model {name!r}: {attribute!r} is not known to return a network, so it is not called; annotate it "
            f"(`def {attribute}(...) -> nn.Module`), or name a subclass of flax.linen.Module or flax.nnx.Module"
        )
    return factory


def _returns(factory: Callable[..., Any], kinds: type | tuple[type, ...]) -> bool:
    """Whether a factory is a class of these kinds, or a function annotated to return one; it is not called."""
    result: Any = factory
    if inspect.isfunction(factory):
        try:
            result = typing.get_type_hints(factory).get("return")
        except (NameError, TypeError, AttributeError):  # an annotation for type checkers only
            return False
    return isinstance(result, type) and issubclass(result, kinds)


def _check_arguments(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if the factory does not take an argument, or needs one that is missing."""
    parameters = parameters_of(factory)
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        parameters = {key: value for key, value in parameters.items() if key not in ("parent", "name")}
    if _returns(factory, nnx.Module):  # random streams are not JSON values
        parameters = {key: value for key, value in parameters.items() if key != "rngs"}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    valid = f"valid arguments are {', '.join(named) or 'none'}"
    for key in arguments:
        if key not in named and not open_ended:
            raise ValueError(f"model {name!r} has no argument {key!r}{_nearest(key, named)}; {valid}")
    missing = [key for key, p in named.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ValueError(f"model {name!r} needs {', '.join(map(repr, missing))}; {valid}")
