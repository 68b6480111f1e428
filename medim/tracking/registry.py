"""Registered models of MLflow: encoders and packages, as safetensors, ONNX and JSON, never as pickles."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from medim.integrity import SIGNATURE, SUMS, verify_checksums
from medim.model_spec import read_spec
from medim.tracking.lineage import PACKAGE_TAG, format_lineage, format_note
from medim.tracking.outbox import format_server_error
from medim.tracking.target import SWITCH, check_target, is_tracking_enabled, tracking_uri
from medim.types import UsageError, UserError
from medim.version import DISTRIBUTION, __version__

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

ALIAS = "candidate"  # of the newest registered version of a package
PACKAGE_FOLDER = "package"  # artifacts of a package
PICKLE_SUFFIXES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_NAME = re.compile(r"\w[\w .-]{0,127}")


class PackageVersion(TypedDict):
    """Registration of a package.

    Attributes:
        name: name of the registered model.
        tags: tags of the version.
    """

    name: str
    tags: dict[str, str]


def check_registry(name: str) -> None:
    """Check that a package can be registered, before it is built.

    Args:
        name: name of the registered model.

    Raises:
        UsageError: the name is not valid, or tracking is off.
        UserError: the tracking target does not respond, or has no model registry.
    """
    if not _NAME.fullmatch(name) or name != name.strip():
        raise UsageError(
            f"--register {name}: expected 1 to 128 letters, digits, spaces and the characters _ - ., beginning with a "
            "letter or digit."
        )
    if not is_tracking_enabled():
        raise UsageError(f"--register: {SWITCH}=off turns tracking off. Unset it, or omit --register.")
    check_target()
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=tracking_uri()).search_registered_models(max_results=1)
    except Exception as error:  # MLflow raises errors of its stores and libraries
        raise UserError(
            f"--register {name}: the tracking server has no model registry that responds "
            f"({format_server_error(error)[:200]}). Use a server with a registry, or omit --register."
        ) from error


def register_package(client: MlflowClient, run: Run, package: Path, version: PackageVersion) -> None:
    """Upload the files of a package to a run, and register them as a new version with the alias `candidate`.

    The weights of the MONAI bundle are left out, because PyTorch stores them in a pickle; `medim verify` accepts this.

    Args:
        client: client of the server.
        run: run of the export.
        package: folder of the package.
        version: name and tags of the version.

    Raises:
        PackageError: the package was changed after it was exported.
    """
    run_id, name = run.info.run_id, version["name"]
    sums = verify_checksums(package).sums
    for file in (*sums, SUMS, *([SIGNATURE] if (package / SIGNATURE).is_file() else [])):
        if PurePosixPath(file).suffix not in PICKLE_SUFFIXES:
            folder = (PurePosixPath(PACKAGE_FOLDER) / file).parent.as_posix()
            client.log_artifact(run_id, str(package / file), folder)
    source = f"{run.info.artifact_uri}/{PACKAGE_FOLDER}"
    number = _create_version(client, name, run_id, source, version["tags"], _describe_version(client, run))
    client.set_registered_model_alias(name, ALIAS, number)


def register_encoder(client: MlflowClient, run: str, out: Path, name: str) -> None:
    """Log an encoder as a model without a pickle, and register it as a new version of `name`.

    The model consists of safetensors and JSON and is loaded by `medim.tracking.pyfunc`. It has an explicit signature.
    `example.npz` contains an example: noise as input and the output of the encoder.
    """
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import Schema, TensorSpec

    from medim.tracking import pyfunc

    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder) / "model"
        (folder / "data").mkdir(parents=True)
        for part in ("encoder.safetensors", "encoder.json", "card.md"):
            shutil.copy(out / "encoder" / part, folder / "data" / part)
        spec = read_spec(folder / "data" / "encoder.json")
        shape = (spec.in_channels, *spec.input_shape)
        example = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
        output = pyfunc.load_encoder_pyfunc(folder / "data").predict(example)
        np.savez_compressed(folder / "example.npz", input=example, output=output)
        dtype = np.dtype(np.float32)
        signature = ModelSignature(
            Schema([TensorSpec(dtype, (-1, *shape))]),
            Schema([TensorSpec(dtype, (-1, *output.shape[1:]))]),
        )
        model = Model(artifact_path="encoder", run_id=run, signature=signature, metadata={"example": "example.npz"})
        (folder / "requirements.txt").write_text(f"{DISTRIBUTION}[train]=={__version__}\n")
        add_to_model(model, loader_module=pyfunc.__name__, data="data")  # type: ignore[no-untyped-call]
        model.save(str(folder / "MLmodel"))
        client.log_artifacts(run, str(folder), "encoder")
    _create_version(client, name, run, f"{client.get_run(run).info.artifact_uri}/encoder", {}, None)


def _create_version(
    client: MlflowClient, name: str, run_id: str, source: str, tags: dict[str, str], description: str | None
) -> str:
    """Create a version of a registered model, and the model if it is new; returns the number of the version.

    A version that an earlier attempt created is returned.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = (
        versions[0]
        if versions
        else client.create_model_version(
            name, source=source, run_id=run_id, tags=tags, description=description, await_creation_for=0
        )
    )
    return str(version.version)


def _describe_version(client: MlflowClient, run: Run) -> str:
    """Describe a version by the runs that led to it, as links, and the digest of the package."""
    tags = run.data.tags
    rows = format_lineage(client, {name: value for name, value in tags.items() if name != PACKAGE_TAG})
    link = f"[{run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})"
    rows.append(("Package", link, tags.get(PACKAGE_TAG, "")[:12]))
    return format_note(rows)
