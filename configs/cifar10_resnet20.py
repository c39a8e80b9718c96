"""CIFAR-10, ResNet-20 (option A shortcuts, 41 M MACs) at half of its MACs.

command:  python -m kdsearch_jax.search --config cifar10_resnet20 --teacher-from resnet20.safetensors
short:    cifar10_resnet20_short.py
hardware: one GPU
time:     not yet run
result:   not yet run

Without --teacher-from it trains the teacher itself (200 epochs). The normalisation is that of the published PyTorch
weights of this network, which can be used as the teacher.
"""

from kdsearch_jax.runs.config import (
    BudgetConfig,
    DataConfig,
    DistillConfig,
    Experiment,
    ModelConfig,
    RunConfig,
    StageConfig,
    shorten,
)

EPOCH = 48_000 // 128  # updates; 2,000 of the 50,000 training images are held out


def experiment(quick: bool = False) -> Experiment:
    """Full schedule: 60 epochs of search, 300 of retraining by distillation alone."""
    config = Experiment(
        name="cifar10_resnet20",
        model=ModelConfig("cifar_resnet", {"depth": 20, "shortcut": "A"}),
        data=DataConfig(
            "cifar10",
            validation=0.04,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop=4,
            flip=True,
        ),
        teacher=StageConfig(steps=200 * EPOCH, learning_rate=0.1, weight_decay=1e-4, schedule="step"),
        search=StageConfig(steps=60 * EPOCH, batch_size=128, learning_rate=0.01, schedule="constant"),
        retrain=StageConfig(steps=300 * EPOCH, learning_rate=0.05, weight_decay=5e-4),
        distill=DistillConfig(temperature=4.0),
        budget=BudgetConfig(macs=0.5),
        baselines=("uniform", "magnitude"),
        run=RunConfig(steps_per_dispatch=25, checkpoint_every=10 * EPOCH, evaluate_every=5 * EPOCH),
    )
    return shorten(config) if quick else config
