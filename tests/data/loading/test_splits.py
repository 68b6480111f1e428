from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import generate_uid

from medim.data.index.index import ImageRecord, Index, build_index
from medim.data.loading.splits import assign_splits, count_overlap, read_splits, select_label_budget, write_splits
from medim.types import Split, UsageError, UserError
from tests.data.synthetic import noise, write_archive, write_nifti, write_series


def record(number: int, subject: str, *, label: str | None = "a", split: str | None = None) -> ImageRecord:
    return ImageRecord(
        image=f"i{number:04}",
        path=f"i{number:04}.png",
        subject=subject,
        session=None,
        series=None,
        modality="xray",
        sequence=None,
        shape=(8, 8),
        spacing=(1.0, 1.0),
        affine=(1.0, *[0.0] * 4, 1.0, *[0.0] * 4, 1.0, *[0.0] * 4, 1.0),
        scanner=None,
        field_strength=None,
        label=label,
        mask=None,
        split=split,
        quality=None,
    )


def records_of(sizes: list[int], labels: str = "ab") -> tuple[ImageRecord, ...]:
    subjects = [s for s, size in enumerate(sizes) for _ in range(size)]
    return tuple(record(n, f"s{s}", label=labels[s % len(labels)]) for n, s in enumerate(subjects))


def index_of(records: tuple[ImageRecord, ...]) -> Index:
    return Index(root=Path("nowhere"), modality="xray", records=records)


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=40)


class TestSplit:
    @settings(max_examples=100, deadline=None)
    @given(sizes=sizes, seed=st.integers(0, 5), fraction=st.floats(0, 0.9))
    def test_no_subject_is_on_both_sides_and_the_same_seed_gives_the_same(
        self, sizes: list[int], seed: int, fraction: float
    ) -> None:
        index = index_of(records_of(sizes))
        got = assign_splits(index, seed=seed, val_fraction=fraction)
        assert got == assign_splits(index, seed=seed, val_fraction=fraction)
        assert set(got) == {r.image for r in index.records}
        sides: dict[str, set[str]] = {}
        for r in index.records:
            sides.setdefault(r.subject, set()).add(got[r.image])
        assert all(len(side) == 1 for side in sides.values())
        val = sum(side == {"val"} for side in sides.values())
        assert abs(val - fraction * len(sizes)) <= 0.5 + 1e-9 or (val == 1 and len(sizes) > 1)

    @settings(max_examples=50, deadline=None)
    @given(sizes=sizes, seed=st.integers(0, 5))
    def test_site_keys_do_not_change_who_is_trained_on(self, sizes: list[int], seed: int) -> None:
        here = records_of(sizes)
        names = {f"s{n}": f"other-{hash((n, 'salt')) % 10**9}-{n}" for n in range(len(sizes))}
        there = tuple(replace(r, subject=names[r.subject]) for r in here)
        assert assign_splits(index_of(here), seed=seed) == assign_splits(index_of(there), seed=seed)
        chosen = select_label_budget(here, labelled=5, seed=seed), select_label_budget(there, labelled=5, seed=seed)
        assert [r.image for r in chosen[0]] == [r.image for r in chosen[1]]

    def test_another_seed_gives_another_split(self) -> None:
        index = index_of(records_of([1] * 50))
        assert assign_splits(index, seed=0) != assign_splits(index, seed=1)

    def test_the_sources_own_split_is_kept_and_draws_in_its_subjects_open_images(self) -> None:
        own = tuple(record(n, f"s{n}", split=("train", "val", "test")[n % 3]) for n in range(9))
        follow = record(9, "s2", split=None)
        got = assign_splits(index_of((*own, follow)))
        assert [got[r.image] for r in own] == [r.split for r in own]
        assert got[follow.image] == "test"

    def test_both_splits_hold_the_classes_in_proportion(self) -> None:
        records = tuple(record(n, f"s{n}", label="rare" if n % 10 == 0 else "common") for n in range(200))
        got = assign_splits(index_of(records))
        assert Counter(r.label for r in records if got[r.image] == "val") == {"common": 36, "rare": 4}

    def test_many_rare_classes_keep_no_common_one_out_of_validation_and_a_single_subject_is_learnt_from(self) -> None:
        kinds = ["normal"] * 40 + [f"rare {n // 3}" for n in range(60)] + ["single"]
        records = tuple(record(n, f"s{n}", label=label) for n, label in enumerate(kinds))
        got = assign_splits(index_of(records))
        held_out = Counter(r.label for r in records if got[r.image] == "val")
        assert held_out["normal"] == 7
        assert held_out["single"] == 0
        assert held_out.total() == 20

    def test_a_subject_on_two_sides_of_the_sources_split_is_refused(self) -> None:
        with pytest.raises(UserError, match="belongs to one split"):
            assign_splits(index_of((record(0, "s", split="train"), record(1, "s", split="val"))))

    def test_a_split_of_another_name_is_refused(self) -> None:
        with pytest.raises(UserError, match="train, val or test"):
            assign_splits(index_of((record(0, "s", split="holdout"),)))

    @pytest.mark.parametrize("fraction", [-0.1, 1.0])
    def test_a_fraction_out_of_range_is_wrong_usage(self, fraction: float) -> None:
        with pytest.raises(UsageError):
            assign_splits(index_of(()), val_fraction=fraction)


