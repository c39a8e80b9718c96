"""Networks of module objects, which files cannot name: loaded with the module that they were made of, and no other."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from proof import image, random_gates, random_keep, variables_of

import kdsearch_jax
from kdsearch_jax.adapters import registry
from kdsearch_jax.adapters.architecture import Architecture, StudentModule
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import trace
from kdsearch_jax.storage import export_formats, networks

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = image(6)


class Plain(nnx.Module):
    """Attributes that are no JSON, an array that is no Variable, and a size that is an attribute of its own."""

    def __init__(self, width: int = 12, activation=None, *, rngs: nnx.Rngs):
        self.width, self.activation = width, activation or nnx.relu
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.second = nnx.Linear(width, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)
        self.offset = nnx.data(jnp.ones(5))

    def __call__(self, x):
        x = self.activation(self.first(x))
        return self.head(nnx.relu(self.dropout(self.second(x)))) + self.offset[None]


class Silu(Plain):
    """The same, of which nothing need be said."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(12, nnx.silu, rngs=rngs)


class Other(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.first(x)


class PlainLinen(nn.Module):
    width: int = 12
    activation: object = nn.gelu

    @nn.compact
    def __call__(self, x):
        x = self.activation(nn.Dense(self.width, name="first")(x))
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(8, name="second")(x)))


def saved(module, variables, directory):
    """A student of the module, cut at random and saved as a run would save it; (its outputs, the directory)."""
    call = CallSpec(("x",), {"x": jax.ShapeDtypeStruct((6,), jnp.float32)})
    network, rng = trace(module, X), np.random.default_rng(0)
    gates, keep = random_gates(network.topology, rng), random_keep(network.topology, rng)
    sliced, architecture = surgery.slice_network(
        variables, gates, keep, network, Architecture.of(network.module, (), call)
    )
    shapes = {name: list(shape) for name, shape in networks.own_shapes(network.module, call).items()}
    info = {"macs": 1, "params": 1}
    if isinstance(network.module, FunctionalModule):
        info[networks.MODE] = network.module.mode
    networks.save_network(directory, architecture, sliced, info | {networks.BASE: shapes})
    return jax.tree.leaves(network.student(keep).apply(sliced, X))[0], directory


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    module = Plain(12, nnx.silu, rngs=nnx.Rngs(0))
    module.eval()
    return saved(module, FunctionalModule.split(module)[1], tmp_path_factory.mktemp("nnx") / "student")


@pytest.fixture(scope="module")
def linen_student(tmp_path_factory):
    module = PlainLinen(12, nn.silu)
    return saved(module, variables_of(module, X), tmp_path_factory.mktemp("linen") / "student")


STREAMS = nnx.Rngs(3)
GIVEN = {
    "an instance": lambda: Plain(12, nnx.silu, rngs=nnx.Rngs(7)),
    "an abstract one": lambda: nnx.eval_shape(lambda: Plain(12, nnx.silu, rngs=nnx.Rngs(0))),
    "a class": lambda: Silu,
    "a class with its arguments": lambda: functools.partial(Plain, 12, activation=nnx.silu),
    "with streams": lambda: functools.partial(Silu, rngs=nnx.Rngs(1)),
    "streams from outside": lambda: functools.partial(Plain, 12, nnx.silu, rngs=STREAMS),
    "a function": lambda: lambda: Silu(rngs=STREAMS),
    "an abstract function": lambda: lambda: nnx.eval_shape(lambda: Plain(12, nnx.silu, rngs=nnx.Rngs(0))),
    "as loaded": lambda: FunctionalModule.split(Silu(rngs=nnx.Rngs(0)))[0],
}


