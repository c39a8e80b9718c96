"""A model or data of one's own: what `--model package.module:factory` and `--data npz:FILE` start from.

command:  python -m kdsearch_jax.search --model mypkg.models:make_net --teacher ckpt/ --data npz:mine.npz
hardware: any
time:     as the model takes
result:   of one's own

Nothing about the data is assumed: images are neither cropped nor mirrored; gradients are clipped. Steps and rates are
those of a short run on a small data set; a real one wants more (`--search.steps`, `--retrain.steps`).
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
    made = Experiment(
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
    return shorten(made) if quick else made
