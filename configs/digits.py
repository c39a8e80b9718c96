"""The bundled digits (1797 images of 8x8 pixels): a small CNN at half of its MACs. The default of every command.

command:  python -m kdsearch_jax.search
hardware: 2 CPU cores
time:     under 3 minutes, from a cold start
result:   the table in docs/quick_start.md
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
    """Teacher, search and retraining take seconds each."""
    config = Experiment(
        name="digits",
        model=ModelConfig("small_cnn", {"width": 16}),
        data=DataConfig("digits", crop=1),
        teacher=StageConfig(steps=600, batch_size=64, learning_rate=0.05, warmup=20),
        search=StageConfig(steps=400, batch_size=64, learning_rate=0.005, schedule="constant"),
        retrain=StageConfig(steps=400, batch_size=64, learning_rate=0.01),
        budget=BudgetConfig(macs=0.5),
        baselines=("uniform",),
        run=RunConfig(steps_per_dispatch=20),
    )
    return shorten(config) if quick else config
