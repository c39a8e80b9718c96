"""Streamed data: the same examples as in memory, with framing that depends only on seed, epoch and index."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import multiprocessing
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from kdsearch_jax.adapters.devices import assemble, data_mesh, local_rows
from kdsearch_jax.data import device_feed
from kdsearch_jax.data.batches import batch_indices
from kdsearch_jax.data.datasets import load
from kdsearch_jax.data.examples import Dataset, Split
from kdsearch_jax.data.settings import DataConfig
from kdsearch_jax.data.streaming import Framing, SequentialOrder, ShuffledOrder, framing, reader_of, resize
from kdsearch_jax.distill import teacher_cache
from kdsearch_jax.distill.settings import DistillConfig
from kdsearch_jax.evaluate import main as evaluate_main
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.reporting.predictions import read_predictions
from kdsearch_jax.runs import directories, provenance
from kdsearch_jax.runs.config import Experiment, ModelConfig, to_json
from kdsearch_jax.search.__main__ import main as search_main
from kdsearch_jax.training import loop
from kdsearch_jax.training import state as training_state
from kdsearch_jax.training.settings import RunConfig, StageConfig

COUNTS = {"train": 43, "validation": 13, "test": 11}  # no batch size goes into these
CLASSES = 3
BATCH = 8


def picture(number: int, width: int, height: int) -> bytes:
    """A smooth JPEG, each another one."""
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def prepared(directory: Path, splits: dict[str, list[tuple[bytes, int]]]) -> DataConfig:
    """A data set of JPEGs as TFDS writes ImageNet: array_record, (image, label, file_name), sizes of any kind."""
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

        class Pictures(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                    "file_name": tfds.features.Text(),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
                )

            def _split_generators(self, dl_manager):
                return {split: self._examples(split) for split in splits}

            def _generate_examples(self):
                raise NotImplementedError

            def _examples(self, split):
                for i, (content, label) in enumerate(splits[split]):
                    yield i, {"image": io.BytesIO(content), "label": label, "file_name": f"{split}-{i}.jpg"}

    Pictures(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return DataConfig("pictures", str(directory), image_size=16, stream=True)


def pictures(count: int, first: int = 0) -> list[tuple[bytes, int]]:
    sides = np.random.default_rng(first).integers(20, 60, (count, 2)).tolist()
    return [(picture(first + i, *sides[i]), i % CLASSES) for i in range(count)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> DataConfig:
    pytest.importorskip("array_record")
    parts = {split: pictures(count, 1000 * i) for i, (split, count) in enumerate(COUNTS.items())}
    return prepared(tmp_path_factory.mktemp("pictures"), parts)


@pytest.fixture(scope="module")
def crops(settings) -> DataConfig:
    return replace(settings, framing="crop", stream=None)


@pytest.fixture
def feed_of():
    """Feeds that are closed with the test."""
    made = []

    def make(dataset: Dataset, steps: int = 100, size: int = BATCH) -> device_feed.Feed:
        made.append(device_feed.training_feed(dataset, size, data_mesh(), steps))
        return made[-1]

    yield make
    for feed in made:
        feed.close()
    assert not [thread for thread in threading.enumerate() if "grain-thread" in thread.name]
    assert not multiprocessing.active_children()


def taken(feed: device_feed.Feed, first: int, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return [jax.device_get(batch) for batch in feed.take(first, count, seed)]


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- the same as in memory ------------------------------------------------------------------------------------------


def test_streamed_batches_equal_those_in_memory(settings, feed_of):
    """Over three epochs; likewise mean, std, names, validation and test."""
    streamed, kept = load(settings), load(replace(settings, stream=False))
    assert reader_of(streamed.train.arrays) is not None and reader_of(kept.train.arrays) is None
    shared = [field.name for field in dataclasses.fields(Dataset) if field.name not in COUNTS]
    assert all(getattr(streamed, name) == getattr(kept, name) for name in shared)
    for split, count in COUNTS.items():
        one, other = getattr(streamed, split), getattr(kept, split)
        assert len(one) == len(other) == count
        assert (one.images.shape, one.images.dtype) == (other.images.shape, other.images.dtype)
        np.testing.assert_array_equal(one.images[:], other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.labels[[3, 1]], other.labels[[3, 1]])
    updates = 3 * (COUNTS["train"] // BATCH)
    for found, indices in zip(
        taken(feed_of(streamed), 0, updates, 7), batch_indices(7, COUNTS["train"], BATCH, 0, updates), strict=True
    ):
        assert_equal(found, kept.train[indices].arrays)


def test_resuming_with_changed_files_is_refused(tmp_path):
    """One of twelve records differs under the same description; moved files are accepted."""
    settings = prepared(tmp_path / "old", {"train": pictures(12)})
    prepared(tmp_path / "new", {"train": [*pictures(11), (picture(99, 40, 40), 2)]})
    shutil.copytree(tmp_path / "old", tmp_path / "moved")
    shutil.copytree(tmp_path / "old", tmp_path / "changed")
    for path in (tmp_path / "new").rglob("*.array_record-*"):
        shutil.copy(path, tmp_path / "changed" / path.relative_to(tmp_path / "new"))

    def fingerprint(directory: str) -> str:
        dataset = load(replace(settings, data_dir=str(tmp_path / directory)))
        return provenance.fingerprint({split: getattr(dataset, split).arrays for split in COUNTS})

    def run(data: str, resume: bool) -> None:
        with directories.run_directory(tmp_path / "run", Experiment(), {"command": "x"}, resume=resume, data=data):
            pass

    run(fingerprint("old"), False)
    run(fingerprint("moved"), True)
    with pytest.raises(ValueError, match="data: .*fingerprint"):
        run(fingerprint("changed"), True)


@pytest.mark.parametrize("changes", [{"train_limit": 20}, {"train_limit": 20, "validation": 0.3}])
def test_a_limit_draws_the_same_examples(settings, changes):
    streamed, kept = (load(replace(settings, stream=stream, **changes), seed=3) for stream in (True, False))
    for split in COUNTS:
        np.testing.assert_array_equal(getattr(streamed, split).images[:], getattr(kept, split).images)


def test_held_out_examples_are_in_no_other_split(tmp_path):
    dataset = load(prepared(tmp_path, {"train": pictures(40)}))
    chosen = [set(reader_of(getattr(dataset, split).arrays).records.chosen.tolist()) for split in COUNTS]
    assert sum(map(len, chosen)) == 40 == len(set().union(*chosen)) and list(map(len, chosen)) == [32, 4, 4]


def linear(dataset: Dataset, data: DataConfig, directory: Path, *, resume: bool = False, between: Any = None) -> Any:
    """The state of linear classification after 11 updates, saved on the way."""
    tx = optax.sgd(0.1, momentum=0.9)

    def step(state, batch, key, constants):
        def loss(params):
            logits = (
                batch["images"].reshape(BATCH, -1) @ params["kernel"] + 0.1 * jax.random.normal(key, (CLASSES,))[None]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        return training_state.update(state, gradient, {}, tx, None), {"loss": value}

    state = training_state.create_state({"params": {"kernel": np.zeros((16 * 16 * 3, CLASSES), np.float32)}}, tx)
    return loop.fit(
        state, step, dataset, data, StageConfig(11, BATCH),
        RunConfig(steps_per_dispatch=3, checkpoint_every=3, checkpoint_share=None),
        directory=directory, name="linear", meta={}, between=between, resume=resume, seed=5,
    )  # fmt: skip


class PowerCut(Exception):
    """Simulates a crash."""


def test_streamed_training_equals_training_in_memory_also_when_resumed(settings, tmp_path):
    data = replace(settings, crop=2, flip=True)
    streamed, kept = load(data), load(replace(data, stream=False))
    expected = linear(kept, data, tmp_path / "kept")
    assert np.abs(expected.params["kernel"]).max() > 0

    def goes_out(state):
        if int(state.step) == 6:
            raise PowerCut
        return state, {}

    with pytest.raises(PowerCut):
        linear(streamed, data, tmp_path / "streamed", between=goes_out)
    assert_equal(jax.device_get(linear(streamed, data, tmp_path / "streamed", resume=True)), jax.device_get(expected))


@pytest.mark.parametrize("size", [4, 13, 64])
def test_evaluation_sees_every_example_once(settings, size):
    """Images with labels and alone, with incomplete last batches."""
    streamed, kept = (load(replace(settings, stream=stream)).validation for stream in (True, False))
    sharding = NamedSharding(data_mesh(), PartitionSpec("data"))
    for entries in (("images", "labels"), ("images",)):
        found, counted = {entry: [] for entry in entries}, 0
        arrays = {entry: streamed.arrays[entry] for entry in entries}
        for indices, weights, batch in device_feed.evaluation_batches(arrays, size, sharding):
            assert set(batch) == set(entries) and len(indices) == len(weights) == size
            counted += int(weights.sum())
            for entry in entries:
                found[entry].extend(np.asarray(batch[entry])[weights > 0])
        assert counted == COUNTS["validation"]
        for entry in entries:
            np.testing.assert_array_equal(found[entry], kept.arrays[entry])


# --- random crops ---------------------------------------------------------------------------------------------------


def test_a_batch_depends_only_on_seed_and_update(crops, feed_of):
    """In whatever order updates are requested."""
    dataset = load(crops)
    whole, pieces = feed_of(dataset), feed_of(dataset)
    expected = taken(whole, 0, 12)
    assert_equal([*taken(pieces, 0, 5), *taken(pieces, 5, 1), *taken(pieces, 6, 6)], expected)
    assert_equal(taken(pieces, 4, 2), expected[4:6])  # back
    assert_equal(taken(pieces, 9, 1), expected[9:10])  # and on
    other = taken(pieces, 9, 1, seed=1)
    assert (other[0]["images"] != expected[9]["images"]).any()
    assert_equal(taken(pieces, 10, 1), expected[10:11])


def test_framing_depends_only_on_seed_epoch_and_index(crops, feed_of):
    dataset = load(crops)

    def seen(size: int, epoch: int, seed: int = 0) -> dict[int, bytes]:
        updates = COUNTS["train"] // size
        order = batch_indices(seed, COUNTS["train"], size, epoch * updates, updates).ravel().tolist()
        found = taken(feed_of(dataset, size=size), epoch * updates, updates, seed)
        return dict(zip(order, (image.tobytes() for batch in found for image in batch["images"]), strict=True))

    small, large = seen(5, 1), seen(14, 1)
    shared = small.keys() & large.keys()
    assert len(shared) > 35 and all(small[number] == large[number] for number in shared)
    for other in (seen(14, 2), seen(14, 1, seed=1)):
        assert np.mean([large[number] == other[number] for number in large.keys() & other.keys()]) < 0.1


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 30), st.randoms(use_true_random=False))
def test_processes_share_the_batch_of_one(processes, each, update, random):
    """For any assignment of devices, the parts are disjoint and together form the batch, also an incomplete one."""
    size, examples = processes * each, 40
    rows = list(range(size))
    random.shuffle(rows)
    parts = [sorted(rows[p * each : (p + 1) * each]) for p in range(processes)]
    trained, looked_at = batch_indices(3, examples, size, update, 1)[0], np.arange(size) + update * size

    def seen(place: Any) -> list[int]:
        found = {row: place(tuple(held))(update * each + at)[0] for held in parts for at, row in enumerate(held)}
        return [found[row] for row in range(size)]

    assert seen(lambda held: ShuffledOrder(3, examples, size, held)) == trained.tolist()
    last = looked_at[-1]  # fills the batch up
    assert seen(lambda held: SequentialOrder(last, size, held)) == [*looked_at[:-1], 0]


def test_a_batch_is_assembled_from_its_rows():
    """As in a process whose devices hold only some of the rows."""
    sharding = NamedSharding(data_mesh(), PartitionSpec("data"))
    rows = 4 * data_mesh().size
    assert local_rows(sharding, rows) == tuple(range(rows))  # one process has all
    whole = {
        "images": np.arange(rows * 6, dtype=np.int32).reshape(rows, 3, 2),
        "labels": np.arange(rows, dtype=np.int32),
    }
    made = assemble(whole, range(rows), sharding, rows)
    assert_equal(jax.device_get(made), whole)
    assert all(leaf.sharding == sharding for leaf in made.values())


@given(st.integers(1, 700), st.integers(1, 700), st.floats(0.01, 1), st.integers(0, 2**31))
def test_a_random_box_is_inside_the_image(width, height, least, seed):
    left, top, right, bottom = framing.random_box(np.random.default_rng(seed), width, height, least)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) > 100:  # rounding to pixels counts for less
        across, down = right - left, bottom - top
        assert 0.7 < across / down < 1.4
        largest = min(width, height * 4 / 3) * min(height, width * 4 / 3)  # where the area asked for fits nowhere
        assert across * down >= 0.97 * min(least * width * height, largest)


def test_distribution_of_random_boxes():
    """Means of the paper's distributions, for images that any box fits in."""
    boxes = np.array([framing.random_box(np.random.default_rng(i), 400, 400, 0.1) for i in range(2000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = across * down / 400**2
    assert 0.1 < share.min() < 0.12 and share.max() > 0.9 and 0.45 < share.mean() < 0.56  # the largest fit less often
    assert abs(np.log(across / down).mean()) < 0.02 and np.log(across / down).max() > 0.9 * math.log(4 / 3)
    assert abs((boxes[:, 0] + boxes[:, 2]).mean() / 800 - 0.5) < 0.02 and boxes[:, 0].min() == 0


@pytest.mark.parametrize(("width", "height"), [(60, 60), (90, 60), (64, 111)])
def test_evaluation_equals_resizing_and_center_cropping(width, height):
    image = Image.open(io.BytesIO(picture(1, width, height)))
    short = round(16 / framing.MIDDLE)
    scale = short / min(width, height)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = ((side - 16) / 2 for side in whole.size)
    expected = np.asarray(whole.crop((round(left), round(top), round(left) + 16, round(top) + 16)), np.float64)
    found = resize(image, 16, framing.central_box(width, height)).astype(np.float64)
    assert np.abs(found - expected).mean() < 8 and np.abs(found - np.roll(expected, 4, 1)).mean() > 20


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(crops):
    """With the same result in a fraction of the time."""
    records, cut = reader_of(load(crops).train.arrays).records, Framing("crop", 16)
    content = picture(2, 1024, 768)
    fast = cut.image(records, content, 0)
    slow = resize(Image.open(io.BytesIO(content)), 16, framing.central_box(1024, 768))
    assert fast.shape == slow.shape == (16, 16, 3)
    assert np.abs(fast.astype(int) - slow.astype(int)).max() <= 8
    opened = records.open_image(content, 0)
    opened.draft(None, (256, 192))
    assert opened.size == (256, 192)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_resized_separately(channels):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    alone = [resize(image[..., c : c + 1], 9) for c in range(channels)]
    np.testing.assert_array_equal(resize(image, 9), np.concatenate(alone, -1))


# --- what goes wrong ------------------------------------------------------------------------------------------------


def damaged(directory: Path, how: str) -> DataConfig:
    """A data set with one example in its training split that cannot be used, or a file that is gone or cut."""
    train = pictures(30)
    if how == "no image":
        train[4] = b"GIF89a is what it says", 0
    elif how == "cut image":
        train[4] = train[4][0][:300], 0
    elif how == "bomb":
        train[4] = bomb(), 0
    config = prepared(directory, {"train": train, "validation": pictures(5), "test": pictures(5)})
    (path,) = directory.rglob("pictures-train.array_record*")
    if how == "missing file":
        path.unlink()
    elif how == "cut file":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flipped byte":
        content = bytearray(path.read_bytes())
        content[content.index(b"\xff\xd8\xff") + 50] ^= 1
        path.write_bytes(content)
    return config


def bomb() -> bytes:
    """A small PNG that says it has more pixels than are decoded."""
    buffer = io.BytesIO()
    Image.new("1", (8193, 8193)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no image", r"image \d+ of pictures train .*pictures-train.array_record-00000-of-00001\)"),
        ("cut image", r"image \d+ of pictures train (?i:.*truncated).*pictures-train"),
        ("bomb", r"image \d+ of pictures train .*8193x8193 pixels.*pictures-train"),
        ("missing file", r"example \d+ of .*pictures-train.array_record.*No such file"),
        ("cut file", r"example \d+ of .*pictures-train.array_record"),
        ("flipped byte", r"example \d+ of .*pictures-train.*hash mismatch"),
    ],
)
def test_unreadable_examples_are_named_in_one_line(tmp_path, feed_of, how, message):
    """In training, from any thread; no example is skipped or replaced."""
    with pytest.raises(ValueError, match=message) as caught:
        dataset = load(replace(damaged(tmp_path, how), mean=(0.5,) * 3, std=(0.2,) * 3))
        taken(feed_of(dataset), 0, 3)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.name: ")


def test_a_label_beyond_the_classes_is_named(settings, feed_of):
    dataset = load(settings)
    reader = reader_of(dataset.train.arrays)
    short = replace(reader, records=replace(reader.records, classes=CLASSES - 1))
    broken = replace(dataset, train=replace(dataset.train, arrays=dict(short.columns())))
    with pytest.raises(ValueError, match=r"pictures train .*label 2 at example \d+"):
        taken(feed_of(broken), 0, 5)
    with pytest.raises(ValueError, match="has label 2"):
        np.asarray(broken.train.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": -1}, "data.workers: -1"),
        ({"prefetch": 0}, "data.prefetch: 0"),
        ({"least_area": 0.0}, "data.least_area: 0.0"),
        ({"least_area": 1.5}, "data.least_area: 1.5"),
        ({"framing": "crop", "image_size": None}, "data.framing: 'crop' needs .*data.image_size"),
        ({"framing": "crop", "crop": 4}, "data.crop: 4 .*give 0"),
        ({"framing": "crop", "stream": False}, "data.stream: False .*data.framing"),
        ({"image_size": None}, "images of .*; give data.image_size"),
        ({"name": "digits"}, "data.stream: True .*'digits'"),
        ({"name": "digits", "stream": None, "framing": "crop"}, "data.framing: 'crop' .*TFDS"),
    ],
)
def test_invalid_settings_are_refused(settings, feed_of, changes, message):
    with pytest.raises(ValueError, match=message):
        taken(feed_of(load(replace(settings, **changes))), 0, 3)


