"""Fixtures every test can ask for, and the surroundings no test may leave traces outside of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)  # --hypothesis-profile=default looks for new cases
settings.load_profile("repeatable")

pytest_plugins = ("tests.export.fixtures",)  # packages, exported once a session
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images: MEDIM_DATA, or shared/data beside the repository.

    Skips where it is absent, and fails instead where MEDIM_REQUIRE_DATA=1 (as in .ci/run).
    """
    folder = Path(os.environ.get("MEDIM_DATA") or REPOSITORY.parent / "shared" / "data").resolve()
    if (folder / "README.md").is_file():
        return folder
    reason = "the real images are not here: put them into ../shared/data, or set MEDIM_DATA to their folder"
    if os.environ.get("MEDIM_REQUIRE_DATA") == "1":
        pytest.fail(f"{reason} (MEDIM_REQUIRE_DATA=1)")
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put cache, site key and MLflow database into a temporary folder; send no telemetry.

    The site key is fixed, because seeded splits depend on it where names are replaced by pseudonyms.
    """
    home = tmp_path_factory.mktemp("home")
    key_file = home / "config" / "medim" / "site.key"
    key_file.parent.mkdir(parents=True)
    key_file.write_text("0123456789abcdef" * 4)
    key_file.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIM_CACHE", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MPLBACKEND", "Agg")
        patch.delenv("MEDIM_SITE_KEY", raising=False)
        yield
