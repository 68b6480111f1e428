"""Claim: a node answers each series once, whatever is killed; the figures of its design are measured.

Parts (`--parts`): `kills` (senders that shuffle, interleave and repeat images, while processes are killed), `receive`
(images per second of 512 x 512 and the memory of the receiver), `journal` (time to start with a long journal),
`garbage` (malformed and silent connections), `destination` (an archive that is down). Sizes are options.

    PYTHONPATH=. python benchmarks/node.py --package PACKAGE --data ../shared/data --out node.json
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from medim.files import write_json
from medim.node.journal import Journal
from medim.node.processes import list_roles
from medim.node.series import ReceivedInstance
from medim.node.settings import read_settings
from medim.node.spool import Spool
from tests.node.harness import Node, node, read_crop, wait_for
from tests.node.senders import Archive, make_series, renew_uids, send_all

Figures = dict[str, float]


def main() -> None:
    """Run the parts; print and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="segmenter of MRI with label codes")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--parts", nargs="+", default=["kills", "receive", "journal", "garbage", "destination"])
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--series", type=int, default=200, help="series of all senders together")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=660, help="images of 512 x 512 to receive")
    parser.add_argument("--journal", type=int, default=10_000, help="series in the journal at the start")
    parser.add_argument("--connections", type=int, default=200, help="malformed, and as many silent connections")
    parser.add_argument("--down", type=float, default=60.0, help="seconds that the destination is down")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("node.json"))
    options = parser.parse_args()
    parts = {
        "kills": measure_kills,
        "receive": measure_receiver,
        "journal": measure_start,
        "garbage": measure_garbage,
        "destination": measure_destination,
    }
    results: dict[str, Figures] = {}
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {key: round(value, 3) for key, value in parts[name](options, Path(folder)).items()}
        print(name, ", ".join(f"{key} {value:g}" for key, value in results[name].items()), flush=True)
        write_json(options.out, {"schema_version": 1, "cores": os.cpu_count(), "parts": results})


def measure_kills(options: argparse.Namespace, folder: Path) -> Figures:
    """Count answers, losses and repeated deliveries while processes are killed at random times."""
    rng, crop = random.Random(options.seed), read_crop(options.data)
    start = time.monotonic()
    with Archive() as archive, node(options.package, folder, *forward_to(archive)) as running:
        senders = [
            threading.Thread(
                target=send_part, args=[crop, range(first, options.series, options.senders), running, first]
            )
            for first in range(options.senders)
        ]
        for sender in senders:
            sender.start()
        roles, n_kills = list_roles(read_settings(running.spool.root)), 0
        end = time.monotonic() + 60 + 20 * options.series
        while time.monotonic() < end and len(archive.series()) < options.series:
            time.sleep(rng.uniform(1, 6))
            victim = running.find_process(rng.choice(roles)) if n_kills < options.kills else None
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                n_kills += 1
        for sender in senders:
            sender.join()
        time.sleep(5)
        answers, n_images = archive.series(), sum(1 for _ in running.spool.list_instances())
    return {
        "series": options.series,
        "kills": n_kills,
        "answered": len(answers),
        "answered_twice": sum(count > 1 for count in answers.values()),
        "confirmed_images_lost": options.series * len(crop) - n_images,
        "objects": len(archive.objects),
        "deliveries_repeated": sum(archive.deliveries.values()) - len(archive.objects),
        "seconds": time.monotonic() - start,
    }


