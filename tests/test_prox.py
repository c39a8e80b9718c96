"""The proximal operators by what defines them, and the accelerated step by where it converges to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdsearch_jax.pruning.prox import accelerated_proximal_l1, soft_threshold

LAMBDA, RATE, MOMENTUM, COORDINATES = 0.3, 0.1, 0.9, 2000
vectors = hnp.arrays(np.float32, st.integers(1, 8), elements=st.floats(-100, 100, width=32, allow_subnormal=False))
thresholds = st.floats(0, 100, width=32, allow_subnormal=False)


# --- operators ------------------------------------------------------------------------------------------------------


@given(vectors, thresholds)
def test_soft_threshold_satisfies_the_optimality_condition(x, threshold):
    """y = argmin ½‖y − x‖² + t‖y‖₁ exactly where x − y is t·sign(y), or within [−t, t] where y is 0."""
    y = np.asarray(soft_threshold(jnp.asarray(x), threshold))
    tolerance = 1e-5 * np.maximum(np.abs(x), 1)
    gap = np.where(y == 0, np.maximum(np.abs(x) - threshold, 0), np.abs(x - y - threshold * np.sign(y)))
    assert (gap <= tolerance).all()


@given(vectors, vectors, thresholds)
def test_soft_threshold_is_nonexpansive(x, y, threshold):
    n = min(len(x), len(y))
    a, b = (np.asarray(soft_threshold(jnp.asarray(v[:n]), threshold), float) for v in (x, y))
    distance = np.linalg.norm(x[:n].astype(float) - y[:n])
    assert np.linalg.norm(a - b) <= distance + 1e-4


def test_a_threshold_may_be_zero_or_differ_by_entry():
    x = jnp.array([-2.0, 0.0, 3.0])
    assert (soft_threshold(x, 0.0) == x).all()
    assert (soft_threshold(x, jnp.array([1.0, 1.0, 5.0])) == jnp.array([-1.0, 0.0, 0.0])).all()


# --- the accelerated step -------------------------------------------------------------------------------------------


def quadratic(seed):
    """½ Σ h (g − a)²: curvatures h (all steps of RATE converge), minimum a, float32."""
    random = np.random.default_rng(seed)
    curvature = random.uniform(0.2, 3, COORDINATES).astype(np.float32)
    return curvature, random.normal(0, 0.4, COORDINATES).astype(np.float32)


def minimum(curvature, centre, penalty, nonnegative):
    """The argmin of the quadratic plus penalty·|g|, in closed form and float64."""
    pull = curvature.astype(float) * centre
    best = np.sign(pull) * np.maximum(np.abs(pull) - penalty, 0) / curvature
    return np.maximum(best, 0) if nonnegative else best


def descend(tx, curvature, centre, start, steps, **extra):
    """The parameters and state after so many updates, compiled."""

    def one(carry, _):
        g, state = carry
        updates, state = tx.update(curvature * (g - centre), state, g, **extra)
        return (optax.apply_updates(g, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(one, carry, None, length=steps)[0])((start, tx.init(start)))


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_accelerated_step_finds_exactly_the_zeros_of_the_solution(nonnegative, start):
    curvature, centre = quadratic(0)
    best = minimum(curvature, centre, LAMBDA, nonnegative)
    assert 500 < (best == 0).sum() < 1900
    tx = accelerated_proximal_l1(RATE, MOMENTUM, nonnegative=nonnegative)
    g, _ = descend(tx, curvature, centre, jnp.full(COORDINATES, start), 400, penalty=LAMBDA)
    assert g.dtype == jnp.float32
    assert ((np.asarray(g) == 0) == (best == 0)).all()
    np.testing.assert_allclose(g, best, atol=1e-5)


def test_momentum_and_shrinkage_in_a_chain_do_not():
    """What the module's docstring warns of: the zeros of heavy-ball momentum followed by a soft threshold are few."""
    curvature, centre = quadratic(0)
    zeros = (minimum(curvature, centre, LAMBDA, False) == 0).sum()

    def shrink(updates, state, params):
        return soft_threshold(params + updates, RATE * LAMBDA) - params, state

    chain = optax.chain(
        optax.sgd(RATE, MOMENTUM), optax.GradientTransformation(lambda params: optax.EmptyState(), shrink)
    )
    g, _ = descend(chain, curvature, centre, jnp.ones(COORDINATES), 400)
    assert (np.asarray(g) == 0).sum() < zeros / 4


