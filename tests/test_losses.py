"""What the losses promise: KL's definition, limits and gradients, and errors that name the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsearch_jax.distill import losses
from kdsearch_jax.distill.settings import DistillConfig

DIRECTIONS = ("forward", "reverse")


def _logits(seed: int, shape: tuple[int, ...] = (6, 10), scale: float = 3.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def _by_hand(student: np.ndarray, teacher: np.ndarray, temperature: float, direction: str) -> np.ndarray:
    """Σ p log(p/q), in float64 NumPy from probabilities."""
    q, p = (np.exp(np.asarray(x, np.float64) / temperature) for x in (student, teacher))
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1) if direction == "forward" else (q * np.log(q / p)).sum(-1)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_its_definition(direction, temperature):
    student, teacher = _logits(0), _logits(1)
    expected = _by_hand(np.asarray(student), np.asarray(teacher), temperature, direction)
    np.testing.assert_allclose(losses.kl(student, teacher, temperature, direction), expected, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 20), st.floats(0.5, 10), st.sampled_from(DIRECTIONS), st.floats(-30, 30))
def test_kl_is_never_negative_and_zero_for_a_shift(seed, scale, temperature, direction, shift):
    student, teacher = _logits(seed, (3, 5), scale), _logits(seed + 1, (3, 5), scale)
    assert (losses.kl(student, teacher, temperature, direction) >= -1e-6).all()
    np.testing.assert_allclose(losses.kl(teacher + shift, teacher, temperature, direction), 0, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_is_zero_only_for_a_shift(direction):
    teacher = _logits(1)
    assert (losses.kl(teacher.at[:, 3].add(0.3), teacher, 1.0, direction) > 0).all()


def test_gradient_of_the_forward_kl_is_the_difference_of_predictions():
    student, teacher, temperature = _logits(0), _logits(1), 4.0
    gradient = jax.grad(lambda s: losses.kl(s, teacher, temperature).sum())(student)
    expected = (jax.nn.softmax(student / temperature) - jax.nn.softmax(teacher / temperature)) / temperature
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_gradient_of_the_reverse_kl_agrees_with_its_closed_form():
    student, teacher, temperature = _logits(0), _logits(1), 2.0
    gradient = jax.grad(lambda s: losses.kl(s, teacher, temperature, "reverse").sum())(student)
    q, p = jax.nn.softmax(student / temperature), jax.nn.softmax(teacher / temperature)
    ratio = jnp.log(q) - jnp.log(p)
    expected = q * (ratio - (q * ratio).sum(-1, keepdims=True)) / temperature
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_high_temperature_compares_centred_logits(direction):
    """Hinton 2015, equation 4: T²·KL → Σ (ŝ − t̂)² / 2K for T → ∞, with ŝ and t̂ of zero mean."""
    student, teacher = _logits(0), _logits(1)
    centred = [x - x.mean(-1, keepdims=True) for x in (student, teacher)]
    expected = ((centred[0] - centred[1]) ** 2).sum(-1) / (2 * student.shape[-1])
    scaled = 100.0**2 * losses.kl(student, teacher, 100.0, direction)
    np.testing.assert_allclose(scaled, expected, rtol=0.05)


def test_cross_entropy_is_the_forward_kl_from_a_certain_teacher():
    student, labels = _logits(0), jnp.arange(6) % 10
    certain = 200.0 * jax.nn.one_hot(labels, 10)
    np.testing.assert_allclose(losses.cross_entropy(student, labels), losses.kl(student, certain), rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_distillation_mixes_both_losses(share):
    student, teacher, labels = _logits(0), _logits(1), jnp.arange(6) % 10
    config = DistillConfig(temperature=3.0, direction="forward", cross_entropy=share)
    expected = (1 - share) * 9 * losses.kl(student, teacher, 3.0) + share * losses.cross_entropy(student, labels)
    np.testing.assert_allclose(losses.distillation(student, teacher, labels, config), expected, rtol=1e-6)


def test_the_teacher_gets_no_gradient():
    student, labels = _logits(0), jnp.arange(6) % 10
    config = DistillConfig(cross_entropy=0.5)
    gradient = jax.grad(lambda t: losses.distillation(student, t, labels, config).sum())(_logits(1))
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_float32_inside_whatever_comes_in(dtype):
    student, teacher, labels = _logits(0).astype(dtype), _logits(1).astype(dtype), jnp.arange(6) % 10
    config = DistillConfig(cross_entropy=0.3)
    value = jax.jit(lambda s, t: losses.distillation(s, t, labels, config))(student, teacher)
    exact = losses.distillation(student.astype(jnp.float32), teacher.astype(jnp.float32), labels, config)
    assert value.shape == (6,) and value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-5)


def test_huge_logits_stay_finite():
    student, teacher = _logits(0, scale=1e4), _logits(1, scale=1e4)
    for direction in DIRECTIONS:
        value, gradient = jax.value_and_grad(lambda s: losses.kl(s, teacher, 1.0, direction).sum())(student)  # noqa: B023
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("settings_", "names"),
    [
        ({"temperature": 0.0}, "temperature .*0.0"),
        ({"temperature": float("nan")}, "temperature .*nan"),
        ({"temperature": float("inf")}, "temperature .*inf"),
        ({"cross_entropy": 1.5}, "cross_entropy .*1.5"),
        ({"cross_entropy": -0.1}, "cross_entropy .*-0.1"),
        ({"direction": "forwards"}, "direction.*'forwards'.*mean 'forward'"),
    ],
)
def test_wrong_settings_are_named(settings_, names):
    with pytest.raises(ValueError, match=names):
        losses.distillation(_logits(0), _logits(1), jnp.arange(6), DistillConfig(**settings_))


def test_another_number_of_classes_is_named():
    with pytest.raises(ValueError, match=r"\(6, 10\).*\(6, 11\).*classes"):
        losses.kl(_logits(0), _logits(1, (6, 11)))
