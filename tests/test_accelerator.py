"""The command for an accelerator: its data and its runs travel without loss, and a record is whole at any moment."""

import numpy as np

from benchmarks import accelerator


def test_packed_data_have_the_same_test_images_and_labels(tmp_path):
    random, arrays = np.random.default_rng(0), {}
    for split, many in (("train", 5), ("validation", 3), ("test", 4)):
        arrays[f"{split}_images"] = random.integers(0, 256, (many, 32, 32, 3)).astype(np.uint8)
        arrays[f"{split}_labels"] = random.integers(0, 10, many).astype(np.int32)
    np.savez(tmp_path / "whole.npz", **arrays)
    accelerator.pack(tmp_path / "whole.npz", tmp_path / "small.npz")
    accelerator.unpack(tmp_path / "small.npz", tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:
        assert set(again) == set(arrays)
        for name, array in arrays.items():
            assert again[name].shape == array.shape and again[name].dtype == array.dtype
            if name != "train_images":
                np.testing.assert_array_equal(again[name], array)


def test_runs_travel_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "PART", 200)
    runs, out, elsewhere = (tmp_path / name for name in ("runs", "out", "elsewhere"))
    for directory in (runs / "a" / "search", out, elsewhere):
        directory.mkdir(parents=True)
    content = np.random.default_rng(0).bytes(2500)
    (runs / "a" / "search" / "state").write_bytes(content)
    (out / "runs.tar.9").write_bytes(b"of an earlier call")
    accelerator._keep(runs, out)
    assert all(path.stat().st_size <= 200 for path in out.iterdir()) and len(list(out.iterdir())) > 10
    accelerator._restore(out, str(elsewhere))
    assert (elsewhere / "runs" / "a" / "search" / "state").read_bytes() == content


def test_progress_survives_a_line_that_is_being_written(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    (tmp_path / "results.json").write_text('[{"accuracy": 0.5}]')
    progress = accelerator._progress(tmp_path)
    assert progress == {"stages": {"search": {"step": 1}}, "results": {"results.json": [{"accuracy": 0.5}]}}
