from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from medim.cli import app
from medim.cli.options import parse_device
from medim.cli.terminal import register_command
from medim.data.index.index import Index, build_index
from medim.data.loading.quality_table import read_quality
from medim.models.model import build_encoder
from medim.models.serialization import save_model
from tests.data.synthetic import write_archive
from tests.specs import make_spec


@dataclass(frozen=True, kw_only=True)
class GreetArguments:
    """Arguments of a command."""

    name: Annotated[str, typer.Argument(help="Name.")]
    loud: Annotated[bool, typer.Option("--loud", help="In capitals.")] = False
    count: Annotated[int, typer.Option(help="Number of greetings.", min=1)] = 2


def test_a_command_takes_the_fields_of_a_dataclass_as_its_arguments_in_their_order() -> None:
    calls: list[GreetArguments] = []
    greeting = typer.Typer()

    @register_command(greeting)
    def greet(arguments: GreetArguments) -> None:
        """Greet somebody."""
        calls.append(arguments)

    runner = CliRunner()
    assert runner.invoke(greeting, ["Ada", "--loud"]).exit_code == 0
    assert calls == [GreetArguments(name="Ada", loud=True, count=2)]
    assert runner.invoke(greeting, ["Ada", "--count", "0"]).exit_code == 2
    assert runner.invoke(greeting, []).exit_code == 2, "a field without default is required"
    text = runner.invoke(greeting, ["--help"]).output
    assert text.index("--loud") < text.index("--count") < text.index("--quiet")


@pytest.mark.parametrize("option", ["--seed", "--split-seed"])
@pytest.mark.parametrize("value", ["-1", str(2**32)])
def test_a_seed_that_no_generator_takes_is_wrong_usage(option: str, value: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["pretrain", "--modality", "mri", option, value, "--out", str(out)])
    assert result.exit_code == 2
    assert option in result.output
    limit = "least 0" if value == "-1" else "most 4294967295"
    assert f"expected a number of at {limit}, got '{value}'" in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--modality", "ct", "expected mri or xray, got 'ct'."),
        ("--precision", "fp16", "expected 32-true, bf16-mixed or 16-mixed, got 'fp16'."),
        ("--device", "cdua", "got 'cdua'. Did you mean 'cuda'?"),
        ("--device", "cuda:x", "expected auto, cpu, cuda, cuda:N (GPU number N) or mps, got 'cuda:x'."),
        ("--devices", "two", "expected an integer, got 'two'."),
    ],
)
def test_a_value_that_the_parser_rejects_is_reported_with_the_expected_ones(
    option: str, value: str, message: str
) -> None:
    result = CliRunner().invoke(app, ["pretrain", "--modality", "mri", option, value])
    assert result.exit_code == 2
    assert f"'{option}': " in result.output
    assert message in " ".join(result.output.split())


def test_the_help_shows_each_command_with_its_whole_first_line_and_options_without_python_types() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    overview = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    assert "..." not in overview.split("Commands:")[1]
    assert len(commands) >= 17
    for name, command in commands.items():
        assert len(command.get_short_help_str(limit=1000)) <= 60, name
        options = CliRunner().invoke(app, [name, "--help"]).output.split("Options:")[1]
        assert not re.search(r"<(str|int|float|path|list\b|.* range)", options), name


def test_a_twin_without_the_encoder_it_is_the_twin_of_is_wrong_usage(tmp_path: Path) -> None:
    options = ["--task", "segmentation", "--modality", "mri", "--from-scratch", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["finetune", *options])
    assert result.exit_code == 2
    assert "--from-scratch: requires --encoder RUN, whose architecture it uses." in result.output


