"""Networks by name: a model of `kdsearch_jax.models`, or any other package's by `package.module:factory`."""

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

GIVEN = "given:"  # begins the name of a network that was given as an object and that `describe` cannot name


def describe(module: Any) -> tuple[str, dict[str, Any]]:
    """(name, arguments) by which `build` makes an equal module; or, where none can be, a name that says so.

    A module can be named where its class is at the top of a module that can be imported, and equals what that class
    makes of plain JSON: of its attributes, for an NNX module those that are called as arguments of its `__init__` are.
    """
    kind = class_of(module)
    package = sys.modules.get(kind.__module__)
    found = None
    if kind.__module__ != "__main__" and getattr(package, kind.__qualname__, None) is kind:
        found = _described_nnx(module) if isinstance(module, FunctionalModule) else _described(module)
    elif isinstance(module, FunctionalModule):
        found = module.origin
    return (f"{GIVEN}{kind.__module__}.{kind.__qualname__}", {}) if found is None else (found[0], dict(found[1]))


def zoo() -> Mapping[str, Callable[..., nn.Module]]:
    """{name: factory} of the models that come with this package, imported when they are first asked for."""
    from kdsearch_jax.models import MODELS

    return MODELS


Described = tuple[str, Mapping[str, Any]] | None


def _described(module: Any) -> Described:
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
def _described_nnx(module: FunctionalModule) -> Described:
    """(name, arguments) of an NNX module: the class is called, abstractly, to see whether it makes the same."""
    if module.origin is not None:
        return module.origin
    name, skeleton = f"{module.kind.__module__}:{module.kind.__qualname__}", module.skeleton()
    plain: dict[str, Any] = {}
    for key, parameter in parameters_of(module.kind).items():
        value = getattr(skeleton, key, parameter.default)
        with contextlib.suppress(TypeError, ValueError):  # no JSON
            plain |= {} if key == "rngs" or _is_default(parameter.default, value) else _plain({key: value})
    try:
        made, mode = build(name, plain), module.mode
        same = (made.in_mode(mode) if mode else made) == module
    except Exception:  # whatever a constructor does with what it was not made for
        return None
    return (name, plain) if same else None


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(arguments, allow_nan=False))


