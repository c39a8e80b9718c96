"""CIFAR-100, WRN-40-2 (2.26 M parameters) to the cost of a WRN-16-2, in MACs and in parameters.

command:  python -m kdsearch_jax.search --config cifar100_wrn40_2
hardware: one GPU
time:     not yet run
result:   not yet run; to beat, with a WRN-16-2 as the student: KD 74.92%, CRD 75.48%, DKD 76.23%

The teacher's recipe and that of retraining are those of the comparisons in the distillation literature (CRD, DKD): 240
epochs, batch 64, rate .05 divided by 10 at 150, 180 and 210, weight decay 5e-4, temperature 4, .1 of cross-entropy.
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

EPOCH = 48_000 // 64  # updates; 2,000 of the 50,000 training images are held out


def experiment(quick: bool = False) -> Experiment:
    """Full schedule: 60 epochs of search, 240 of retraining; the quick variant is a WRN-16-1."""
    config = Experiment(
        name="cifar100_wrn40_2",
        model=ModelConfig("wide_resnet", {"depth": 40, "width": 2}),
        data=DataConfig(
            "cifar100",
            validation=0.04,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            crop=4,
            flip=True,
        ),
        teacher=StageConfig(
            steps=240 * EPOCH,
            batch_size=64,
            learning_rate=0.05,
            schedule="step",
            boundaries=(150 / 240, 180 / 240, 210 / 240),
        ),
        search=StageConfig(steps=60 * EPOCH, batch_size=64, learning_rate=0.01, schedule="constant"),
        retrain=StageConfig(
            steps=240 * EPOCH,
            batch_size=64,
            learning_rate=0.05,
            schedule="step",
            boundaries=(150 / 240, 180 / 240, 210 / 240),
        ),
        distill=DistillConfig(temperature=4.0, cross_entropy=0.1),
        budget=BudgetConfig(macs=0.31, params=0.31),
        baselines=("uniform", "magnitude"),
        run=RunConfig(steps_per_dispatch=25, checkpoint_every=10 * EPOCH, evaluate_every=5 * EPOCH),
    )
    return shorten(config, depth=16, width=1) if quick else config