def test_a_batch_larger_than_the_data_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="batch_size: 8 .*6 training examples"):
        linear(load(replace(settings, train_limit=6)), settings, tmp_path)


def test_streamed_images_do_not_convert_to_an_array(settings):
    with pytest.raises(ValueError, match="^images: "):
        np.asarray(load(settings).train.images)


def test_a_teachers_outputs_are_not_cached(settings):
    experiment = Experiment(data=settings, distill=DistillConfig())
    stage = StageConfig(1000, BATCH)
    assert (
        teacher_cache.reason_not_to_cache(experiment.distill, experiment.data, stage, load(settings))
        == "examples are streamed"
    )
    assert (
        teacher_cache.reason_not_to_cache(
            experiment.distill, experiment.data, stage, load(replace(settings, stream=False))
        )
        is None
    )


# --- the whole road -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_complete_run_on_streamed_data(crops, tmp_path, capsys):
    """Training, search, verification, table, report and command line."""
    experiment = Experiment(
        name="streamed",
        model=ModelConfig("small_cnn", {"width": 4}),
        data=replace(crops, flip=True),
        teacher=StageConfig(6, BATCH),
        search=StageConfig(6, BATCH),
        retrain=StageConfig(4, BATCH),
        budget=BudgetConfig(macs=0.6),
        run=RunConfig(
            steps_per_dispatch=2, checkpoint_every=4, checkpoint_share=None, evaluate_every=4, eval_batch_size=8
        ),
    )
    (tmp_path / "config.json").write_text(json.dumps(to_json(experiment)))
    run = tmp_path / "run"
    assert search_main(["--config", str(tmp_path / "config.json"), "--workdir", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["examples"] == COUNTS["test"]
    assert json.loads((run / "search" / "selection.json").read_text())["proof"]["difference"] <= 1e-5
    predictions = read_predictions(run)
    assert predictions is not None
    np.testing.assert_array_equal(predictions.labels, load(crops).test.labels)
    capsys.readouterr()
    assert evaluate_main([str(run / "student"), "--data-dir", str(crops.data_dir), "--batch-size", "4"]) == 0
    accuracy = {row["name"]: row["accuracy"] for row in results["rows"]}["student"]
    assert f"{100 * accuracy:.2f}%" in capsys.readouterr().out  # images were framed as in the run


@pytest.mark.slow
def test_decoding_processes_make_the_batches_of_threads(crops, feed_of):
    dataset, other = load(crops), load(replace(crops, workers=2))
    assert_equal(taken(feed_of(other), 0, 7), taken(feed_of(dataset), 0, 7))
    broken = replace(reader_of(other.train.arrays), framing=Framing("stretch", 17))
    with pytest.raises(ValueError, match="data.image_size: None .*pictures train"):
        taken(feed_of(replace(other, train=Split(dict(broken.columns())))), 0, 1)
