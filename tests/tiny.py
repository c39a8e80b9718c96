"""The smallest experiment that goes the whole road, for tests of commands and stages: `--config tests/tiny.py`."""

from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs.config import Experiment, ModelConfig
from kdsearch_jax.training.settings import RunConfig, StageConfig


def experiment(quick: bool = False) -> Experiment:
    """A CNN of 3,000 parameters on 160 digits, a dozen updates a stage."""
    return Experiment(
        name="tiny",
        model=ModelConfig("small_cnn", {"width": 4}),
        data=DataConfig("digits", train_limit=160),
        teacher=StageConfig(steps=16, batch_size=16, learning_rate=0.1),
        search=StageConfig(steps=12, batch_size=16, learning_rate=0.02),
        retrain=StageConfig(steps=8, batch_size=16, learning_rate=0.05),
        budget=BudgetConfig(macs=0.6),
        baselines=("uniform",),
        run=RunConfig(
            steps_per_dispatch=4, checkpoint_every=4, checkpoint_share=None, evaluate_every=8, eval_batch_size=128
        ),
    )
