"""The losses beyond KL, each against a second formulation in NumPy or SciPy, and their invariances."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax

from kdsearch_jax.distill import losses
from kdsearch_jax.distill.losses import learned
from kdsearch_jax.distill.settings import LOSSES, DistillConfig, loss_weights

BATCH, CLASSES = 6, 10
LABELS = jnp.arange(BATCH) % CLASSES


def _normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def _logits(seed: int) -> jax.Array:
    return _normal(seed, BATCH, CLASSES, scale=3.0)


def _maps(seed: int, channels: int = 5) -> jax.Array:
    return _normal(seed, BATCH, 4, 3, channels)


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_kl_is_its_definition(temperature):
    """Both parts from probabilities, example by example, in float64."""
    student, teacher = _logits(0), _logits(1)
    expected = []
    for s, t, label in zip(np.asarray(student, float), np.asarray(teacher, float), np.asarray(LABELS), strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        target = stats.entropy([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = stats.entropy(np.delete(p, label), np.delete(q, label))  # which it normalises
        expected.append(2.0 * target + 3.0 * others)
    found = losses.decoupled(student, teacher, LABELS, temperature, alpha=2.0, beta=3.0)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_kl_is_the_sum_of_its_parts():
    """KL = TCKD + (1 − p_t)·NCKD, equation 6 of the paper: here with β = 1 − p_t for each example."""
    student, teacher = _logits(0), _logits(1)
    target = losses.decoupled(student, teacher, LABELS, 2.0, alpha=1.0, beta=0.0)
    others = losses.decoupled(student, teacher, LABELS, 2.0, alpha=0.0, beta=1.0)
    sure = jnp.take_along_axis(jax.nn.softmax(teacher / 2.0), LABELS[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(target + (1 - sure) * others, losses.kl(student, teacher, 2.0), rtol=1e-4, atol=1e-6)


def test_relations_are_the_correlations_that_scipy_finds():
    student, teacher = _logits(0), _logits(1)
    q, p = (softmax(np.asarray(x, float) / 4.0, axis=-1) for x in (student, teacher))
    inter = [1 - stats.pearsonr(a, b)[0] for a, b in zip(q, p, strict=True)]
    intra = np.mean([1 - stats.pearsonr(a, b)[0] for a, b in zip(q.T, p.T, strict=True)])
    found = losses.relations(student, teacher, 4.0)
    assert found.shape == (BATCH,)
    np.testing.assert_allclose(found.mean(), np.mean(inter) + intra, rtol=1e-4)
    alone = jnp.stack([losses.relations(s[None], t[None], 4.0)[0] for s, t in zip(student, teacher, strict=True)])
    np.testing.assert_allclose(alone, inter, rtol=1e-4)  # a batch of one has no relations within it
    # What an example adds to the relations over the batch is never negative.
    assert (np.asarray(found) >= np.array(inter) - 1e-5).all()


def test_relations_take_positions_as_examples():
    student, teacher = _normal(0, 2, 3, CLASSES), _normal(1, 2, 3, CLASSES)
    flat = losses.relations(student.reshape(6, CLASSES), teacher.reshape(6, CLASSES))
    np.testing.assert_allclose(losses.relations(student, teacher), flat.reshape(2, 3), rtol=1e-6)


@pytest.mark.parametrize("name", ["dkd", "dist"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_of_predictions_vanish_where_student_and_teacher_agree(name, temperature):
    teacher, config = _logits(1), DistillConfig(losses=(name,), temperature=temperature)

    def loss(student):
        return losses.distillation(student, teacher, LABELS, config)

    np.testing.assert_allclose(loss(teacher + 7.0), 0, atol=2e-3 if name == "dist" else 2e-4)  # a shift says nothing
    gradient = jax.grad(lambda s: loss(s).sum())(teacher)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert (loss(_logits(0)) > 0).all()


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_extreme_predictions_have_finite_gradients(name):
    config = DistillConfig(losses=(name,), temperature=1.0)
    loss = jax.jit(jax.value_and_grad(lambda s, t: losses.distillation(s, t, LABELS, config).sum()))
    for student in (jnp.zeros((BATCH, CLASSES)), 1e4 * _logits(0), 200.0 * jax.nn.one_hot(LABELS, CLASSES)):
        for teacher in (jnp.zeros((BATCH, CLASSES)), 1e4 * _logits(1)):
            value, gradient = loss(student, teacher)
            assert np.isfinite(value) and np.isfinite(gradient).all()


def test_two_classes_have_no_others():
    student, teacher, labels = _normal(0, 4, 2), _normal(1, 4, 2), jnp.array([0, 1, 0, 1])
    expected = losses.kl(student, teacher)
    np.testing.assert_allclose(losses.decoupled(student, teacher, labels, beta=100.0), expected, rtol=1e-4, atol=1e-6)


def test_weighted_losses_add_up():
    student, teacher = _logits(0), _logits(1)
    config = DistillConfig(losses=("kl:0.5", "dkd:2", "dist", "at:1000"), temperature=2.0, dkd_beta=3.0)
    expected = 4 * (
        0.5 * losses.kl(student, teacher, 2.0)
        + 2 * losses.decoupled(student, teacher, LABELS, 2.0, beta=3.0)
        + losses.relations(student, teacher, 2.0)
    )
    np.testing.assert_allclose(losses.distillation(student, teacher, LABELS, config), expected, rtol=1e-5)


def test_only_losses_of_features_leave_the_predictions_alone():
    config = DistillConfig(losses=("at:1000",))
    assert (losses.distillation(_logits(0), _logits(1), LABELS, config) == 0).all()


# --- maps -----------------------------------------------------------------------------------------------------------


def test_attention_is_its_definition():
    student, teacher = _maps(0, channels=2), _maps(1, channels=7)
    expected = []
    for s, t in zip(np.asarray(student, float), np.asarray(teacher, float), strict=True):
        maps = []
        for features in (s, t):
            energy = np.array([[sum(c**2 for c in pixel) for pixel in row] for row in features])
            maps.append(energy / np.sqrt((energy**2).sum()))
        expected.append(((maps[0] - maps[1]) ** 2).mean())
    np.testing.assert_allclose(losses.attention(student, teacher), expected, rtol=1e-4)


def test_attention_does_not_mind_size_sign_or_order_of_channels():
    teacher = _maps(1)
    same = -2.5 * teacher[..., jnp.array([3, 1, 4, 0, 2])]
    np.testing.assert_allclose(losses.attention(same, teacher), 0, atol=1e-10)
    doubled = jnp.concatenate([teacher, teacher], axis=-1)
    np.testing.assert_allclose(losses.attention(doubled, teacher), 0, atol=1e-10)


def test_a_hint_is_its_definition():
    student, teacher = _maps(0, channels=2), _maps(1, channels=7)
    linear = {"kernel": _normal(2, 2, 7), "bias": _normal(3, 7)}
    kernel, bias = np.asarray(linear["kernel"]), np.asarray(linear["bias"])
    expected = []
    for s, t in zip(np.asarray(student, float), np.asarray(teacher, float), strict=True):
        errors = []
        for i, j, k in itertools.product(range(4), range(3), range(7)):
            guess = sum(s[i, j, c] * kernel[c, k] for c in range(2)) + bias[k]
            errors.append((guess - t[i, j, k]) ** 2)
        expected.append(np.mean(errors))
    np.testing.assert_allclose(losses.hint(student, teacher, linear), expected, rtol=1e-4)


def test_a_map_between_equal_sizes_begins_as_the_identity_and_another_keeps_the_scale():
    teacher = _maps(1)
    begin = learned.init(jax.random.key(0), 5, 5, identity=True)
    assert (losses.hint(teacher, teacher, begin) == 0).all()
    wide = learned.init(jax.random.key(0), 200, 300, identity=True)
    assert abs(float(learned.linear(wide, _normal(1, 50, 200)).std()) - 1) < 0.1


# --- relations in a batch -------------------------------------------------------------------------------------------


def _huber(x: float) -> float:
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def test_distances_are_their_definition():
    student, teacher = _normal(0, BATCH, 3, scale=4.0), _normal(1, BATCH, 7)

    def relative(x: np.ndarray) -> dict[tuple[int, int], float]:
        pairs = {(i, j): float(np.linalg.norm(x[i] - x[j])) for i, j in itertools.permutations(range(BATCH), 2)}
        return {pair: length / np.mean(list(pairs.values())) for pair, length in pairs.items()}

    s, t = (relative(np.asarray(x, float)) for x in (student, teacher))
    expected = [np.mean([_huber(s[i, j] - t[i, j]) for j in range(BATCH) if j != i]) for i in range(BATCH)]
    np.testing.assert_allclose(losses.distances(student, teacher), expected, rtol=1e-4)


def test_angles_are_their_definition():
    student, teacher = _normal(0, BATCH, 3), _normal(1, BATCH, 7)

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    s, t = (np.asarray(x, float) for x in (student, teacher))
    expected = [
        np.mean(
            [
                _huber(cosine(s, i, j, k) - cosine(t, i, j, k))
                for i, k in itertools.permutations([n for n in range(BATCH) if n != j], 2)
            ]
        )
        for j in range(BATCH)
    ]
    np.testing.assert_allclose(losses.angles(student, teacher), expected, rtol=1e-4)


@pytest.mark.parametrize("loss", [losses.distances, losses.angles])
def test_relations_in_a_batch_do_not_mind_where_it_lies(loss):
    """Moved, turned, mirrored, enlarged and in more dimensions, the vectors lie to each other as before."""
    teacher = _normal(1, BATCH, 4)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 4)))[0].astype(np.float32)
    np.testing.assert_allclose(loss(-3.0 * teacher @ rotation.T + 5.0, teacher), 0, atol=1e-9)
    assert (loss(_normal(0, BATCH, 4), teacher) > 0).all()
    order = jnp.array([3, 1, 5, 0, 2, 4])
    found = loss(_normal(0, BATCH, 4)[order], teacher[order])
    np.testing.assert_allclose(found, loss(_normal(0, BATCH, 4), teacher)[order], rtol=1e-4)


def _by_hand(s: np.ndarray, t: np.ndarray, heads: tuple, temperature: float) -> list[float]:
    """NCE with N negatives, pair by pair; e over its mean over all pairs, as the authors' code has it."""
    maps = jax.tree.map(np.asarray, heads)
    s, t = (np.asarray(x, float) @ h["kernel"] + h["bias"] for x, h in zip((s, t), maps, strict=True))
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    e = np.exp(s @ t.T / temperature)
    e, count = e / e.mean(), len(s) - 1
    h = e / (e + count)
    result = []
    for i in range(len(s)):
        value = -2 * np.log(h[i, i])
        for j in range(len(s)):
            value -= (np.log(1 - h[i, j]) + np.log(1 - h[j, i])) if j != i else 0.0
        result.append(value)
    return result


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_contrastive_is_noise_contrastive_estimation(temperature):
    student, teacher = _normal(0, BATCH, 3), _normal(1, BATCH, 7)
    heads = tuple(learned.init(jax.random.key(n), size, 16) for n, size in enumerate((3, 7)))
    found = losses.contrastive(student, teacher, *heads, temperature)
    np.testing.assert_allclose(found, _by_hand(student, teacher, heads, temperature), rtol=1e-3)