@pytest.mark.parametrize("name", GIVEN)
def test_an_nnx_student_is_loaded_with_whatever_makes_its_model(student, name):
    expected, directory = student
    module, variables = kdsearch_jax.load(directory, module=GIVEN[name]())
    assert isinstance(module, Plain)
    assert module.first.out_features == variables["params"]["first"]["kernel"].shape[1] < 12
    assert module.dropout.deterministic  # as the module that was cut
    np.testing.assert_allclose(module(X), expected, atol=1e-6)
    function, own = FunctionalModule.split(module)
    np.testing.assert_array_equal(function.apply(own, X), expected)
    again, _ = kdsearch_jax.load(directory, module=module)  # a student stands for what it was cut from
    assert FunctionalModule.split(again)[0] == function


def test_a_linen_student_too(linen_student):
    expected, directory = linen_student
    whole = PlainLinen(12, nn.silu)
    for given in (whole, functools.partial(PlainLinen, activation=nn.silu), lambda: whole):
        module, variables = kdsearch_jax.load(directory, module=given)
        assert isinstance(module, StudentModule) and module.base == whole
        np.testing.assert_array_equal(module.apply(variables, X), expected)
    assert kdsearch_jax.load(directory, module=module).module == module


def fails(directory, given, *parts):
    """The one line with which a module is refused: it names the class that it is of, and none of ours."""
    with pytest.raises(ValueError) as caught:
        kdsearch_jax.load(directory, module=given)
    message = str(caught.value)
    assert "\n" not in message and not re.search("Functional|Student|Hidden|partial object", message), message
    for part in parts:
        assert part in message


def test_another_module_is_refused(student, linen_student):
    """Another class, other sizes, something missing, and what is no module at all."""

    class Lacks(Plain):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            del self.second

    class Needs(Plain):
        def __call__(self, x):
            return super().__call__(x) + self.missing

    fails(student[1], Other(rngs=nnx.Rngs(0)), "test_loading.Plain", "Other")
    fails(student[1], PlainLinen(), "test_loading.Plain", "PlainLinen")
    fails(student[1], functools.partial(Plain, 6), "Plain", "first/", "(6,")
    fails(student[1], functools.partial(Plain, 20), "Plain", "first/bias", "(20,)", "(12,)")
    fails(student[1], Lacks(rngs=nnx.Rngs(0)), "Lacks", "second")
    fails(student[1], Needs(rngs=nnx.Rngs(0)), "'Needs' object has no attribute 'missing'")
    fails(student[1], {"params": 1}, "dict")
    fails(student[1], functools.partial(Plain, widht=3), "Plain", "widht")
    fails(student[1], lambda: 3, "int")
    fails(student[1], None, "test_loading.Plain", "module=")
    fails(linen_student[1], Plain, "test_loading.PlainLinen", "a Plain")
    fails(linen_student[1], PlainLinen(20), "PlainLinen", "first/", "(20,)", "(12,)")
    fails(linen_student[1], PlainLinen(6), "PlainLinen", "first/", "(6,)", "(12,)")


def test_attributes_that_a_loaded_network_has_not(student, linen_student):
    """Whoever takes it for the module itself learns how to get that."""
    module, *_ = networks.load_network(student[1], Silu)
    with pytest.raises(AttributeError, match=r"this Silu .* no attribute 'first'; bind\(variables\)"):
        _ = module.first
    module, _ = kdsearch_jax.load(linen_student[1], module=PlainLinen(activation=nn.silu))
    with pytest.raises(AttributeError, match="student of a PlainLinen has no attribute 'width'; `base`"):
        _ = module.width


