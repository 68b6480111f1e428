from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from medim.data.index.index import build_index
from medim.data.source import open_source
from medim.types import UserError


@pytest.mark.parametrize("option", ["labels", "subjects"])
def test_a_table_given_with_a_finished_index_is_refused_rather_than_ignored(option: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    ramp = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    nibabel.save(nibabel.Nifti1Image(ramp, np.eye(4)), tmp_path / "images" / "a.nii.gz")
    build_index(tmp_path / "images", "mri").write(tmp_path / "index")
    table = tmp_path / "table.csv"
    table.write_text("image,subject,label\na.nii.gz,one,normal\n")
    assert len(open_source(tmp_path / "index", "mri")[0].records) == 1
    with pytest.raises(UserError, match=f"--{option} has no effect on an existing index"):
        open_source(tmp_path / "index", "mri", **{option: table})