def test_contrastive_is_symmetric_and_knows_its_example():
    student, teacher = _normal(0, BATCH, 5), _normal(1, BATCH, 5)
    left, right = (learned.init(jax.random.key(n), 5, 16) for n in range(2))
    np.testing.assert_allclose(
        losses.contrastive(student, teacher, left, right), losses.contrastive(teacher, student, right, left), rtol=1e-4
    )
    loss = jax.jit(lambda s, t: losses.contrastive(s, t, left, left).mean())
    same = loss(teacher, teacher)
    for shift in range(1, BATCH):
        assert loss(jnp.roll(teacher, shift, 0), teacher) > same


@pytest.mark.parametrize("name", ["at", "hint", "rkd_distance", "rkd_angle", "crd"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_losses_of_features_are_finite_everywhere(name, batch):
    """Where student and teacher agree, at zeros, where examples coincide, in batches without pairs or triplets."""
    linear = learned.init(jax.random.key(0), 5, 5, identity=True)

    def loss(student, teacher):
        pair = losses.pooled(student), losses.pooled(teacher)
        return {
            "at": lambda: losses.attention(student, teacher),
            "hint": lambda: losses.hint(student, teacher, linear),
            "rkd_distance": lambda: losses.distances(*pair),
            "rkd_angle": lambda: losses.angles(*pair),
            "crd": lambda: losses.contrastive(*pair, linear, linear),
        }[name]()

    @jax.jit
    def both(student, teacher):
        values, pull = jax.vjp(lambda s: loss(s, teacher), student)
        return values, pull(jnp.ones(batch))[0]

    teacher = _maps(1)[:batch]
    alike = jnp.broadcast_to(teacher[:1], teacher.shape)
    for student, target in itertools.product((teacher, jnp.zeros_like(teacher), alike), repeat=2):
        values, gradient = both(student, target)
        assert values.shape == (batch,)
        assert np.isfinite(values).all() and np.isfinite(gradient).all()
    if name != "crd":
        values, gradient = both(teacher, teacher)
        # Equal but for the rounding of two programs, and its square.
        np.testing.assert_allclose(values, 0, atol=1e-12)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_float32_inside_whatever_comes_in(dtype):
    student, teacher = _maps(0).astype(dtype), _maps(1).astype(dtype)
    exact = student.astype(jnp.float32), teacher.astype(jnp.float32)
    np.testing.assert_allclose(losses.attention(student, teacher), losses.attention(*exact), rtol=1e-6)
    pooled = losses.pooled(student), losses.pooled(teacher)
    assert all(x.dtype == jnp.float32 for x in pooled)
    np.testing.assert_allclose(losses.angles(*pooled), losses.angles(*map(losses.pooled, exact)), rtol=1e-5)


def test_features_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(6, 4, 3, 5\).*\(6, 2, 3, 5\).*last axis"):
        losses.attention(_maps(0), _maps(1)[:, :2])
    with pytest.raises(ValueError, match=r"\(6, 5\).*no positions"):
        losses.attention(_normal(0, 6, 5), _normal(1, 6, 5))


# --- settings -------------------------------------------------------------------------------------------------------


def test_weights_are_read():
    assert loss_weights(("kl", "dkd:0.5", "at:1e3")) == {"kl": 1.0, "dkd": 0.5, "at": 1000.0}
    assert loss_weights(LOSSES) == dict.fromkeys(LOSSES, 1.0)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("kkd",), "distill.losses.*'kkd'.*mean 'dkd'"),
        (("rkd:1",), "'rkd'.*rkd_distance"),
        (("kl:x",), "'kl:x'.*kl:0.5"),
        (("kl:",), "'kl:'.*kl:0.5"),
        (("kl:0",), "'kl:0'.*above 0"),
        (("kl:-1",), "'kl:-1'.*above 0"),
        (("kl:nan",), "'kl:nan'.*above 0"),
        (("kl:inf",), "'kl:inf'.*above 0"),
        (("kl", "kl:2"), "'kl:2'.*twice"),
        ((), "at least one"),
    ],
)
def test_wrong_losses_are_named(given, names):
    with pytest.raises(ValueError, match=names):
        loss_weights(given)
    with pytest.raises(ValueError, match=names):
        losses.distillation(_logits(0), _logits(1), LABELS, DistillConfig(losses=given))
