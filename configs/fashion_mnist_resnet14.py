"""Fashion-MNIST (28x28 grey images of clothes, 10 classes), a ResNet-14 at 0.3 of its MACs in minutes on a CPU.

command:  python -m kdsearch_jax.compare --config fashion_mnist_resnet14 --seeds 0 1 2
hardware: one CPU core
time:     1 to 3 minutes per student on a busy machine
result:   90.37 ± 0.17% searched, 88.69 ± 0.08% uniform, 88.95 ± 0.12% magnitude, 3 to 10 seeds (docs/results.md)

The data come from TFDS (`fashion_mnist`) or from a file with the same arrays (`--data.name npz:fashion.npz`). To create
that file from the four files of Fashion-MNIST:

    python - <<EOF
    import gzip, numpy as np
    read = lambda name, start: np.frombuffer(gzip.open(f"{name}-ubyte.gz").read(), np.uint8, offset=start)
    arrays = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        arrays[f"{split}_images"] = read(f"{name}-images-idx3", 16).reshape(-1, 28, 28, 1)
        arrays[f"{split}_labels"] = read(f"{name}-labels-idx1", 8).astype(np.int32)
    np.savez_compressed("fashion.npz", **arrays)
    EOF

The run trains the teacher. 5,000 of the 60,000 training images are held out. Students get 390 updates in total.
"""

from kdsearch_jax.runs.config import (
    BudgetConfig,
    DataConfig,
    Experiment,
    GatesConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    shorten,
)


def experiment(quick: bool = False) -> Experiment:
    """A teacher of a few epochs, and the short schedule of `cifar10_resnet20_short`."""
    config = Experiment(
        name="fashion_mnist_resnet14",
        model=ModelConfig("cifar_resnet", {"depth": 14, "width": 16, "shortcut": "A"}),
        data=DataConfig("fashion_mnist", validation=1 / 12, flip=True),
        teacher=StageConfig(steps=3500, batch_size=64, learning_rate=0.05, warmup=50),
        search=StageConfig(steps=234, batch_size=64, learning_rate=0.003, schedule="constant"),
        retrain=StageConfig(steps=156, batch_size=64, learning_rate=0.003),
        gates=GatesConfig(ramp=0.3, warmup=0.1),
        budget=BudgetConfig(macs=0.3),
        baselines=("uniform", "magnitude"),
        run=RunConfig(steps_per_dispatch=6, checkpoint_every=10_000, evaluate_every=10_000),
    )
    return shorten(config, depth=8) if quick else config
