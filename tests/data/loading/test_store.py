from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medim.data.fingerprints import compute_fingerprint
from medim.data.index.index import ImageRecord, Index
from medim.data.loading.foreground import list_foreground
from medim.data.loading.store import (
    SCHEMA_VERSION,
    Store,
    _encode_frame,
    _prepare_image,
    fill_store,
    locate_default_store,
)
from medim.data.preprocessing.quality import measure_quality
from medim.data.preprocessing.steps import preprocess, resample_mask
from medim.types import Array, Step, UsageError, UserError, Volume

STEPS: list[Step] = [{"op": "clip_percentiles"}, {"op": "normalise"}]


def record(name: str, shape: tuple[int, ...], *, mask: bool = False) -> ImageRecord:
    return ImageRecord(
        image=name,
        path=f"{name}.npy",
        subject=f"s-{name}",
        session=None,
        series=None,
        modality="mri" if len(shape) == 3 else "xray",
        sequence=None,
        shape=shape,
        spacing=(1.0,) * len(shape),
        affine=tuple(float(v) for v in np.eye(4).ravel()),
        scanner=None,
        field_strength=None,
        label=None,
        mask=f"{name}-mask.npy" if mask else None,
        split=None,
        quality=None,
    )


class FakeIndex(Index):
    """Reads `.npy` arrays where the real one reads medical formats; a file named `kill` ends its process."""

    def open(self, record: ImageRecord) -> Volume:
        if record.image == "kill":
            os._exit(9)
        if record.image == "odd":
            raise ZeroDivisionError(f"{self.root}: secret")
        return self._volume(self.root / record.path, np.float32)

    def open_mask(self, record: ImageRecord) -> Volume:
        assert record.mask is not None
        return self._volume(self.root / record.mask, np.uint8)

    def fingerprint(self, record: ImageRecord) -> str:
        status = (self.root / record.path).stat()
        return f"{record.path} {status.st_size} {status.st_mtime_ns}"

    @staticmethod
    def _volume(path: Path, kind: type) -> Volume:
        array = np.load(path).astype(kind)
        return Volume(array, np.eye(4), np.eye(4), array.shape[1:])


def source(folder: Path, shapes: Sequence[tuple[int, ...]], *, masks: bool = False) -> FakeIndex:
    rng = np.random.default_rng(0)
    records = []
    for n, shape in enumerate(shapes):
        records.append(record(f"i{n:03}", shape, mask=masks))
        image = np.cumsum(rng.normal(size=(1, *shape)), axis=-1).astype(np.float32)
        np.save(folder / records[-1].path, image)
        if masks:
            np.save(folder / str(records[-1].mask), (image > 0).astype(np.uint8) * 2)
    return FakeIndex(root=folder, modality="mri", records=tuple(records))


