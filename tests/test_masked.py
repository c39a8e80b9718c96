"""Classes that a model has masked count in no loss and no metric: each equals that of the other classes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.distill import ensemble, losses, metrics
from kdsearch_jax.distill import objective as task_lib
from kdsearch_jax.distill.losses import predictions
from kdsearch_jax.distill.objective import Objective, Output
from kdsearch_jax.distill.settings import DistillConfig

BATCH, CLASSES = 6, 9
KEPT = np.array([1, 1, 0, 1, 0, 1, 1, 0, 1], bool)  # the same classes for all examples
LABELS = jnp.asarray(np.resize(np.flatnonzero(KEPT), BATCH))
OF_KEPT = jnp.asarray(np.cumsum(KEPT)[LABELS] - 1)  # the labels among the kept classes
MASKS = {
    "-inf": -np.inf, "-1e9": -1e9, "-1e30": -1e30, "the smallest float32": np.finfo(np.float32).min, "-1e4": -1e4,
    "the smallest bfloat16": float(jnp.finfo(jnp.bfloat16).min),
}  # fmt: skip
DIRECTIONS = ("forward", "reverse")


def logits(seed):
    return 3 * jax.random.normal(jax.random.key(seed), (BATCH, CLASSES))


def with_mask(values, mask, kept=KEPT):
    return jnp.where(jnp.broadcast_to(kept, values.shape), values, mask)


def of_student(loss):
    return jax.jit(jax.value_and_grad(lambda s, t, labels: loss(s, t, labels).sum()))


LOSSES = {
    **{f"kl {d} {t}": lambda s, t_, _, d=d, t=t: losses.kl(s, t_, t, d) for d in DIRECTIONS for t in (0.5, 4.0)},
    "dkd": lambda s, t, labels: losses.decoupled(s, t, labels, 2.0),
    "dist": lambda s, t, _: losses.relations(s, t, 2.0),
    "labels": lambda s, t, labels: losses.cross_entropy(s, labels),
    "all": lambda s, t, labels: losses.distillation(
        s, t, labels, DistillConfig(losses=("kl", "dkd", "dist"), cross_entropy=0.3)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_other_classes(name):
    loss, (student, teacher) = of_student(LOSSES[name]), (logits(0), logits(1))
    value, gradient = of_student(LOSSES[name])(student[:, KEPT], teacher[:, KEPT], OF_KEPT)
    for mask in MASKS.values():
        masked, slopes = loss(with_mask(student, mask), with_mask(teacher, mask), LABELS)
        np.testing.assert_allclose(masked, value, rtol=1e-5)
        np.testing.assert_allclose(slopes[:, KEPT], gradient, atol=1e-5)
        assert (slopes[:, ~KEPT] == 0).all()


@pytest.mark.parametrize("name", ["kl forward 4.0", "kl reverse 0.5", "dkd", "dist"])
def test_a_mask_of_either_counts_for_both(name):
    loss, (student, teacher) = of_student(LOSSES[name]), (logits(0), logits(1))
    both, slopes = loss(with_mask(student, -jnp.inf), with_mask(teacher, -jnp.inf), LABELS)
    for mask in (-np.inf, -1e9, np.finfo(np.float32).min):
        for pair in ((with_mask(student, mask), teacher), (student, with_mask(teacher, mask))):
            value, gradient = loss(*pair, LABELS)
            np.testing.assert_allclose(value, both, rtol=1e-5)
            np.testing.assert_allclose(gradient, slopes, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mask", ["-inf", "-1e9"])
def test_losses_are_finite_whatever_is_masked(name, mask):
    """All classes, all but one, and others in each example, the label's among them."""
    kept = np.random.default_rng(0).random((BATCH, CLASSES)) < 0.5
    kept[0], kept[1], kept[2, int(LABELS[2])] = False, np.arange(CLASSES) == 3, False
    pair = (with_mask(logits(seed), MASKS[mask], kept) for seed in (0, 1))
    value, gradient = of_student(LOSSES[name])(*pair, LABELS)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (np.asarray(gradient)[1:][~kept[1:]] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_is_no_mask(name):
    value, _ = of_student(LOSSES[name])(logits(0).at[2, 1].set(jnp.nan), logits(1), LABELS)
    assert np.isnan(value)


def test_logits_far_from_zero_are_not_masked():
    """A mask is far below the other classes, wherever these are: logarithms of likelihoods may all be -1e6."""
    student, teacher = logits(0), logits(1)
    assert predictions.unmasked(student - 1e6, teacher - 2e6).all()
    assert predictions.unmasked(100 * student, 100 * teacher).all()
    np.testing.assert_allclose(
        losses.kl(student - 1e6, teacher - 1e6), losses.kl(student, teacher), rtol=0.2
    )  # of what float32 leaves of them


@pytest.mark.parametrize("mask", MASKS)
def test_metrics_are_those_of_the_other_classes(mask):
    student, teacher = logits(0), logits(1)
    objective = task_lib.classification(DistillConfig())
    found = objective.measure(with_mask(student, MASKS[mask]), {"labels": LABELS}, with_mask(teacher, MASKS[mask]))
    expected = objective.measure(student[:, KEPT], {"labels": OF_KEPT}, teacher[:, KEPT])
    assert {"accuracy", "loss", "kl", "agreement"} <= found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, err_msg=name)


