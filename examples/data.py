"""What the examples train on: the digits that come with scikit-learn, 8×8 pixels, and a teacher for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits


def batches(steps: int, size: int = 64, seed: int = 0):
    """{"x": (size, 8, 8, 1) float32, "y": (size,)} for each step, at random."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16.0).astype(np.float32)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(images), size)
        yield {"x": images[rows], "y": labels[rows].astype(np.int32)}


def cross_entropy(logits, batch):
    """Mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def kl(logits, target):
    """Mean KL(teacher ‖ student) over the batch."""
    p, q = jax.nn.log_softmax(target), jax.nn.log_softmax(logits)
    return (jnp.exp(p) * (p - q)).sum(-1).mean()


def accuracy(logits, batch):
    """Share of right answers."""
    return float((jnp.argmax(logits, -1) == batch["y"]).mean())
