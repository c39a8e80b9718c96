"""Defaults for your own model or data, `--model package.module:factory` and `--data npz:FILE`.

command:  python -m kdsearch_jax.search --model mypkg.models:make_net --teacher ckpt/ --data npz:mine.npz
hardware: any
time:     depends on the model
result:   depends on the model

Assumes nothing about the data: no crops, no flips, and clipped gradients. Steps and learning rates suit a short run on
a small data set; a real one needs more (`--search.steps`, `--retrain.steps`).
"""

from kdsearch_jax.runs.config import (
    BudgetConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    RunConfig,
    StageConfig,
    shorten,
)


def experiment(quick: bool = False) -> Experiment:
    """400 updates of search, 400 of retraining, at a low rate."""
    config = Experiment(
        name="own",
        model=ModelConfig("small_cnn", {}),
        data=DataConfig("digits"),
        teacher=StageConfig(steps=600, batch_size=64, learning_rate=0.05, warmup=20),
        search=StageConfig(steps=400, batch_size=64, learning_rate=0.005, schedule="constant", clip=1.0),
        retrain=StageConfig(steps=400, batch_size=64, learning_rate=0.01, clip=1.0),
        budget=BudgetConfig(macs=0.5),
        baselines=("uniform",),
        run=RunConfig(steps_per_dispatch=20),
    )
    return shorten(config) if quick else config