class TestBudget:
    @settings(max_examples=150, deadline=None)
    @given(sizes=sizes, seed=st.integers(0, 5), few=st.integers(1, 60), more=st.integers(0, 60))
    def test_budgets_are_nested_whole_and_never_above_the_count(
        self, sizes: list[int], seed: int, few: int, more: int
    ) -> None:
        records = records_of(sizes)
        small, large = (
            select_label_budget(records, labelled=few, seed=seed),
            select_label_budget(records, labelled=few + more, seed=seed),
        )
        assert set(small) <= set(large)
        assert small == select_label_budget(records, labelled=few, seed=seed)
        whole = Counter(r.subject for r in records)
        assert all(count == whole[subject] for subject, count in Counter(r.subject for r in small).items())
        assert list(small) == [r for r in records if r in set(small)]
        assert len(small) <= few or len({r.subject for r in small}) == 1
        assert len(small) > few - max(sizes) or len(small) == len(records)

    @settings(max_examples=60, deadline=None)
    @given(sizes=sizes, seed=st.integers(0, 5), target=st.sampled_from([1, 2, 3, 5, 10, 15, 20, 25]))
    def test_usual_counts_are_met_exactly_where_single_images_allow(
        self, sizes: list[int], seed: int, target: int
    ) -> None:
        records = records_of([*sizes, *[1] * 40])
        assert len(select_label_budget(records, labelled=target, seed=seed)) == target

    def test_any_count_is_met_exactly_with_one_image_a_subject(self) -> None:
        records = records_of([1] * 64)
        assert [len(select_label_budget(records, labelled=n)) for n in range(1, 65)] == list(range(1, 65))

    def test_one_percent_holds_both_classes(self) -> None:
        records = tuple(record(n, f"s{n}", label="normal" if n % 4 == 0 else "pneumonia") for n in range(4698))
        for seed in range(5):
            got = Counter(r.label for r in select_label_budget(records, fraction=0.01, seed=seed))
            assert sum(got.values()) == 47
            assert got["normal"] == pytest.approx(47 / 4, abs=1)
            assert {r.label for r in select_label_budget(records, labelled=2, seed=seed)} == {"normal", "pneumonia"}

    def test_a_fraction_counts_labelled_images(self) -> None:
        records = records_of([1] * 50) + tuple(record(100 + n, f"u{n}", label=None) for n in range(50))
        assert len(select_label_budget(records, fraction=0.1)) == 5
        assert all(r.label is not None for r in select_label_budget(records))
        assert len(select_label_budget(records)) == 50

    def test_more_than_there_are_gives_all(self) -> None:
        records = records_of([2, 3, 1])
        assert select_label_budget(records, labelled=99) == records

    def test_numbers_as_labels_are_not_taken_for_classes(self) -> None:
        records = tuple(record(n, f"s{n}", label=str(n / 7)) for n in range(30))
        assert len(select_label_budget(records, labelled=10)) == 10

    @pytest.mark.parametrize(
        "options", [{"labelled": 0}, {"fraction": 0.0}, {"fraction": 1.5}, {"labelled": 3, "fraction": 0.5}]
    )
    def test_a_count_out_of_range_is_wrong_usage(self, options: dict[str, float]) -> None:
        with pytest.raises(UsageError):
            select_label_budget(records_of([1, 1]), **options)  # type: ignore[arg-type]

    def test_no_labels_at_all_is_an_error_that_says_what_to_give(self) -> None:
        with pytest.raises(UserError, match="--labels"):
            select_label_budget((record(0, "s", label=None),), labelled=1)


