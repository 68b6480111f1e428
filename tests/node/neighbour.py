"""A visit to a hospital with an Orthanc: it sends series to a node, answers its queries, and receives the answers.

Run in a network namespace of its own, as `tests.hospital.visit`:
`python -m tests.node.neighbour FOLDER PACKAGE SERIES` writes the counts of Orthanc to FOLDER/counts.json.
"""

from __future__ import annotations

import base64
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pydicom

from tests.hospital import visit
from tests.node.harness import node, wait_for
from tests.node.senders import renew_uids, write_slices

N_SERIES = 3
PACS = f"ORTHANC@127.0.0.1:{visit.DICOM}"


def main(folder: Path, package: Path, series_folder: Path) -> None:
    visit.loopback_up()
    images = [pydicom.dcmread(path) for path in sorted(series_folder.glob("*.dcm"))]
    for image in images:
        del image.ImagesInAcquisition  # so that the count can only come from the archive
    files = [path for n in range(N_SERIES) for path in write_slices(renew_uids(images, n), folder / "sent" / str(n))]
    with visit.orthanc(folder):
        visit.store(files)
        options = ("--listen", "127.0.0.1:11112", "--allow", "ORTHANC@127.0.0.1", "--forward", PACS, "--ask", PACS)
        with node(package, folder, *options) as running:
            for one in request("GET", "/series"):
                request("POST", "/modalities/medim/store", one)
                request("POST", "/modalities/medim/store", one)  # a router that repeats itself
            n_images = len(images) * N_SERIES
            wait_for(lambda: request("GET", "/statistics")["CountInstances"] == n_images + 2 * N_SERIES, 240)
            for one in request("GET", "/studies"):
                request("POST", "/modalities/medim/store", one)  # the answers too
            states = running.states()
        counts = {"orthanc": request("GET", "/statistics")["CountInstances"], "images": n_images, "states": states}
    (folder / "counts.json").write_text(json.dumps(counts))


def request(method: str, path: str, body: str | None = None) -> Any:
    """Call the REST interface of Orthanc."""
    key = base64.b64encode(f"medim:{visit.PASSWORD}".encode()).decode()
    call = urllib.request.Request(
        f"http://127.0.0.1:{visit.HTTP}{path}", body.encode() if body else None, method=method
    )
    call.add_header("Authorization", f"Basic {key}")
    with urllib.request.urlopen(call, timeout=120) as response:
        return json.load(response)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
