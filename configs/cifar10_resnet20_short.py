"""CIFAR-10, ResNet-20 at half of its MACs in minutes on a CPU: the comparison in README.md.

command:  python -m kdsearch_jax.compare --config cifar10_resnet20_short --teacher-from resnet20.safetensors
hardware: one CPU core per run
time:     2 to 4 minutes per student on a busy machine
result:   87.75 ± 0.24% searched, 87.25 ± 0.15% uniform, 10 seeds; all rows are in docs/results.md

Half an epoch in total: 234 updates of search and 156 of retraining, at batch 64; the hand-made students get 390 updates
of retraining, from the same teacher's weights. The teacher is a published PyTorch network (91.73% on the test images).
"""

import dataclasses

from kdsearch_jax.runs.config import Experiment, GatesConfig, RunConfig, StageConfig, load_experiment, shorten


def experiment(quick: bool = False) -> Experiment:
    """The full experiment's data, model and budget, with a schedule of half an epoch."""
    full = load_experiment("cifar10_resnet20")
    config = dataclasses.replace(
        full,
        name="cifar10_resnet20_short",
        search=StageConfig(steps=234, batch_size=64, learning_rate=0.003, schedule="constant"),
        retrain=StageConfig(steps=156, batch_size=64, learning_rate=0.003),
        gates=GatesConfig(ramp=0.3, warmup=0.1),
        run=RunConfig(steps_per_dispatch=6, checkpoint_every=30, evaluate_every=10_000),
    )
    return shorten(config) if quick else config
