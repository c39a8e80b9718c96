"""Operations beyond layers: norms of kernels, experts, Fourier transforms, einsums of several operands, loops.

Each network has the groups that must be found and, for some frozen parameters, a part of the reason, which names the
operation and its line in this file. Random students are exact. Networks alternate between Linen and NNX.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from either import LIBRARIES, network_in
from flax import nnx
from proof import groups, image, prove, random_keep, reasons, traced, variables_of

from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import count, trace
from kdsearch_jax.tracing import einsum
from kdsearch_jax.tracing.program import flatten_jaxpr

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = []
IMAGE, VECTOR, TOKENS = (6, 6, 3), (7,), (5, 7)


def case(shape, free, frozen=(), between=True):
    """A network with these groups, {name: size}, besides those of layer `b`; frozen: {leaf: part of the reason}.

    between: the function is what stands between two layers, `a`, 8 wide, and `b`, 6 wide.
    """

    def register(function):
        def whole(s, x):
            if not between:
                return function(s, x)
            layer = s.dense if x.ndim < 4 else lambda name, n, x: s.conv(name, n, 3, x)
            y = nn.relu(layer("b", 6, function(s, nn.relu(layer("a", 8, x)))))
            return s.dense("out", 3, y.mean(tuple(range(1, y.ndim - 1))))

        expected = {"b": 6, **free} if between else free
        library = LIBRARIES[len(CASES) % 2]
        CASES.append(pytest.param(library, whole, shape, expected, dict(frozen), id=f"{function.__name__}-{library}"))
        return function

    return register


def dot(x, kernel):
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# --- norms of kernels -------------------------------------------------------------------------------------------------


@case(VECTOR, {"a": 8, "g": 9})
def weight_norm(s, x):
    w, g = s.param("w", x.shape[-1], 9), s.param("g", 1, 9)
    return dot(x, g * w / jnp.linalg.norm(w, axis=0, keepdims=True))


@case(IMAGE, {"a": 8, "w": 9})
def weight_norm_of_a_convolution(s, x):
    w = s.param("w", 3, 3, x.shape[-1], 9)
    return conv(x, w * jax.lax.rsqrt(jnp.sum(w**2, (0, 1, 2), keepdims=True) + 1e-6))


@case(VECTOR, {"a": 8}, {"w[1]": "not used as stored, in dot_general"})
def weight_norm_used_forth_and_back(s, x):
    """Along its outputs, the normalised kernel does not change with the stored one, until that is 0."""
    w = s.param("w", x.shape[-1], 9)
    w = w / jnp.linalg.norm(w, axis=0, keepdims=True)
    return dot(nn.relu(dot(x, w)), w.T)


@case(VECTOR, {"a": 8}, {"w[1]": "not used as stored, in dot_general"})
def kernel_over_its_sum_used_forth_and_back(s, x):
    w = jnp.abs(s.param("w", x.shape[-1], 9))
    w = w / w.sum(0, keepdims=True)
    return dot(nn.relu(dot(x, w)), w.T)


@case(VECTOR, {"a": 8, "w": 9})
def kernel_over_a_parameter(s, x):
    return dot(x, s.param("w", x.shape[-1], 9) / s.param("scale", x.shape[-1], 1))


@case(VECTOR, {"w": 9}, {"a/kernel[1]": "number, in div"})
def kernel_over_its_root_mean_square(s, x):
    w = s.param("w", x.shape[-1], 9)
    return dot(x, w * jax.lax.rsqrt(jnp.mean(w**2, 0, keepdims=True) + 1e-6))


@case(IMAGE, {"w": 9}, {"a/kernel[3]": "mixed by reduce_sum"})
def weight_standardisation(s, x):
    w = s.param("w", 3, 3, x.shape[-1], 9)
    mean, variance = (f(w, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    return conv(x, (w - mean) / jnp.sqrt(variance + 1e-5))


@case(VECTOR, {"a": 8, "u": 9})
def spectral_norm(s, x):
    w, u = s.param("w", x.shape[-1], 9), s.param("u", 1, 9)
    v = dot(u, w.T)
    v = v / jnp.linalg.norm(v)
    u = dot(v, w)
    u = u / jnp.linalg.norm(u)
    return dot(x, w / dot(dot(v, w), u.T))


@case(VECTOR, {"a": 8, "A": 3, "B": 9})
def low_rank_update_with_a_norm(s, x):
    n = x.shape[-1]
    w = s.param("w", n, 9) + dot(s.param("A", n, 3), s.param("B", 3, 9))
    return dot(x, s.param("m", 1, 9) * w / jnp.linalg.norm(w, axis=0, keepdims=True))


@case(VECTOR, {"a": 8, "w": 9})
def kernel_of_one_sign(s, x):
    return dot(x, nn.relu(s.param("w", x.shape[-1], 9)))


# --- Fourier transforms -----------------------------------------------------------------------------------------------


@case(TOKENS, {"a": 8})
def fourier_mixing(s, x):
    return x + jnp.fft.fft(x, axis=1).real


@case(TOKENS, {}, {"a/kernel[1]": "mixed by fft"})
def fourier_mixing_of_channels(s, x):
    return x + jnp.fft.fft2(x, axes=(1, 2)).real


def spectral_convolution(x, kernel):
    y = jnp.einsum("bmc,mcd->bmd", jnp.fft.rfft(x, axis=1)[:, :2], kernel)
    return jnp.fft.irfft(jnp.pad(y, ((0, 0), (0, 1), (0, 0))), n=5, axis=1)


@case(TOKENS, {"a": 8, "im": 9}, {"re[0]": "combined with a tensor of fixed size in dot_general"})
def spectral_convolution_of_two_parameters(s, x):
    shape = (2, x.shape[-1], 9)
    return spectral_convolution(x, s.param("re", *shape) + 1j * s.param("im", *shape))


@case(IMAGE, {"a": 8})
def global_filter(s, x):
    w = s.param("w", 1, 6, 4, x.shape[-1], 2)
    return jnp.fft.irfft2(jnp.fft.rfft2(x, axes=(1, 2)) * jax.lax.complex(w[..., 0], w[..., 1]), s=(6, 6), axes=(1, 2))


# --- experts ----------------------------------------------------------------------------------------------------------


def routed(s, x, experts=3):
    return jax.nn.softmax(s.dense("router", experts, x))


def kernels(s, x, experts=3, hidden=12, made=9):
    return s.param("up", experts, x.shape[-1], hidden), s.param("down", experts, hidden, made)


EXPERTS = {"a": 8, "up": 12, "down": 9}


@case(TOKENS, EXPERTS, {"up[0]": "indexed by the groups of ragged_dot_general", "router/kernel[1]": "reduce_max"})
def experts_by_ragged_dot(s, x):
    (up, down), flat, expert = kernels(s, x), x.reshape(-1, x.shape[-1]), routed(s, x).argmax(-1).reshape(-1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3)
    y = jax.lax.ragged_dot(nn.gelu(jax.lax.ragged_dot(flat[order], up, sizes)), down, sizes)
    return y[jnp.argsort(order)].reshape(*x.shape[:2], -1)


@case(TOKENS, EXPERTS)
def experts_by_einsum(s, x):
    up, down = kernels(s, x)
    return jnp.einsum("btef,efc,bte->btc", nn.gelu(jnp.einsum("btc,ecf->btef", x, up)), down, routed(s, x))


@case(TOKENS, EXPERTS, {"up[0]": "indexed by gather"})
def experts_that_are_picked(s, x):
    up, down = kernels(s, x)
    weight, expert = jax.lax.top_k(routed(s, x), 2)
    y = nn.gelu(jnp.einsum("btc,btkcf->btkf", x, up[expert]))
    return jnp.einsum("btkf,btkfc,btk->btc", y, down[expert], weight)


@case(TOKENS, EXPERTS)
def experts_by_vmap(s, x):
    y = jax.vmap(lambda up, down: dot(nn.gelu(dot(x, up)), down))(*kernels(s, x))
    return jnp.einsum("ebtc,bte->btc", y, routed(s, x))


@case(TOKENS, {"a": 8, "w": 12}, {"w[0]": "indexed by the groups of"})
def ragged_dot_of_transposed_kernels(s, x):
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    flat, w = x.reshape(-1, x.shape[-1]), s.param("w", 2, 12, x.shape[-1])
    return jax.lax.ragged_dot_general(flat, w, jnp.array([7, 8]), numbers).reshape(*x.shape[:2], -1)


# --- loops and choices ------------------------------------------------------------------------------------------------


@case(VECTOR, {"a": 8})
def fixed_point(s, x):
    w = s.param("w", x.shape[-1], x.shape[-1])
    turn = lambda state: (jnp.tanh(0.1 * dot(state[0], w) + x), state[1] + 1)  # noqa: E731
    return jax.lax.while_loop(lambda state: state[1] < 4, turn, (jnp.zeros_like(x), 0))[0]


@case(VECTOR, {}, {"a/kernel[1]": "mixed by reduce_max"})
def fixed_point_with_a_tolerance(s, x):
    w = s.param("w", x.shape[-1], x.shape[-1])
    turn = lambda state: (jnp.tanh(0.1 * dot(state[0], w) + x), state[0])  # noqa: E731
    start = (jnp.zeros_like(x), jnp.ones_like(x))
    return jax.lax.while_loop(lambda state: jnp.abs(state[0] - state[1]).max() > 1e-3, turn, start)[0]


@case(TOKENS, {"a": 8})
def rarer_operations(s, x):
    """Free along the channels, which the transforms do not mix."""
    x = jax.lax.reduce(x, np.float32(0), lambda a, b: a + b * b, (1,))
    x = jax.lax.composite(jnp.tanh, "example.tanh")(x) + jax.lax.igamma(jnp.ones_like(x), jnp.abs(x))
    lower = jnp.tril(s.param("lower", 3, 3)) + 3 * jnp.eye(3)
    return jax.scipy.linalg.solve_triangular(lower, x, lower=True)


def library_attention(s, x):
    q, k, v = (s.dense(n, size, x).reshape(*x.shape[:2], -1, 4) for n, size in (("q", 24), ("k", 12), ("v", 12)))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return y.reshape(*y.shape[:2], -1)


# --- frozen, and their neighbours free --------------------------------------------------------------------------------


@case(IMAGE, {}, {"a/kernel[3]": "mixed by reduce_max", "b/kernel[2]": "mixed by reduce_max"})
def attention_over_places(s, x):
    both = jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], -1)
    return x * nn.sigmoid(s.conv("places", 1, 7, both))


@case(IMAGE, {}, {"a/kernel[3]": "axis of conv_general_dilated", "b/kernel[2]": "axis of conv_general_dilated"})
def convolution_over_channels(s, x):
    gate = s.conv("eca", 1, 3, x.mean((1, 2))[..., None])[..., 0]
    return x * nn.sigmoid(gate)[:, None, None]


def mixes(x):
    return {
        "sort": lambda: jnp.sort(x, -1),
        "argsort": lambda: jnp.argsort(x, -1).astype(x.dtype),
        "top_k": lambda: x * (x >= jax.lax.top_k(x, 3)[0][..., -1:]),
        "cumsum": lambda: jnp.cumsum(x, -1),
        "pure_callback": lambda: jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
        "pad": lambda: jax.lax.associative_scan(jnp.add, x, axis=-1),
        "fft": lambda: jnp.abs(jnp.fft.fft(x)),
        "approx_top_k": lambda: x * jax.lax.approx_max_k(x, 3)[0].mean(-1, keepdims=True),
    }


@pytest.mark.parametrize("name", mixes(None))
def test_what_mixes_units_is_named_with_its_line(name):
    def function(s, x):
        x = mixes(nn.relu(s.dense("a", 8, nn.relu(s.dense("before", 5, x)))))[name]()
        return s.dense("out", 3, nn.relu(s.dense("after", 6, x)))

    module, _ = network_in("nnx", function, image(7))
    found = traced(module, image(7))
    assert groups(found) == {"before": ("neurons", 5), "after": ("neurons", 6)}
    reason = reasons(found)["a/kernel[1]"]
    assert ("sort" if name == "argsort" else name) in reason and "tests/test_operations.py:" in reason


@pytest.mark.parametrize(("library", "function", "shape", "free", "frozen"), CASES)
def test_operation(library, function, shape, free, frozen):
    x = image(*shape)
    module, variables = network_in(library, function, x)
    found = traced(module, x)
    assert {name: size for name, (kind, size) in groups(found).items() if kind != "branches"} == free
    why = reasons(found)
    for axis, part in frozen.items():
        assert part in why[axis] and "tests/" in why[axis]
    prove(found, variables, x)


def test_complex_parameters():
    def function(s, x):
        x = nn.relu(s.dense("a", 8, x))
        y = spectral_convolution(x, s.param("w", 2, x.shape[-1], 9, dtype=jnp.complex64))
        return s.dense("out", 3, y.mean(1))

    module, variables = network_in("nnx", function, image(*TOKENS))
    found = traced(module, image(*TOKENS))
    assert groups(found) == {"a": ("neurons", 8), "w": ("neurons", 9)}
    prove(found, variables, image(*TOKENS))


def test_heads_in_groups_of_queries():
    def function(s, x):
        return s.dense("out", 3, library_attention(s, x).mean(1))

    module, variables = network_in("nnx", function, image(*TOKENS))
    found = traced(module, image(*TOKENS))
    assert ("heads", 3) in groups(found).values()
    prove(found, variables, image(*TOKENS))


# --- layers of the libraries ------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
        layer = nn.Conv(9, (3, 3), name="d")
        if self.how == "weight":
            x = nn.WeightNorm(layer, name="w")(x)
        else:
            x = nn.SpectralNorm(layer, name="w")(x, update_stats=False)
        return nn.Dense(3, name="out")(nn.relu(x).mean((1, 2)))


class WrappedNnx(nnx.Module):
    def __init__(self, how, rngs):
        self.a, self.out = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Linear(9, 3, rngs=rngs)
        layer = nnx.Conv(8, 9, (3, 3), rngs=rngs)
        spectral = how == "spectral"
        self.d = (
            nnx.SpectralNorm(layer, update_stats=False, rngs=rngs) if spectral else nnx.WeightNorm(layer, rngs=rngs)
        )

    def __call__(self, x):
        return self.out(nnx.relu(self.d(nnx.relu(self.a(x)))).mean((1, 2)))


@pytest.mark.parametrize("how", ["weight", "spectral"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_normalised_layers_lose_inputs_and_outputs(library, how):
    x = image(*IMAGE)
    if library == "linen":
        module = Wrapped(how)
        variables = variables_of(module, x)
    else:
        module, variables = FunctionalModule.split(WrappedNnx(how, nnx.Rngs(0)))
    found = trace(module, x)
    assert sorted(groups(found).values()) == [("channels", 8), ("channels", 9)]
    prove(found, variables, x)


# --- the order of contraction -----------------------------------------------------------------------------------------


class Factors(nn.Module):
    """The sizes decide which pair is contracted first."""

    how: str = "named"

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(20, name="a")(x))
        u = self.param("u", nn.initializers.normal(0.4), (x.shape[-1], self.width("u", 9)))
        v = self.param("v", nn.initializers.normal(0.4), (u.shape[-1], self.width("v", 16)))
        y = {
            "named": lambda: jnp.einsum("bi,ir,ro->bo", x, u, v),
            "listed": lambda: jnp.einsum(x, [0, 1], u, [1, 2], v, [2, 3], [0, 3]),
            "chain": lambda: jnp.linalg.multi_dot([x, u, v]),
        }[self.how]()
        return nn.Dense(3, name="out")(nn.relu(y))

    def width(self, name, n):
        return self.get_variable("params", name).shape[1] if self.has_variable("params", name) else n


@pytest.mark.parametrize("how", ["named", "listed", "chain"])
def test_a_student_may_contract_in_another_order(how):
    module, x = Factors(how), image(7)
    found, variables = traced(module, x), variables_of(Factors(how), x)
    assert {name: size for name, (_, size) in groups(found).items()} == {"a": 20, "u": 9, "v": 16}
    keep = {"a": np.arange(20) < 3, "u": np.arange(9) < 8, "v": np.arange(16) < 2}
    whole, student = count(module, x), count(found.student(keep), x)
    assert whole.orders[0].order.products != student.orders[0].order.products
    ones = {name: np.ones(len(mask), np.float32) for name, mask in keep.items()}
    sliced = surgery.slice_variables(surgery.gated(variables, ones, keep, found), found, keep)
    proof = surgery.verify(found, variables, ones, keep, sliced, x)
    assert proof["macs"] == student.macs < found.topology.cost(keep)[0]
    prove(found, variables, x, hows=("half", "one"))


EQUATIONS = ["ab,bc,cd->ad", "ab,ab,bc->ac", "abc,cd,bd,de->ae", "ab,cb,db->acd", "ab,bc,cd,da->", "abc,c,cd->bd"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_einsum_is_one_operation_in_any_order(equation):
    """The equation does not depend on the order of contraction; the cost is that of the order."""
    sizes = dict(zip("abcde", (2, 3, 4, 5, 6), strict=True))
    operands = [image(*(sizes[i] for i in term))[0] for term in equation.split("->")[0].split(",")]
    found = set()
    for path in orders(len(operands)):
        closed = jax.make_jaxpr(lambda *xs, path=path: jnp.einsum(equation, *xs, optimize=path))(*operands)
        (op,) = flatten_jaxpr(closed).ops
        assert op.name == einsum.NAME
        found.add(op.params["equation"])
        dots = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "dot_general"]
        macs = 0
        for eqn in dots:
            (left, _), _ = eqn.params["dimension_numbers"]
            macs += eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in left]))
        assert op.params["order"].macs() == macs
    ((factors, indices),) = found
    terms = itertools.chain.from_iterable((operands[i], list(letters)) for i, letters in factors)
    np.testing.assert_allclose(np.einsum(*terms, list(indices)), np.einsum(equation, *operands), rtol=1e-4)


def orders(n):
    """All ways to contract n operands in pairs, as paths of opt_einsum."""
    if n == 1:
        return [[]]
    pairs = itertools.combinations(range(n), 2)
    return [[pair, *rest] for pair in pairs for rest in orders(n - 1)]


def test_different_sums_are_different_operations():
    x = image(3, 3)[0]
    networks = set()
    for equation in ("ab,bc,cd->ad", "ab,bc,cd->da", "ab,bc,dc->ad", "ba,bc,cd->ad", "ab,bc,ca->a", "ab,ab,ab->ab"):
        (op,) = flatten_jaxpr(jax.make_jaxpr(lambda *xs, e=equation: jnp.einsum(e, *xs))(x, 2 * x, 3 * x)).ops
        networks.add(op.params["equation"])
    assert len(networks) == 6


def test_unit_costs_are_those_of_a_fresh_student_for_every_kind_of_cut():
    module, x = Factors(), image(7)
    found = traced(module, x)
    rng = np.random.default_rng(0)
    for _ in range(5):
        keep = random_keep(found.topology, rng)
        surgery.verify_cost(found, keep, found.student(keep))
