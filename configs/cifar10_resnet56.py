"""CIFAR-10, ResNet-56 (option A shortcuts, 126 M MACs) to 1/2.1 of its MACs; 1/2.57 by --budget.macs 0.389.

command:  python -m kdsearch_jax.search --config cifar10_resnet56 --teacher-from resnet56.safetensors
hardware: one GPU
time:     not yet run
result:   not yet run; to beat: 93.77% at 2.13x fewer MACs, 93.64% at 2.57x (Torch-Pruning 1.6)

Without --teacher-from it trains the teacher itself (200 epochs). The normalisation is that of the published PyTorch
weights of this network, whose teacher can be given as it is.
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
    """Full schedule: 60 epochs of search, 300 of retraining; the quick variant is a ResNet-14."""
    config = Experiment(
        name="cifar10_resnet56",
        model=ModelConfig("cifar_resnet", {"depth": 56, "shortcut": "A"}),
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
        distill=DistillConfig(temperature=4.0, cross_entropy=0.1),
        budget=BudgetConfig(macs=1 / 2.13),
        baselines=("uniform", "magnitude"),
        run=RunConfig(steps_per_dispatch=25, checkpoint_every=10 * EPOCH, evaluate_every=5 * EPOCH),
    )
    return shorten(config, depth=14) if quick else config