def module_of(given: Any) -> Any:
    """The module that a user means: a Linen module or a `FunctionalModule`.

    Args:
      given: either of these, or a student of one; an nnx.Module, with arrays or abstract (`nnx.eval_shape`); or what
        makes a module: a class, or a function without arguments, such as `functools.partial(Net, width=64)`. `rngs` is
        added where an NNX class takes it.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(given, (nn.Module, FunctionalModule)):
        return given
    if isinstance(given, nnx.Module):
        return FunctionalModule.split(given)[0]
    if not callable(given):
        raise ValueError(
            f"module: a {type(given).__name__} is given; give a Flax module, or a class or function of one"
        )
    called = given
    while isinstance(called, functools.partial):
        called = called.func
    try:
        if isinstance(called, type) and issubclass(called, nnx.Module):
            with contextlib.suppress(errors.TraceContextError):  # random streams from outside, which it draws from
                factory: Any = given
                return FunctionalModule.make(factory, {})
        made = given()
    except TypeError as error:
        name = getattr(called, "__name__", repr(called))
        raise ValueError(f"module: {name} cannot be called ({error}); give functools.partial({name}, …)") from error
    if callable(made) and not isinstance(made, (nn.Module, nnx.Module, FunctionalModule)):
        raise ValueError(
            f"module: {getattr(called, '__name__', called)!r} makes a {type(made).__name__}, and no module"
        )
    return module_of(made)


def check_class(name: str, module: Any) -> None:
    """Raises ValueError where a network was made of another class, as `describe` named it.

    Where the class is defined now may be somewhere else. Of what a function made the class is not known.
    """
    kinds = [kind.__name__ for kind in class_of(module).__mro__]
    if name.startswith(GIVEN):
        expected = name.removeprefix(GIVEN)
    else:
        package, _, expected = name.partition(":")
        if not isinstance(getattr(sys.modules.get(package), expected, None), type):
            return
    if expected.rpartition(".")[2] not in kinds:
        raise ValueError(f"module: the network was made of a {expected}, and a {kinds[0]} is given")


def _is_default(default: Any, value: Any) -> bool:
    try:
        return type(value) is type(default) and bool(value == default)
    except (TypeError, ValueError):  # arrays
        return False


def takes(name: str, argument: str) -> bool:
    """Whether the factory of that name has an argument of that name. Raises ValueError for an unknown network."""
    factory = _imported(name) if ":" in name and not name.startswith(GIVEN) else zoo().get(name)
    if factory is None:
        return True
    parameters = parameters_of(factory)
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build(name: str, arguments: Mapping[str, Any]) -> Any:
    """The network `name` with these keyword arguments: a Linen module, or the `FunctionalModule` of an NNX module.

    Args:
      name: one of `kdsearch_jax.models`, or `package.module:factory` where `factory` is a Linen or NNX module's
      class, or a function
        annotated to return one. Nothing else is ever called, since the name may come from a file that somebody else
        wrote; but the package is imported, that is, its code runs.
      arguments: keyword arguments of the factory, all plain JSON.

    Raises:
      ValueError: no such network, no such argument, or a value that the network refuses.
    """
    if name.startswith(GIVEN):
        raise ValueError(
            f"this network was made of a module object, {name.removeprefix(GIVEN)}, which a file cannot hold; give an "
            "equal one, or what makes it: kdsearch_jax.load(path, module=…)"
        )
    if ":" in name:
        factory = _imported(name)
    elif name in zoo():
        factory = zoo()[name]
    else:
        raise ValueError(
            f"model {name!r} is unknown{_nearest(name, zoo())}; there are {', '.join(sorted(zoo()))}, "
            "and package.module:factory for your own"
        )
    _check_arguments(name, factory, arguments)
    if _made_by(factory, nnx.Module):
        made: Any = factory
        return dataclasses.replace(FunctionalModule.make(made, arguments), origin=(name, dict(arguments)))
    module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model {name!r} must return a flax.linen.Module, got {type(module).__name__}")
    return module


def check_trust(name: str, trust_code: bool = False) -> None:
    """Raises ValueError where `build` would import a package that this program has not, and nobody has said it may.

    A network's directory may come from a stranger, and `package.module:factory` in it may name any package of this
    machine. Code of one that is imported already has run.
    """
    package = name.partition(":")[0]
    if ":" in name and not name.startswith(GIVEN) and not trust_code and package not in sys.modules:
        raise ValueError(
            f"model {name!r}: to make it, the package {package!r} would be imported, so that its code runs; if you "
            f"trust it, say so by --trust-code (trust_code=True), or import {package} before"
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
        what = "has no" if factory is None else "has, but cannot call,"
        own = (n for n, v in vars(module).items() if callable(v) and _made_by(v, (nn.Module, nnx.Module)))
        hint = _nearest(attribute, own)
        raise ValueError(f"model {name!r}: module {module_name!r} {what} {attribute!r}{hint}")
    if not _made_by(factory, (nn.Module, nnx.Module)):
        raise ValueError(
            f"model {name!r}: {attribute!r} is not known to return a network, so it is not called; annotate it "
            f"(`def {attribute}(...) -> nn.Module`), or name a subclass of flax.linen.Module or flax.nnx.Module"
        )
    return factory


def _made_by(factory: Callable[..., Any], kinds: type | tuple[type, ...]) -> bool:
    """Whether it is a class of these kinds or a function annotated to return one; it is not called to find out."""
    made: Any = factory
    if inspect.isfunction(factory):
        try:
            made = typing.get_type_hints(factory).get("return")
        except (NameError, TypeError, AttributeError):  # a name that exists for type checkers only
            return False
    return isinstance(made, type) and issubclass(made, kinds)


def _check_arguments(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where the factory does not take an argument, or lacks one that it needs."""
    parameters = parameters_of(factory)
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        parameters = {key: value for key, value in parameters.items() if key not in ("parent", "name")}
    if _made_by(factory, nnx.Module):  # random streams are not JSON
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
