"""Worker of a node: predicts one series at a time with the package, and puts the answer into the outbox.

The process has a memory limit, and a time limit per series. A crash costs one attempt of one series.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from medim.data.index.index import AllRejectedError
from medim.data.readers.dicom.header_scan import scan_header
from medim.data.readers.sandbox import sandboxed_decoding
from medim.node.deliveries import AnswerFile, commit_answers, list_earlier_reports
from medim.node.event_log import log_failure
from medim.node.journal import Journal
from medim.node.predecessor import add_predecessor
from medim.node.series import ClaimedSeries, make_key
from medim.node.settings import NodeSettings
from medim.node.spool import Spool, hash_dataset
from medim.package.package import Package
from medim.predict.dicom.uids import deterministic_uids
from medim.predict.images import DEFAULT_LIMITS
from medim.predict.predict import predict
from medim.types import UserError

TIMEOUT_EXIT_CODE = 70
_IDLE_SECONDS = 0.2  # seconds between two looks at the journal


class SpoolDamageError(Exception):
    """A file of the spool is missing, or its content has changed since its arrival."""


class Worker:
    """Predicts the series that are ready.

    Args:
        name: name of the worker, unique in the node.
        settings: settings of the node.
        package: verified package.
        spool: folder of the files.
        journal: journal of the node.
    """

    def __init__(self, name: str, settings: NodeSettings, package: Package, spool: Spool, journal: Journal) -> None:
        self._name, self._settings, self._package = name, settings, package
        self._spool, self._journal = spool, journal

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Predict series until `is_stopped`."""
        limit_memory(self._settings.memory_bytes)
        self.fail_interrupted()
        with sandboxed_decoding(DEFAULT_LIMITS):  # one decoding process for all series
            while not is_stopped():
                try:
                    is_idle = not self.answer_next()
                except (sqlite3.Error, OSError) as error:  # a locked journal, a full disk
                    log_failure("worker-failed", error)
                    is_idle = True
                if is_idle:
                    time.sleep(_IDLE_SECONDS)

    def fail_interrupted(self) -> None:
        """Count the attempts that ended with the last process of this name as failed."""
        for series in self._journal.list_claims(self._name):
            self._fail(series.key, series.tries, "worker-died")

    def answer_next(self) -> bool:
        """Predict the oldest series that is ready; return whether there was one."""
        claim = self._journal.claim_series(self._name)
        if claim is None:
            return False
        timer = threading.Timer(self._settings.series_seconds, self._exit_late, [claim])
        timer.daemon = True
        timer.start()
        try:
            self._answer(claim)
        finally:
            timer.cancel()
        return True

    def _answer(self, claim: ClaimedSeries) -> None:
        """Predict a series and commit the answer, or the reason why there is none."""
        work = self._spool.work / self._name
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        try:
            paths = self._check_files(claim)
            work.mkdir(mode=0o700)
            with deterministic_uids(f"{claim.key}/{claim.set_sha}/{self._package.sha256}"):
                rows = predict(self._package, paths, work / "answer", output_format="dicom")
            names = [str(row[column]) for row in rows for column in ("file", "report") if row.get(column)]
            answer_paths = [work / "answer" / name for name in names]
            self._refer_to_earlier(claim, answer_paths)
            files = self._move_to_outbox(answer_paths)
            destinations = [str(destination) for destination in self._settings.forward]
            commit_answers(self._journal, self._name, claim, self._package.sha256, files, destinations)
        except AllRejectedError as error:
            self._journal.end_claim(self._name, claim.key, "rejected", _find_reason(error))
        except SpoolDamageError:
            self._journal.end_claim(self._name, claim.key, "held", "damaged-spool")
        except UserError as error:
            log_failure("prediction-refused", error)
            self._journal.end_claim(self._name, claim.key, "rejected", "refused")
        except MemoryError:
            self._fail(claim.key, claim.tries, "too-much-memory")
        except Exception as error:  # one series must not stop the node
            log_failure("prediction-failed", error)
            self._fail(claim.key, claim.tries, type(error).__name__)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _check_files(self, claim: ClaimedSeries) -> Sequence[Path]:
        """List the images of a series, after comparing their digests with those at their arrival.

        Raises:
            SpoolDamageError: a file is missing or has changed.
        """
        paths = {sop: self._spool.locate_instance(claim.key, sop) for sop in sorted(claim.digests)}
        for sop, path in paths.items():
            try:
                digest = hash_dataset(path, scan_header(path, frozenset()).syntax)
            except (OSError, UserError) as error:
                raise SpoolDamageError(sop) from error
            if digest != claim.digests[sop]:
                raise SpoolDamageError(sop)
        return list(paths.values())

    def _refer_to_earlier(self, claim: ClaimedSeries, paths: Sequence[Path]) -> None:
        """Let the reports name the reports about an earlier set of images of the series, in the same order."""
        earlier_names = list_earlier_reports(self._journal, claim.key, claim.set_sha)
        reports = [path for path in paths if path.name.endswith(".sr.dcm")]
        for path, name in zip(reports, earlier_names, strict=False):
            if self._spool.locate_answer(name).is_file():
                add_predecessor(path, self._spool.locate_answer(name))

    def _move_to_outbox(self, paths: Sequence[Path]) -> list[AnswerFile]:
        """Move the objects of an answer to the outbox, under the names of their SOPInstanceUIDs."""
        files = []
        for number, path in enumerate(paths):
            uid = scan_header(path, frozenset(("SOPInstanceUID",))).header.text("SOPInstanceUID")
            kind = "seg" if path.name.endswith(".seg.dcm") else "sr"
            files.append(AnswerFile(name=uid, kind=f"{kind}-{number}", sop=make_key(uid)))
            if not self._spool.locate_answer(uid).exists():  # bytes that may have been sent are not replaced
                self._spool.store_answer(path, uid)
        return files

    def _fail(self, key: str, n_failures: int, reason: str) -> None:
        """Schedule the next attempt at a series, or give it up."""
        delays = self._settings.retry_seconds
        if n_failures < len(delays):
            self._journal.end_claim(self._name, key, "ready", reason, delay=delays[n_failures])
        else:
            self._journal.end_claim(self._name, key, "dead", reason, delay=0.0)

    def _exit_late(self, claim: ClaimedSeries) -> None:
        """End the process after the time limit, so that the supervisor starts a new one."""
        self._fail(claim.key, claim.tries, "too-slow")
        os._exit(TIMEOUT_EXIT_CODE)


def limit_memory(n_bytes: int) -> None:
    """Limit the address space of this process."""
    import resource

    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    limit = n_bytes if hard_limit == resource.RLIM_INFINITY else min(n_bytes, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))


def _find_reason(error: AllRejectedError) -> str:
    """Return the code of the first rejection that is not about a duplicate."""
    reasons = [rejection.reason for rejection in error.index.rejected]
    return next((reason for reason in reasons if reason != "duplicate"), "no-image")
