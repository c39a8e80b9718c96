"""Valid files of every kind that is read, all of one small network: what `broken` breaks."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

SHAPE, CLASSES = (8, 8, 1), 10
INFO = {"dataset": "digits", "mean": [0.3], "std": [0.3]}


def experiment() -> Any:
    """An experiment of seconds, on the digits."""
    from kdsearch_jax.data.settings import DataConfig
    from kdsearch_jax.pruning.settings import BudgetConfig
    from kdsearch_jax.runs.config import Experiment, ModelConfig
    from kdsearch_jax.training.settings import RunConfig, StageConfig

    return Experiment(
        name="tiny",
        model=ModelConfig("small_cnn", {"width": 4}),
        data=DataConfig("digits", train_limit=64),
        teacher=StageConfig(steps=2, batch_size=16),
        search=StageConfig(steps=2, batch_size=16),
        retrain=StageConfig(steps=2, batch_size=16),
        budget=BudgetConfig(macs=0.6),
        run=RunConfig(steps_per_dispatch=1),
    )


def make(root: Path) -> None:
    """Writes all of them into `root`; runs JAX, so it is called in a process that ends afterwards."""
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    import safetensors.numpy
    import torch  # pyright: ignore[reportMissingImports]  # an extra of its own
    from flax import serialization

    from kdsearch_jax.adapters.architecture import Architecture
    from kdsearch_jax.runs.config import to_json
    from kdsearch_jax.search.__main__ import main as search
    from kdsearch_jax.storage import export_formats
    from kdsearch_jax.storage.arrays import flatten
    from kdsearch_jax.storage.networks import save_network

    arguments = {"num_classes": CLASSES, "width": 4}
    whole = Architecture("small_cnn", arguments, input_shape=SHAPE)
    cut = Architecture("small_cnn", arguments, {"stage1/conv": {"features": 3}}, (), SHAPE)
    for name, architecture in (("teacher", whole), ("net", cut)):
        variables = architecture.module().init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
        save_network(root / name, architecture, variables, INFO)
        if name == "teacher":
            flat = {key: np.asarray(leaf) for key, leaf in flatten(variables).items()}
            safetensors.numpy.save_file(flat, root / "weights.safetensors")
            (root / "weights.msgpack").write_bytes(serialization.to_bytes(jax.tree.map(np.asarray, variables)))
            with ocp.StandardCheckpointer() as store:
                store.save(root / "orbax", variables)
            torch.save({key: torch.tensor(leaf) for key, leaf in flat.items()}, root / "weights.pth")
            continue
        (root / "out").mkdir()
        (root / "out/student.safetensors").write_bytes(export_formats.to_safetensors(architecture, variables, INFO))
    random = np.random.default_rng(0)
    labels = np.arange(40) % CLASSES
    np.savez(root / "data.npz", images=random.integers(0, 255, (40, *SHAPE), np.uint8), labels=labels)
    (root / "config.json").write_text(json.dumps(to_json(experiment()), indent=1))
    assert search(["--config", str(root / "config.json"), "--workdir", str(root / "run"), "--baselines"]) == 0
    for kept in ("checkpoints", "tensorboard", "report"):  # what no report reads
        for folder in (root / "run").rglob(kept):
            shutil.rmtree(folder)


def encoded(kind: str, side: int = 8, mode: str = "L") -> bytes:
    """An image of noise as a file of this kind."""
    from PIL import Image

    shape = (side, side) if mode == "L" else (side, side, 3)
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8)).save(content, kind)
    return content.getvalue()


def tfds_images(directory: Path, images: list[bytes]) -> None:
    """A TFDS data set `tiny` in array_record form, of these encoded images."""
    import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]  # an extra of its own

    class Tiny(tfds.core.GeneratorBasedBuilder):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(None, None, 1)),
                "label": tfds.features.ClassLabel(num_classes=CLASSES),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for i, content in enumerate(images):
                yield i, {"image": io.BytesIO(content), "label": i % CLASSES}

    Tiny(data_dir=str(directory), file_format="array_record").download_and_prepare()
