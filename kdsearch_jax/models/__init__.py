"""Teacher networks: ordinary Flax Linen modules that know nothing of a search.

Every one is called as `module.apply(variables, images, train=False)` with float images (batch, height, width,
channels) and returns logits (batch, classes). `build` finds a network by its name in an experiment, and any other
package's by `package.module:factory`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn

from kdsearch_jax.models.cifar_resnet import cifar_resnet
from kdsearch_jax.models.resnet import resnet
from kdsearch_jax.models.small import mlp, small_cnn
from kdsearch_jax.models.vgg import vgg
from kdsearch_jax.models.vit import vit
from kdsearch_jax.models.wide_resnet import wide_resnet

__all__ = ["MODELS", "build", "cifar_resnet", "mlp", "resnet", "small_cnn", "vgg", "vit", "wide_resnet"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory for factory in (cifar_resnet, wide_resnet, resnet, vgg, vit, small_cnn, mlp)
}


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network `name` with these keyword arguments.

    Args:
      name: one of `MODELS`, or `package.module:factory` where `factory` is a Linen module's class, or a function
        annotated to return one. Nothing else is ever called, since the name may come from a file that somebody else
        wrote; but the package is imported, that is, its code runs.
      arguments: keyword arguments of the factory, all plain JSON.

    Raises:
      ValueError: no such network, no such argument, or a value that the network refuses.
    """
    if ":" in name:
        factory = _imported(name)
    elif name in MODELS:
        factory = MODELS[name]
    else:
        raise ValueError(
            f"model {name!r} is unknown{_nearest(name, MODELS)}; there are {', '.join(sorted(MODELS))}, "
            "and package.module:factory for your own"
        )
    _check_arguments(name, factory, arguments)
    module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model {name!r} must return a flax.linen.Module, got {type(module).__name__}")
    return module


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
        hint = _nearest(attribute, vars(module))
        raise ValueError(f"model {name!r}: module {module_name!r} {what} {attribute!r}{hint}")
    if not _makes_modules(factory):
        raise ValueError(
            f"model {name!r}: {attribute!r} is not known to return a network, so it is not called; annotate it "
            f"(`def {attribute}(...) -> nn.Module`), or name a subclass of flax.linen.Module"
        )
    return factory


def _makes_modules(factory: Callable[..., Any]) -> bool:
    """Whether it is a Linen module's class or a function annotated to return one; it is not called to find out."""
    made: Any = factory
    if inspect.isfunction(factory):
        try:
            made = typing.get_type_hints(factory).get("return")
        except (NameError, TypeError, AttributeError):  # a name that exists for type checkers only
            return False
    return isinstance(made, type) and issubclass(made, nn.Module)


def _check_arguments(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where the factory does not take an argument, or lacks one that it needs."""
    parameters = inspect.signature(factory).parameters
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        parameters = {key: value for key, value in parameters.items() if key not in ("parent", "name")}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    valid = f"valid arguments are {', '.join(named) or 'none'}"
    for key in arguments:
        if key not in named and not open_ended:
            raise ValueError(f"model {name!r} has no argument {key!r}{_nearest(key, named)}; {valid}")
    missing = [key for key, p in named.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ValueError(f"model {name!r} needs {', '.join(map(repr, missing))}; {valid}")