class TestSharedImages:
    @settings(max_examples=100, deadline=None)
    @given(sizes=sizes, seed=st.integers(0, 5), shared=st.lists(st.integers(0, 30), max_size=100))
    def test_subjects_that_share_an_image_are_on_one_side_and_only_they_move_and_only_to_validation(
        self, sizes: list[int], seed: int, shared: list[int]
    ) -> None:
        index = index_of(records_of(sizes))
        prints = {r.image: str(n) for r, n in zip(index.records, shared, strict=False)}
        before, after = assign_splits(index, seed=seed), assign_splits(index, seed=seed, fingerprints=prints)
        assert count_overlap(index, after, prints, fail_on_contamination=True) == {"images": 0, "subjects": 0}
        subjects = {r.image: r.subject for r in index.records}
        assert all(len({after[i] for i in after if subjects[i] == s}) == 1 for s in subjects.values())
        moved = {subjects[image] for image in after if before[image] != after[image]}
        owners = [{subjects[image] for image in prints if prints[image] == found} for found in set(prints.values())]
        assert moved <= {subject for people in owners if len(people) > 1 for subject in people}
        assert all(after[image] == "val" for image in after if before[image] != after[image])

    def test_an_open_subject_goes_where_the_source_has_the_one_it_shares_an_image_with(self) -> None:
        own = (record(0, "t", split="train"), record(1, "v", split="val"), record(2, "x", split="test"))
        prints = {"i0000": "a", "i0001": "b", "i0002": "c", "i0003": "a", "i0004": "b", "i0005": "c"}
        index = index_of((*own, *(record(n, f"open{n}") for n in (3, 4, 5))))
        for seed in range(3):
            got = assign_splits(index, seed=seed, fingerprints=prints)
            assert [got[f"i000{n}"] for n in range(6)] == ["train", "val", "test"] * 2

    def test_what_the_sources_own_splits_share_is_counted_and_refused_when_strict(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        sides = ("train", "train", "val", "val", "test")
        index = index_of(tuple(record(n, f"s{n}", split=side) for n, side in enumerate(sides)))
        prints = {"i0000": "a", "i0001": "", "i0002": "a", "i0003": "", "i0004": "a"}
        splits = assign_splits(index, fingerprints=prints)
        assert list(splits.values()) == list(sides)
        assert count_overlap(index, splits, prints) == {"images": 2, "subjects": 2}
        assert "2 held-out images" in caplog.text
        with pytest.raises(UserError, match=r"2 held-out images.*--fail-on-contamination allows none"):
            count_overlap(index, splits, prints, fail_on_contamination=True)


class TestStored:
    @settings(max_examples=30, deadline=None)
    @given(sizes=sizes, seed=st.integers(0, 3))
    def test_the_places_in_the_file_are_those_of_every_budget(
        self, sizes: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        index, path = index_of(records_of(sizes)), tmp_path_factory.mktemp("run") / "split.csv"
        splits = assign_splits(index)
        train = [r for r in index.records if splits[r.image] == "train"]
        write_splits(path, index, splits, train, seed=seed, labelled_records=train[:1])
        assert read_splits(path) == splits
        rows = list(csv.DictReader(path.open()))
        assert [row["image"] for row in rows if row["used_for_training"] == "yes"] == [r.image for r in train[:1]]
        assert all((row["label_rank"] == "") == (row["split"] != "train") for row in rows)
        for labelled in (1, 3, 7):
            chosen = select_label_budget(train, labelled=labelled, seed=seed) if train else ()
            last = max(
                (int(row["label_rank"]) for row in rows if row["image"] in {r.image for r in chosen}),
                default=0,
            )
            assert {row["image"] for row in rows if row["label_rank"] and int(row["label_rank"]) <= last} == {
                r.image for r in chosen
            }

    def test_a_damaged_file_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "split.csv").write_text("image,part\na,train\n")
        with pytest.raises(UserError, match="expected the columns image, split"):
            read_splits(tmp_path / "split.csv")

    def test_it_is_taken_as_labels_whatever_its_images_are_called(self, tmp_path: Path) -> None:
        for k, person in enumerate(("Avasarala_Chrisjen", "Nagata_Naomi", "plain")):
            name = "^".join(person.split("_"))
            tags: dict[str, str] = {"SeriesInstanceUID": generate_uid(), "PatientID": f"ID-{k}", "PatientName": name}
            write_series(tmp_path / "mri" / person / "T1.5", noise(5, 4, 6, seed=k), **tags)
            write_nifti(tmp_path / "mri" / f"{person}_T2.nii.gz")
        write_archive(tmp_path / "xray" / "small.npz")
        for modality in ("mri", "xray"):
            index = build_index(tmp_path / modality, modality)  # type: ignore[arg-type]
            wanted: dict[str, Split] = {r.image: "val" if k % 2 else "train" for k, r in enumerate(index.records)}
            of = {r.subject: wanted[r.image] for r in index.records}
            wanted = {r.image: of[r.subject] for r in index.records}
            path = tmp_path / f"{modality}.csv"
            write_splits(path, index, wanted, [], seed=0)
            again = build_index(tmp_path / modality, modality, labels=path)  # type: ignore[arg-type]
            assert {r.image: r.split for r in again.records} == wanted
            assert (modality == "mri") == any("p-" in image for image in wanted)
            assert set(wanted.values()) == {"train", "val"}
            assert not any(name in path.read_text() for name in ("Avasarala", "Naomi", "ID-"))
