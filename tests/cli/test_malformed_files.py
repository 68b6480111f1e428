"""A part of the cases of `tests/malformed_files.py`: each ends with one message that names the file, or has no effect.

The whole set runs with `python -m tests.malformed_files FOLDER`.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medim.data.index.index import build_index
from tests.export.packages import make_run
from tests.malformed_files import Target, iterate_damages, run_here, try_damage

CASES = 12  # of each file
EARLIER_STUDY = Path(__file__).resolve().parents[1] / "earlier_version" / "study"
TARGETS = [
    Target("encoder/encoder/encoder.json", ("embed", "encoder", "png", "--out", "OUT.npz")),
    Target("classifier/model/model.json", ("evaluate", "classifier", "--data", "index", "--out", "OUT")),
    Target("index/summary.json", ("report", "index")),
    Target("index/rejected.csv", ("report", "index")),
    Target("study/summary.json", ("report", "study")),
    Target("study/config.yaml", ("report", "study")),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with random weights, an index and a study."""
    folder = tmp_path_factory.mktemp("malformed") / "base"
    (folder / "png").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (28, 28)).astype(np.uint8)).save(folder / "png" / f"{number}.png")
    (folder / "png" / "labels.csv").write_text("image,label\n0.png,normal\n1.png,pneumonia\n")
    make_run(folder / "encoder", "encoder")
    make_run(folder / "classifier", "classifier")
    build_index(folder / "png", "xray", labels=folder / "png" / "labels.csv").write(folder / "index")
    shutil.copytree(EARLIER_STUDY, folder / "study")
    return folder


@pytest.mark.parametrize("target", TARGETS, ids=[target.file for target in TARGETS])
def test_a_damaged_file_ends_with_one_message_that_names_it(target: Target, runs: Path) -> None:
    damages = list(iterate_damages(runs / target.file))
    faults = []
    for damage in random.Random(target.file).sample(damages, min(CASES, len(damages))):
        result = try_damage(runs, runs.with_name("work"), target, damage, run_here)
        if fault := result.describe_fault(target):
            faults.append(f"{damage.name}: {fault}: {' '.join(result.output.split())[-200:]}")
    assert faults == []