class Named(nnx.Module):
    """What it was made of is among its attributes."""

    def __init__(self, width: int, depth: int = 1, *, rngs: nnx.Rngs):
        self.width = width
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(depth)])
        self.up, self.head = nnx.Linear(6, width, rngs=rngs), nnx.Linear(width, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(nnx.relu(self.norm(self.up(x))))


class Misleading(Named):
    """An attribute that is called as an argument is, and is something else."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(2 * width, rngs=rngs)


def test_an_nnx_module_that_its_attributes_describe_is_loaded_without_it(tmp_path):
    """The class is called to see whether it makes an equal module; where it does not, none is named."""

    def described(module):
        return registry.identify(FunctionalModule.split(module)[0])

    named = Named(8, rngs=nnx.Rngs(0))
    fails(saved(named, FunctionalModule.split(named)[1], tmp_path / "named")[1],
          functools.partial(Named, 12), "Named", "(12,", "(8,")  # fmt: skip
    assert described(Named(8, rngs=nnx.Rngs(0))) == ("test_loading:Named", {"width": 8})
    for other in (Named(8, 3, rngs=nnx.Rngs(0)), Misleading(8, rngs=nnx.Rngs(0)), Plain(8, nnx.elu, rngs=nnx.Rngs(0))):
        assert described(other) == (f"given:test_loading.{type(other).__name__}", {})
    module = Named(8, rngs=nnx.Rngs(0))
    for mode in ("train", "eval"):
        module.train() if mode == "train" else module.eval()
        expected, directory = saved(module, FunctionalModule.split(module)[1], tmp_path / mode)
        again, _ = kdsearch_jax.load(directory)
        assert again.norm.use_running_average is (mode == "eval")  # as the module was when it was given
        assert np.allclose(again(X), expected, atol=1e-6) is (mode == "eval")


LOCAL = """
import sys, numpy as np, jax, jax.numpy as jnp, flax.linen as nn, kdsearch_jax
from flax import nnx
from kdsearch_jax.adapters.functional_module import FunctionalModule
from test_loading import X, saved

class Net(nnx.Module):
    def __init__(self, width, f, *, rngs):
        self.a, self.b, self.f = nnx.Linear(6, width, rngs=rngs), nnx.Linear(width, 5, rngs=rngs), f

    def __call__(self, x):
        return self.b(self.f(self.a(x)))

def local():
    class Inside(nn.Module):
        f: object

        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(self.f(nn.Dense(20)(x)))

    return Inside(nn.tanh)

linen = local()
"""
MAKE = """
net = Net(20, jnp.tanh, rngs=nnx.Rngs(0))
expected, _ = saved(net, FunctionalModule.split(net)[1], "nnx/student")
other, _ = saved(linen, linen.init(jax.random.key(0), X), "linen/student")
np.savez("expected.npz", nnx=expected, linen=other)
"""
LOAD = """
expected = np.load("expected.npz")
m, v = kdsearch_jax.load("nnx/student", module=nnx.eval_shape(lambda: Net(20, jnp.tanh, rngs=nnx.Rngs(0))))
np.testing.assert_allclose(m(X), expected["nnx"], atol=1e-6)
m, v = kdsearch_jax.load("linen/student", module=linen)
np.testing.assert_allclose(m.apply(v, X), expected["linen"], atol=1e-6)
try:
    kdsearch_jax.load("nnx/student")
except ValueError as error:
    print(error)
"""


def test_classes_of_a_script_in_a_fresh_process(tmp_path):
    """Defined in __main__, or inside of a function: saved by one process, loaded by another."""
    own = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": own}, "capture_output": True, "text": True}
    said = [subprocess.run([sys.executable, "-c", LOCAL + code], **settings) for code in (MAKE, LOAD)]
    assert [done.returncode for done in said] == [0, 0], said[-1].stderr
    assert "__main__.Net" in said[1].stdout and "module=" in said[1].stdout


def test_an_exported_file_takes_the_same(student, tmp_path):
    export_formats.export(student[1], tmp_path, ("safetensors",), module=Silu)
    module, variables = export_formats.load_safetensors(tmp_path / "student.safetensors", module=Silu)
    np.testing.assert_array_equal(module.apply(variables, X), student[0])
    with pytest.raises(ValueError, match=r"Plain that is given has \(20,\)"):
        export_formats.load_safetensors(tmp_path / "student.safetensors", module=functools.partial(Plain, 20))