def test_a_masked_label_is_never_right_and_a_masked_class_never_agrees():
    masked = with_mask(logits(0), -jnp.inf)
    for k in (1, 5, CLASSES):
        assert (metrics.top_k(masked, jnp.full(BATCH, 2), k) == 0).all()
    assert (metrics.top_k(masked, LABELS, CLASSES) == 1).all()
    teacher = logits(0).at[:, 2].set(100.0)  # which the student has masked
    assert (metrics.agreement(masked, teacher) == metrics.agreement(masked, with_mask(teacher, -jnp.inf))).all()
    assert (metrics.agreement(masked, teacher) == 1).all()


@pytest.mark.parametrize("how", ["logits", "probabilities"])
def test_what_one_teacher_masks_their_mean_masks(how):
    teachers = [with_mask(logits(0), -jnp.inf), logits(1)]
    found = ensemble.mean(teachers, how, 2.0)
    assert (found[:, ~KEPT] == -jnp.inf).all()
    np.testing.assert_allclose(
        jax.nn.softmax(found[:, KEPT] / 2), jax.nn.softmax(ensemble.mean([t[:, KEPT] for t in teachers], how, 2.0) / 2),
        rtol=1e-5,
    )  # fmt: skip


# --- values -----------------------------------------------------------------------------------------------------------


def of_values(teacher):
    """A task of one output that is no logits, measured on the teacher's."""
    call = CallSpec(("x",), {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    return task_lib.with_output_scales(Objective(call, DistillConfig(), (Output("output", "values"),)), teacher)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("mask", MASKS)
def test_squared_errors_are_those_of_the_other_entries(mask, sign):
    student, teacher = (sign * with_mask(logits(seed), MASKS[mask]) for seed in (0, 1))
    expected = jnp.square(student[:, KEPT] - teacher[:, KEPT]).mean(1) / teacher[:, KEPT].var()
    value, gradient = jax.value_and_grad(lambda s: of_values(teacher).distance(s, teacher, {}).sum())(student)
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-4)
    assert np.isfinite(gradient).all() and (gradient[:, ~KEPT] == 0).all()
    np.testing.assert_allclose(of_values(teacher).distance(student, teacher, {}), expected, rtol=1e-4)


def test_a_mask_may_be_added_and_there_may_be_two():
    added = jnp.where(KEPT, logits(1), logits(1) - 1e4)
    np.testing.assert_allclose(of_values(added).outputs[0].scale, added[:, KEPT].var(), rtol=1e-4)
    two = logits(1).at[:, 2].set(-1e9).at[:, 4].set(1e30).at[:, 7].set(-jnp.inf)
    np.testing.assert_allclose(of_values(two).outputs[0].scale, two[:, KEPT].var(), rtol=1e-4)


@pytest.mark.parametrize("values", [
    1e6 * np.random.default_rng(0).standard_cauchy(200), -1e5 + np.arange(9.0), np.r_[-5000.0, np.arange(9.0)],
    np.full(9, -2e4), np.r_[1280 * np.random.default_rng(0).random(50), 1e-4 * np.random.default_rng(1).random(50)],
])  # fmt: skip
def test_values_far_apart_are_no_masks(values):
    """Heavy tails, an offset, one value alone, a constant, boxes next to scores."""
    low, high = task_lib.mask_bounds(values)
    assert ((values > low) & (values < high)).all()


def test_a_diverged_network_is_not_taken_for_a_masked_one():
    teacher = logits(1)
    assert np.isnan(of_values(teacher).distance(teacher.at[0, 0].set(jnp.nan), teacher, {})[0])
    for broken in (teacher.at[0, 0].set(jnp.nan), jnp.full_like(teacher, -jnp.inf)):
        with pytest.raises(ValueError, match="output is not finite"):
            of_values(broken)