def send_part(crop: list[Dataset], numbers: range, running: Node, seed: int) -> None:
    """Send series in groups of four: shuffled, interleaved, and a fifth of the images twice."""
    rng = random.Random(seed)
    for first in range(0, len(numbers), 4):
        images = [image for number in numbers[first : first + 4] for image in renew_uids(crop, number)]
        images += rng.sample(images, len(images) // 5)
        rng.shuffle(images)
        send_all(images, running.port, calling=f"SENDER{seed}")


def measure_receiver(options: argparse.Namespace, folder: Path) -> Figures:
    """Measure images per second from one sender, and the memory of the receiver."""
    pixels = {"Rows": 512, "Columns": 512, "PixelData": bytes(512 * 512 * 2)}
    images = [image for n in range(options.images // 22) for image in make_series(n, 22, **pixels)]
    with node(options.package, folder, "--quiet-time", 3600) as running:
        receiver = running.find_process("receiver")
        start = time.monotonic()
        send_all(images, running.port)
        seconds = time.monotonic() - start
        memory = read_memory(receiver) if receiver else 0.0
    return {"images": len(images), "images_per_second": len(images) / seconds, "receiver_mb": memory}


def measure_start(options: argparse.Namespace, folder: Path) -> Figures:
    """Measure the time from the command to the first accepted association, with a long journal."""
    spool = Spool(folder / "spool")
    spool.create()
    journal = Journal(spool.journal)
    with journal.transaction():
        for number in range(options.journal):
            instance = ReceivedInstance(series=f"s{number}", sop=f"a{number}", sha256="", n_bytes=0, peer="p")
            journal_add(journal, instance)
    journal.close()
    start = time.monotonic()
    with node(options.package, folder):
        return {"series": options.journal, "seconds": time.monotonic() - start}


def journal_add(journal: Journal, instance: ReceivedInstance) -> None:
    """Add an answered series inside an open transaction, without a commit of its own."""
    now = time.time()
    journal.query(
        "INSERT INTO instance VALUES (?, ?, '', 0, 'p', NULL, ?) RETURNING sop", instance.sop, instance.series, now
    )
    journal.query(
        "INSERT INTO series (key, state, first_at, last_at, is_object) VALUES (?, 'purged', ?, ?, 0) RETURNING key",
        *(instance.series, now, now),
    )


def measure_garbage(options: argparse.Namespace, folder: Path) -> Figures:
    """Measure the slowest C-ECHO while connections are silent or send random bytes, and the growth of memory."""
    rng = random.Random(options.seed)
    with node(options.package, folder) as running:
        receiver = running.find_process("receiver") or 0
        before, slowest, n_failed = read_memory(receiver), 0.0, 0
        silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(options.connections)]
        for number in range(options.connections):
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(
                    bytes([rng.choice([1, 4, 7, rng.randrange(256)])]) + rng.randbytes(rng.randrange(500))
                )
            if number % 10 == 0:
                seconds = time_echo(running.port)
                n_failed += seconds is None
                slowest = max(slowest, seconds or 0.0)
        for connection in silent:
            connection.close()
        time.sleep(15)
        is_same = receiver == running.find_process("receiver")
        growth = read_memory(receiver) - before if is_same else float("nan")
    return {
        "connections": 2 * options.connections,
        "slowest_echo_seconds": slowest,
        "echoes_failed": n_failed,
        "growth_mb": growth,
        "restarts": int(not is_same),
    }


def time_echo(port: int) -> float | None:
    """Measure the seconds until the response to a C-ECHO; None without one."""
    start = time.monotonic()
    entity = AE("SCANNER")
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", port, ae_title="MEDIM")
    if not association.is_established:
        return None
    association.send_c_echo()
    association.release()
    return time.monotonic() - start


def measure_destination(options: argparse.Namespace, folder: Path) -> Figures:
    """Count the deliveries to a destination that is down at first, and the delay of another one."""
    crop, n_series = read_crop(options.data), 4
    down = Archive()
    with Archive() as archive:
        words = [*forward_to(archive), *forward_to(down)]
        with node(options.package, folder, *words) as running:
            start = time.monotonic()
            for number in range(n_series):
                send_all(renew_uids(crop, number), running.port)
            wait_for(lambda: len(archive.objects) == 2 * n_series, 300)
            other_seconds = time.monotonic() - start
            time.sleep(max(options.down - other_seconds, 0.0))
            with down:
                wait_for(lambda: len(down.objects) == 2 * n_series, 900)
    return {
        "series": n_series,
        "down_seconds": max(options.down, other_seconds),
        "other_destination_seconds": other_seconds,
        "objects": len(down.objects),
        "deliveries": sum(down.deliveries.values()),
    }


def forward_to(archive: Archive) -> tuple[str, str]:
    """Options of a destination."""
    return "--forward", f"ARCHIVE@127.0.0.1:{archive.port}"


def read_memory(process: int) -> float:
    """Read the resident memory of a process in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
