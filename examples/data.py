"""What the examples share: scikit-learn's digits (8×8 pixels), a small Linen model for them, and losses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits


class MLP(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(64, name="dense1")(x))
        x = nn.relu(nn.Dense(64, name="dense2")(x))
        return nn.Dense(10, name="dense")(x)


def batches(steps: int, size: int = 64, seed: int = 0):
    """A random batch {"x": (size, 8, 8, 1) float32, "y": (size,) int32} for each step."""
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
    """Fraction of correct predictions."""
    return float((jnp.argmax(logits, -1) == batch["y"]).mean())
