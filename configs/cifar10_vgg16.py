"""CIFAR-10, VGG-16 with BatchNorm (314 M MACs) to half of its MACs.

command:  python -m kdsearch_jax.search --config cifar10_vgg16
hardware: one GPU
time:     not yet run
result:   not yet run
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
    """Full schedule: 60 epochs of search, 300 of retraining; the quick variant is a narrow VGG-8."""
    config = Experiment(
        name="cifar10_vgg16",
        model=ModelConfig("vgg", {"depth": 16}),
        data=DataConfig(
            "cifar10",
            validation=0.04,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            crop=4,
            flip=True,
        ),
        teacher=StageConfig(steps=200 * EPOCH, learning_rate=0.05, warmup=EPOCH),
        search=StageConfig(steps=60 * EPOCH, batch_size=128, learning_rate=0.01, schedule="constant"),
        retrain=StageConfig(steps=300 * EPOCH, learning_rate=0.05),
        distill=DistillConfig(temperature=4.0),
        budget=BudgetConfig(macs=0.5),
        baselines=("uniform", "magnitude"),
        run=RunConfig(steps_per_dispatch=25, checkpoint_every=10 * EPOCH, evaluate_every=5 * EPOCH),
    )
    return shorten(config, depth=8, width=16) if quick else config
