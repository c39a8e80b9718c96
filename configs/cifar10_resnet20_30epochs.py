"""CIFAR-10, ResNet-20 at half of its MACs after 30 epochs in all, on two CPU cores.

command:  python -m kdsearch_jax.compare --config cifar10_resnet20_30epochs --data.name npz:cifar10.npz \
              --teacher-from resnet20.safetensors --match macs
data:     python -m benchmarks.cifar_split cifar10 cifar10.npz
hardware: CPU cores with AMX
time:     not yet run
result:   10 epochs (--search.steps 780 --retrain.steps 3120): docs/results.md

6 epochs of search and 24 of retraining at batch 128; hand-made students get 30 epochs of retraining, from the same
teacher's weights. The teacher is a published PyTorch network (91.73% on the test images). The file holds all training
images, 2,000 test images to choose by and 8,000 to report on.
"""

import dataclasses

from kdsearch_jax.runs.config import Experiment, RunConfig, StageConfig, load_experiment, shorten

EPOCH = 390  # updates


def experiment(quick: bool = False) -> Experiment:
    """The full experiment's model and budget, with a schedule of 30 epochs."""
    full = load_experiment("cifar10_resnet20")
    config = dataclasses.replace(
        full,
        name="cifar10_resnet20_30epochs",
        search=StageConfig(steps=6 * EPOCH, batch_size=128, learning_rate=0.05, schedule="constant"),
        retrain=StageConfig(steps=24 * EPOCH, batch_size=128, learning_rate=0.05, weight_decay=5e-4),
        run=RunConfig(precision="bf16", steps_per_dispatch=30, checkpoint_every=EPOCH, evaluate_every=5 * EPOCH),
    )
    return shorten(config, depth=8) if quick else config