@pytest.fixture
def index(tmp_path: Path) -> FakeIndex:
    (tmp_path / "source").mkdir()
    return source(tmp_path / "source", [(20, 24, 18), (70, 66, 65)], masks=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


class TestContent:
    def test_an_image_comes_back_with_its_place_and_mask(self, store: Store, index: FakeIndex) -> None:
        for one in index.records:
            key = store.add(index, one, STEPS)
            expected = preprocess(index.open(one), STEPS)
            got = store.load_volume(key)
            assert np.abs(got.array - expected.array).max() <= expected.array.std() / 200
            assert got.array.dtype == np.float32
            np.testing.assert_array_equal(got.affine, expected.affine)
            np.testing.assert_array_equal(got.native_affine, expected.native_affine)
            assert got.native_shape == expected.native_shape
            np.testing.assert_array_equal(store.read_mask(key), resample_mask(index.open_mask(one), expected).array)
            entry = store.get_entry(key)
            assert (entry.shape, entry.channels, entry.has_mask) == (one.shape, 1, True)
            assert entry.minimum == (float(store.read_image(key).min()),)
            assert entry.metrics == measure_quality(index.open(one))

    def test_a_box_equals_the_same_part_of_the_whole(self, store: Store, index: FakeIndex) -> None:
        key = store.add(index, index.records[1], STEPS)
        box = (slice(3, 67), slice(60, 66), slice(0, 65))
        np.testing.assert_array_equal(store.read_image(key, box), store.read_image(key)[:, 3:67, 60:66])
        np.testing.assert_array_equal(store.read_mask(key, box), store.read_mask(key)[:, 3:67, 60:66])

    def test_a_box_is_read_without_the_whole_volume(self, tmp_path: Path, store: Store) -> None:
        index = source(tmp_path, [(192, 192, 128)])
        key = store.add(index, index.records[0], STEPS)
        path = next(store.folder.glob("*/*.b2nd"))
        whole = path.stat().st_size
        fresh = Store(store.folder)
        fresh.get_entry(key)
        before = _bytes_read()
        fresh.read_image(key, (slice(0, 32), slice(0, 32), slice(0, 32)))
        assert 0 < _bytes_read() - before < whole / 4

    def test_normalised_images_take_half_precision_and_others_keep_theirs(self, store: Store) -> None:
        smooth = np.linspace(-2, 2, 4096, dtype=np.float32).reshape(1, 16, 16, 16)
        store.put("aa", volume(smooth))
        store.put("bb", volume(smooth * 1e6))
        store.put("cc", volume(smooth + 1000))
        assert store.read_image("aa").dtype == np.float16
        assert store.read_image("bb").dtype == np.float32
        np.testing.assert_array_equal(store.read_image("bb"), smooth * np.float32(1e6))
        np.testing.assert_array_equal(store.read_image("cc"), smooth + np.float32(1000))

    def test_a_mask_of_other_than_whole_numbers_is_refused(self, store: Store) -> None:
        with pytest.raises(UserError, match="integers from 0 to 255"):
            store.put("aa", volume(np.zeros((1, 4, 4, 4))), volume(np.full((1, 4, 4, 4), 300)))

    def test_every_file_carries_its_schema_version(self, store: Store, index: FakeIndex) -> None:
        store.add(index, index.records[0], STEPS)
        assert json.loads((store.folder / "store.json").read_text())["schema_version"] == SCHEMA_VERSION

    def test_an_entry_carries_the_fingerprint_of_the_image_as_it_was_read(self, store: Store, index: FakeIndex) -> None:
        one = index.records[0]
        found = compute_fingerprint(index.open(one))
        cropped: list[Step] = [{"op": "pad_or_crop", "shape": [8, 8, 8]}]
        assert found
        assert [store.get_entry(store.add(index, one, steps)).fingerprint for steps in (STEPS, cropped)] == [
            found,
            found,
        ]

    def test_another_schema_version_is_not_read(
        self, store: Store, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = store.add(index, index.records[0], STEPS)
        monkeypatch.setattr("medim.data.loading.store.SCHEMA_VERSION", SCHEMA_VERSION + 1)
        monkeypatch.setattr("medim.data.loading.store.READABLE_VERSIONS", {SCHEMA_VERSION + 1})
        assert not Store(store.folder).is_intact(key)
        newer = Store(store.folder)
        assert newer.add(index, index.records[0], STEPS) == key
        assert newer.is_intact(key)
        assert json.loads((store.folder / "store.json").read_text())["schema_version"] == SCHEMA_VERSION + 1

    def test_the_default_folder_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MEDIM_CACHE", "/a")
        assert locate_default_store() == Path(f"/a/store-{SCHEMA_VERSION}")
        monkeypatch.delenv("MEDIM_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/b")
        assert locate_default_store() == Path(f"/b/medim/store-{SCHEMA_VERSION}")


class TestForeground:
    def test_the_list_of_a_mask_is_written_with_it(
        self, store: Store, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for one in index.records:
            key = store.add(index, one, STEPS)
            expected = list_foreground(store.read_mask(key)[0])
            with monkeypatch.context() as patch:
                patch.setattr(Store, "read_mask", lambda *_: pytest.fail("the mask was read"))
                foreground = Store(store.folder).read_foreground(key)
            assert expected.classes.tolist() == foreground.classes.tolist() == [2]
            np.testing.assert_array_equal(foreground.counts, expected.counts)
            np.testing.assert_array_equal(foreground.indices, expected.indices)
            assert foreground.shape == one.shape

    def test_a_mask_without_foreground_has_an_empty_list(self, store: Store) -> None:
        store.put("aa", volume(np.zeros((1, 4, 4, 4))), volume(np.zeros((1, 4, 4, 4))))
        assert store.is_intact("aa")
        assert store.read_foreground("aa").counts.tolist() == []

    def test_a_list_that_an_earlier_version_did_not_write_is_computed_and_added(
        self, store: Store, index: FakeIndex
    ) -> None:
        key = store.add(index, index.records[0], STEPS)
        path = store.folder / key[:2] / f"{key}.foreground.b2nd"
        content = path.read_bytes()
        path.unlink()
        older = Store(store.folder)
        assert older.is_intact(key)
        np.testing.assert_array_equal(
            older.read_foreground(key).indices, list_foreground(older.read_mask(key)[0]).indices
        )
        assert path.read_bytes() == content

    def test_a_store_that_cannot_be_written_has_lists_too(
        self, store: Store, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path, _: bytes) -> None:
            raise UserError(f"{path}: could not be written (Read-only file system).")

        key = store.add(index, index.records[0], STEPS)
        expected = store.read_foreground(key)
        (store.folder / key[:2] / f"{key}.foreground.b2nd").unlink()
        monkeypatch.setattr("medim.data.loading.store.write_bytes", refuse)
        np.testing.assert_array_equal(Store(store.folder).read_foreground(key).indices, expected.indices)

    def test_an_image_without_mask_has_no_list(self, store: Store) -> None:
        store.put("aa", volume(np.zeros((1, 4, 4, 4))))
        with pytest.raises(UserError, match="not in the store"):
            store.read_foreground("aa")
        assert not list(store.folder.rglob("*.foreground.b2nd"))

    @pytest.mark.parametrize(
        ("indices", "header"),
        [
            (np.array([[1, 999]], np.uint16), {"classes": [1], "counts": [2]}),  # outside the mask
            (np.array([[1, 2]], np.uint16), {"classes": [1], "counts": [3]}),
            (np.array([[1, 2]], np.uint16), {"classes": [1], "counts": [3, -1]}),
            (np.array([[1, 2]], np.uint16), {"classes": [1], "counts": "two"}),
            (np.array([[1, 2]], np.uint16), {"classes": [1]}),
            (np.array([[1.0, 2.0]], np.float32), {"classes": [1], "counts": [2]}),
            (np.array([[-1, 2]], np.int16), {"classes": [1], "counts": [2]}),
            (np.array([[[1], [2]]], np.uint16), {"classes": [1], "counts": [2]}),
        ],
    )
    def test_a_list_that_does_not_fit_its_mask_is_damaged(
        self, store: Store, indices: Array, header: dict[str, object]
    ) -> None:
        store.put("aa", volume(np.zeros((1, 4, 4, 4))), volume(np.ones((1, 4, 4, 4))))
        (store.folder / "aa" / "aa.foreground.b2nd").write_bytes(_encode_frame(indices, header))
        with pytest.raises(UserError, match=r"aa\.foreground\.b2nd: damaged\. Run `medim preprocess`"):
            Store(store.folder).read_foreground("aa")


class TestKey:
    def test_steps_and_source_name_the_entry(self, store: Store, index: FakeIndex) -> None:
        one = index.records[0]
        key = store.compute_key(index, one, STEPS)
        assert key == store.compute_key(index, one, [dict(reversed(step.items())) for step in STEPS])
        assert key != store.compute_key(index, one, STEPS[:1])
        assert key != store.compute_key(index, replace(one, mask=None), STEPS)
        os.utime(index.root / one.path, ns=(1, 1))
        assert key != store.compute_key(index, one, STEPS)


class TestDamage:
    def test_a_cut_or_changed_file_is_found_and_redone(self, store: Store, index: FakeIndex) -> None:
        one = index.records[0]
        key = store.add(index, one, STEPS)
        assert store.is_intact(key)
        good = store.read_image(key)
        for kind in (".b2nd", ".mask.b2nd", ".foreground.b2nd"):
            path = store.folder / key[:2] / f"{key}{kind}"
            content = path.read_bytes()
            assert len(content) > 200
            damages = [content[: len(content) // 2], content[:7], b"", *_flipped(content, 8)]
            for damaged in damages:
                path.write_bytes(damaged)
                assert not store.is_intact(key)
                assert store.add(index, one, STEPS) == key
                assert store.is_intact(key)
                np.testing.assert_array_equal(store.read_image(key), good)
            path.unlink()
            assert store.is_intact(key) == (kind == ".foreground.b2nd")  # earlier versions wrote no lists
            store.put(key, *_prepare_image(index, one, STEPS))

    def test_a_damaged_file_is_an_error_that_says_what_to_run(self, store: Store, index: FakeIndex) -> None:
        key = store.add(index, index.records[0], STEPS)
        path = store.folder / key[:2] / f"{key}.b2nd"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match="medim preprocess"):
            Store(store.folder).read_image(key)

    def test_a_missing_key_is_an_error_that_says_what_to_run(self, store: Store) -> None:
        with pytest.raises(UserError, match="medim preprocess"):
            store.read_image("0" * 32)

    def test_an_interrupted_write_leaves_nothing(
        self, store: Store, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.add(index, index.records[0], STEPS)
        assert not [path for path in store.folder.rglob("*") if path.is_file()]


class TestFill:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_what_fails_is_reported_and_the_rest_is_stored(self, tmp_path: Path, store: Store, jobs: int) -> None:
        index = source(tmp_path, [(8, 9)] * 5)
        np.save(tmp_path / "i002.npy", np.full((1, 8, 9), np.nan))
        (tmp_path / "i003.npy").unlink()
        odd = record("odd", (8, 9))
        np.save(tmp_path / odd.path, np.zeros((1, 8, 9)))
        calls: list[tuple[int, int]] = []
        records = [*reversed(index.records), odd]
        keys, failed = fill_store(store, index, records, STEPS, jobs=jobs, progress=lambda *c: calls.append(c))
        assert list(keys) == ["i004", "i001", "i000"]
        assert [(r.path, r.reason) for r in failed] == [
            ("i003.npy", "preprocessing-failed"),
            ("i002.npy", "preprocessing-failed"),
            ("odd.npy", "preprocessing-failed"),
        ]
        assert "72 of 72" in failed[1].detail
        assert not any(str(tmp_path) in r.detail or "secret" in r.detail for r in failed)
        assert calls == [(n, 6) for n in range(1, 7)]
        assert all(store.is_intact(key) for key in keys.values())

    def test_an_image_that_does_not_fit_into_memory_is_named_and_the_rest_is_stored(
        self, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = source(tmp_path, [(8, 9)] * 3)

        def exhaust_memory(volume: Volume) -> None:
            monkeypatch.undo()  # the others fit
            raise MemoryError

        monkeypatch.setattr("medim.data.loading.store.measure_quality", exhaust_memory)
        keys, failed = fill_store(store, index, index.records, STEPS)
        assert [(r.path, r.reason) for r in failed] == [("i000.npy", "too-much-memory")]
        assert list(keys) == ["i001", "i002"]

    def test_a_file_that_kills_its_process_is_named_and_the_rest_is_stored(self, tmp_path: Path, store: Store) -> None:
        index = source(tmp_path, [(8, 9)] * 6)
        killer = record("kill", (8, 9))
        np.save(tmp_path / killer.path, np.zeros((1, 8, 9)))
        records = [*index.records[:2], killer, *index.records[2:]]
        keys, failed = fill_store(store, index, records, STEPS, jobs=2)
        assert [(r.path, r.reason) for r in failed] == [("kill.npy", "worker-died")]
        assert list(keys) == [r.image for r in index.records]

    def test_what_is_whole_is_kept(self, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        index = source(tmp_path, [(8, 9)] * 3)
        keys, _ = fill_store(store, index, index.records, STEPS)
        monkeypatch.setattr(FakeIndex, "open", lambda *_: pytest.fail("read again"))
        assert fill_store(store, index, index.records, STEPS) == (keys, ())

    def test_wrong_steps_end_it_at_once(self, tmp_path: Path, store: Store) -> None:
        index = source(tmp_path, [(8, 9)])
        with pytest.raises(UsageError, match="Did you mean 'normalise'"):
            fill_store(store, index, index.records, [{"op": "normalize"}])
        with pytest.raises(UsageError, match="--jobs"):
            fill_store(store, index, index.records, STEPS, jobs=0)

    def test_two_at_once_make_one_whole_store(self, tmp_path: Path, store: Store) -> None:
        index = source(tmp_path, [(12, 13)] * 12, masks=True)
        context = multiprocessing.get_context("spawn")
        both = [context.Process(target=fill_store, args=(store, index, index.records, STEPS)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
        assert all(store.is_intact(store.compute_key(index, one, STEPS)) for one in index.records)
        assert len(list(store.folder.glob("*/*"))) == 36

    def test_a_store_goes_to_another_process_without_its_open_files(self, store: Store, index: FakeIndex) -> None:
        key = store.add(index, index.records[0], STEPS)
        expected = store.read_image(key)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read_image(key), expected)


def volume(array: Array) -> Volume:
    return Volume(array, np.eye(4), np.eye(4), array.shape[1:])


def _flipped(content: bytes, count: int) -> list[bytes]:
    out = []
    for place in np.random.default_rng(0).integers(0, len(content), count):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        out.append(bytes(changed))
    return out


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])