def test_the_solution_satisfies_the_optimality_condition_for_every_penalty():
    """A penalty of its own for each gate, 0 among them: 0 ∈ ∂ + γ·∂|g| on g ≥ 0."""
    curvature, centre = quadratic(1)
    penalty = jnp.asarray(np.random.default_rng(2).exponential(0.3, COORDINATES).astype(np.float32)).at[:200].set(0)
    tx = accelerated_proximal_l1(RATE, MOMENTUM)
    g, _ = descend(tx, curvature, centre, jnp.ones(COORDINATES), 600, penalty=penalty)
    slope = np.asarray(curvature * (g - centre) + penalty)
    g = np.asarray(g)
    assert (g >= 0).all() and (g == 0).any() and (g > 0).any()
    assert np.abs(slope[g > 0]).max() < 1e-4  # no way to improve inside
    assert slope[g == 0].min() > -1e-4  # nor to gain by leaving the bound


def test_one_update_is_the_formula_of_the_docstring():
    random = np.random.default_rng(3)
    tx = accelerated_proximal_l1(optax.linear_schedule(0.2, 0.1, 4), 0.5)
    g, v = np.abs(random.normal(size=50)).astype(np.float32), np.zeros(50, np.float32)
    params, state = jnp.asarray(g), tx.init(jnp.asarray(g))
    for i in range(4):
        gradient = random.normal(size=50).astype(np.float32)
        gamma = random.exponential(1.0, 50).astype(np.float32)
        rate = 0.2 - 0.025 * i
        x = g - rate * gradient
        z = np.sign(x) * np.maximum(np.abs(x) - rate * gamma, 0)
        v = z - g + 0.5 * v
        g = np.maximum(0, z + 0.5 * v)
        updates, state = tx.update(jnp.asarray(gradient), state, params, penalty=jnp.asarray(gamma))
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, g, atol=1e-6)
        np.testing.assert_allclose(state.velocity, v, atol=1e-6)
    assert state.count == 4 and (g == 0).any() and (g > 0).any()


def test_a_gate_whose_shrinkage_is_zero_is_zero_at_once_whatever_its_momentum():
    """Gates pushed up for a while, then a penalty above all of them: one update ends them, and zeros stay."""
    tx = accelerated_proximal_l1(0.01, 0.9)
    g = jnp.linspace(0.0, 2.0, 101)
    state, update = tx.init(g), jax.jit(tx.update)
    for _ in range(20):
        updates, state = update(jnp.full(101, -5.0), state, g, penalty=0.0)
        g = optax.apply_updates(g, updates)
    assert (state.velocity > 0.01).all() and (g > 0).all()
    for _ in range(3):
        updates, state = update(jnp.full(101, -5.0), state, g, penalty=1e4)
        g = optax.apply_updates(g, updates)
        assert (g == 0).all()


def test_it_takes_trees_and_keeps_structure_and_dtypes():
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}}
    tx = accelerated_proximal_l1(0.1)
    state = tx.init(params)
    for penalty in (0.5, jnp.float32(0.5), jax.tree.map(lambda x: jnp.full(x.shape, 0.5), params)):
        updates, after = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params, penalty=penalty)
        for tree in (updates, after.velocity):
            assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
                lambda x: (x.shape, x.dtype), params
            )
        np.testing.assert_allclose(updates["a"], 1.9 * -0.15, rtol=1e-6)  # z − 1 is −.15, and .9 of it once more
        np.testing.assert_allclose(updates["b"]["c"].astype(jnp.float32), 1.9 * -0.15, rtol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.1, 1.0), "momentum: 1.0"), ((0.1, -0.1), "momentum: -0.1"), ((-0.1, 0.9), "learning_rate: -0.1")],
)
def test_settings_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        accelerated_proximal_l1(*arguments)


def test_parameters_and_penalty_must_be_given():
    tx, g = accelerated_proximal_l1(0.1), jnp.ones(2)
    with pytest.raises(ValueError, match="penalty"):
        tx.update(g, tx.init(g), g)
    with pytest.raises(ValueError, match="penalty"):
        tx.update(g, tx.init(g), penalty=1.0)
