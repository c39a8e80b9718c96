"""A small experiment on the digits that is not chaotic, for `benchmarks/processes.py`.

command:  python benchmarks/processes.py

Several devices add up a batch in another order than a single one, which changes the last digits; how far two runs then
diverge depends on the network. Where the input of a ReLU is 0 up to rounding, its slope is 0 in one run and 1 in the
other, and black pixels take thousands of inputs across 0 together: parameters of the `digits` network differ by 5e-4
after 50 updates of search. This network therefore uses silu, whose slope is continuous. With α = (cost / importance)^s
and the default s = 8, gates amplify the rounding of importances at least eightfold: 3e-5 at most over 8 devices,
against 5e-6 with the s = 2 used here. All of these runs kept the same units.
"""

import dataclasses

from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.pruning.settings import BudgetConfig, GatesConfig
from kdsearch_jax.runs.config import Experiment, ModelConfig
from kdsearch_jax.training.settings import RunConfig, StageConfig


def experiment(quick: bool = False) -> Experiment:
    """50 updates of search and of retraining; the quick variant has a narrower network, and 10."""
    stage = StageConfig(steps=10 if quick else 50, batch_size=16 if quick else 64, learning_rate=0.02)
    return Experiment(
        name="smooth",
        model=ModelConfig("smooth:make", {"width": 4 if quick else 8}),
        data=DataConfig("digits", crop=1, train_limit=160 if quick else None),
        teacher=dataclasses.replace(stage, steps=100 if quick else 400, learning_rate=0.05),
        search=dataclasses.replace(stage, learning_rate=0.005, schedule="constant"),
        gates=GatesConfig(sharpness=2.0),
        retrain=stage,
        budget=BudgetConfig(macs=0.5),
        run=RunConfig(steps_per_dispatch=5, checkpoint_every=20, evaluate_every=20),
    )