def test_an_index_of_nothing_but_broken_files_says_why_and_leaves_with_4(tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_text("junk")
    out = tmp_path / "index"
    broken = str(tmp_path / "broken.nii.gz")
    result = CliRunner().invoke(app, ["index", broken, "--modality", "mri", "--out", str(out)])
    assert result.exit_code == 4
    assert "broken.nii.gz,unreadable," in (out / "rejected.csv").read_text()
    assert not (out / "summary.json").exists()
    assert "got 1 file without such an image; files: 1 unreadable." in result.output
    assert result.output.strip().endswith(f"Reason of each file: {out / 'rejected.csv'}")


def test_a_store_is_not_written_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "scan.txt").touch()
    result = CliRunner().invoke(app, ["preprocess", str(tmp_path), "--modality", "mri", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected a store" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["scan.txt"]


def test_probe_writes_beside_the_run_and_prints_a_line_for_each_kind_of_features_and_budget(tmp_path: Path) -> None:
    spec = {"kind": "encoder", "modality": "xray", "spatial_dims": 2, "in_channels": 1, "input_shape": [8, 8]}
    spec |= {"encoder": {"name": "unet", "channels": [2, 4]}, "preprocessing": [], "inference": {"mode": "whole"}}
    save_model(tmp_path / "run" / "encoder", "encoder", build_encoder(make_spec(spec)), make_spec(spec))
    arrays = {}
    for part, count in (("train", 12), ("val", 6), ("test", 1)):
        images = np.random.default_rng(count).integers(0, 255, (count, 8, 8), np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": np.arange(count)[:, None] % 2}
    np.savez(tmp_path / "noise.npz", **arrays)
    command = ["probe", str(tmp_path / "run"), "--data", str(tmp_path / "noise.npz"), "--protocol", "knn"]
    budgets = ["--label-fraction", "0.5", "--label-fraction", "1.0", "--labelled", "4", "--seeds", "2", "--levels", "1"]
    result = CliRunner().invoke(app, [*command, *budgets])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "run-probe-knn" / "probe.json").read_text())
    assert [(row["budget"], row["subsets"]) for row in content["summary"][:3]] == [("50%", 2), ("100%", 1), ("4", 2)]
    assert content["levels"] == [1]
    assert all(f"{name}, 100% labels" in result.output for name in ("encoder", "random", "pixels"))
    again = CliRunner().invoke(app, [*command, "--no-baselines"])
    assert again.exit_code == 1
    assert "expected an empty or new folder" in again.output
    assert CliRunner().invoke(app, [*command, "--no-baselines", "--overwrite"]).exit_code == 0


def test_a_probe_of_nothing_is_told_where_an_encoder_was_expected(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["probe", str(tmp_path / "nowhere"), "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected a finished run" in result.output


def test_preprocess_writes_the_quality_of_every_image_and_counts_the_flags(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "x.npz", train=6, val=3, side=28)
    held = dict(np.load(archive))
    held["val_images"][0] = held["train_images"][4] // 2  # one image twice
    np.savez(archive, **held)
    store = tmp_path / "store"
    command = ["preprocess", str(archive), "--modality", "xray", "--config", "xray-28", "--out", str(store)]
    printed = CliRunner().invoke(app, command).output
    assert re.search(r"near-duplicate +2\b", printed), printed
    written = (store / "quality.csv").read_bytes()
    assert len(read_quality(store)) == 9
    assert [r.nearest_other_subject for r in read_quality(store) if r.flags and r.nearest_other_subject] == [
        "x/val/0",
        "x/train/4",
    ]
    index = Index.read(store)
    assert [r.image for r in index.records if "near-duplicate" in str(r.quality)] == ["x/train/4", "x/val/0"]
    assert index.hash == build_index(archive, "xray").hash  # a store is made of the same images
    (store / "quality.csv").unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (store / "quality.csv").read_bytes() == written


@pytest.mark.parametrize(
    ("words", "message"), [(["absent"], "no such file or folder"), (["."], "expected a package, got a run")]
)
def test_a_public_key_needs_a_package(words: list[str], message: str, tmp_path: Path) -> None:
    encoder = tmp_path / words[0]
    options = ["--out", str(tmp_path / "f.npz"), "--public-key", "key.pem"]
    result = CliRunner().invoke(app, ["embed", str(encoder), str(tmp_path), *options])
    assert result.exit_code in (1, 2)
    assert message in result.stderr


@pytest.mark.parametrize("words", [["-h"], ["pretrain", "-h"], ["config", "show", "-h"]])
def test_the_short_option_of_help_is_understood(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_choices_may_be_written_in_capitals(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["index", str(tmp_path / "none"), "--modality", "MRI", "--out", str(tmp_path / "out")]
    )
    assert "expected a file or folder here" in result.output, "the option was accepted"


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        ("", "cuda:1", "1"),
        ("4,7", "CUDA:1", "7"),
        ("GPU-a,GPU-b", "gpu:0", "GPU-a"),
        ("4,7", "cuda", "4,7"),
        ("", "cpu", ""),
    ],
)
def test_a_numbered_device_hides_the_other_gpus(
    visible: str, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert parse_device(device) in ("cuda", "cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_a_device_beyond_the_visible_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(typer.BadParameter, match="expected cuda:0 to cuda:1, got 'cuda:2'"):
        parse_device("cuda:2")


@pytest.mark.parametrize("command", ["pretrain", "finetune", "plan", "study", "evaluate", "probe"])
def test_every_command_with_a_network_has_the_same_option_for_the_device(command: str) -> None:
    output = CliRunner().invoke(app, [command, "--help"]).output
    assert "--device" in output
