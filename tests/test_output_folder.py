"""Locks, replacement and recovery of output folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from medim import output_folder as module
from medim.output_folder import (
    MARKER,
    STAGING,
    is_result_folder,
    output_folder,
    read_record,
    record_output_file,
    write_rejection_file,
)
from medim.types import UserError

RUN = ("config.yaml", "checkpoints/*", "summary.json")


def list_files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def write_result(out: Path, text: str = "new", *, command: str = "index", **options: object) -> None:
    with output_folder(out, command, **options) as folder:  # type: ignore[arg-type]
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / f"{text}.txt").write_text(text)
        (folder / "summary.json").write_text(text)


def test_a_new_folder_is_created_with_its_parents_and_contains_the_result(tmp_path: Path) -> None:
    write_result(tmp_path / "a" / "b")
    assert list_files(tmp_path / "a" / "b") == {"sub/new.txt": "new", "summary.json": "new"}
    record = read_record(tmp_path / "a" / "b")
    assert record is not None
    assert (record.command, record.state, record.files) == ("index", "complete", ("sub/new.txt", "summary.json"))


def test_an_empty_folder_is_a_new_one_and_may_be_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_result(Path())
    write_result(Path(), "second", overwrite=True)
    assert list_files(tmp_path) == {"sub/second.txt": "second", "summary.json": "second"}


def fail_half_way(out: Path, **options: object) -> None:
    with output_folder(out, "index", **options) as folder:  # type: ignore[arg-type]
        (folder / "summary.json").write_text("half")
        raise ZeroDivisionError


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_half_way(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError):
        fail_half_way(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("direct_files", [(), RUN], ids=["staged", "direct"])
def test_a_failure_leaves_the_earlier_result_as_it_was(tmp_path: Path, direct_files: tuple[str, ...]) -> None:
    write_result(tmp_path / "out", "old")
    before = list_files(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(tmp_path / "out", overwrite=True, direct_files=direct_files)
    assert {k: v for k, v in list_files(tmp_path / "out").items() if STAGING not in k} == before
    assert (tmp_path / "out" / STAGING).exists() == bool(direct_files), "only --resume could use it"


def test_content_is_replaced_only_on_request(tmp_path: Path) -> None:
    write_result(tmp_path / "out", "old")
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        write_result(tmp_path / "out")
    write_result(tmp_path / "out", overwrite=True)
    assert list_files(tmp_path / "out") == {"sub/new.txt": "new", "summary.json": "new"}


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"Use another|Empty the folder yourself"):
            write_result(tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]
    write_result(tmp_path / "out", "old")
    (tmp_path / "out" / "sub" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"would delete sub/thesis\.tex, which `medim index` did not write"):
        write_result(tmp_path / "out", overwrite=True)
    assert list_files(tmp_path / "out")["sub/thesis.tex"] == "precious"
    (tmp_path / "out" / "sub" / "thesis.tex").rename(tmp_path / "out" / ".DS_Store")
    write_result(tmp_path / "out", overwrite=True)


def test_a_result_of_another_command_is_neither_replaced_nor_continued(tmp_path: Path) -> None:
    write_result(tmp_path / "out", "old", command="pretrain")
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match=r"contains one of `medim pretrain`"):
            write_result(tmp_path / "out", command="evaluate", **options)
    assert list_files(tmp_path / "out")["summary.json"] == "old"


def test_an_input_of_the_command_is_not_replaced(tmp_path: Path) -> None:
    write_result(tmp_path / "out", "old")
    for path in (tmp_path / "out", tmp_path / "out" / "sub"):
        with pytest.raises(UserError, match="an input of this command"):
            write_result(tmp_path / "out", overwrite=True, inputs=[path])
    write_result(tmp_path / "out", overwrite=True, inputs=[tmp_path])


def test_a_folder_of_an_earlier_version_is_replaced_only_if_all_files_are_those_of_a_run(tmp_path: Path) -> None:
    (tmp_path / MARKER).touch()
    (tmp_path / "summary.json").write_text("old")
    with pytest.raises(UserError, match="without a list of its files"):
        write_result(tmp_path, overwrite=True)
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"would delete notes\.txt"):
        write_result(tmp_path, overwrite=True, direct_files=RUN)
    (tmp_path / "notes.txt").unlink()
    write_result(tmp_path, overwrite=True, direct_files=RUN)
    assert list_files(tmp_path)["summary.json"] == "new"


def test_a_run_is_written_to_a_new_folder_itself_and_continued_there(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), output_folder(tmp_path / "out", "pretrain", direct_files=RUN) as folder:
        assert folder == tmp_path / "out"
        (folder / "config.yaml").write_text("x")
        raise KeyboardInterrupt
    with output_folder(tmp_path / "out", "pretrain", resume=True, direct_files=RUN) as folder:
        assert (folder / "config.yaml").read_text() == "x"
    record = read_record(tmp_path / "out")
    assert record is not None
    assert (record.state, record.files) == ("complete", ("config.yaml",))


def test_files_added_to_a_run_before_it_is_continued_do_not_become_its_own(tmp_path: Path) -> None:
    with output_folder(tmp_path, "pretrain", direct_files=RUN) as folder:
        (folder / "config.yaml").write_text("x")
    (tmp_path / "thesis.tex").write_text("precious")
    with output_folder(tmp_path, "pretrain", resume=True, direct_files=RUN):
        pass
    with pytest.raises(UserError, match=r"thesis\.tex"):
        write_result(tmp_path, command="pretrain", overwrite=True, direct_files=RUN)


def test_an_interrupted_replacement_of_a_run_is_continued(tmp_path: Path) -> None:
    write_result(tmp_path, "old", command="pretrain", direct_files=RUN)
    with (
        suppress(KeyboardInterrupt),
        output_folder(tmp_path, "pretrain", overwrite=True, direct_files=(*RUN, "sub/*")) as folder,
    ):
        (folder / "config.yaml").write_text("second")
        raise KeyboardInterrupt
    with output_folder(tmp_path, "pretrain", resume=True, direct_files=(*RUN, "sub/*")) as folder:
        assert list_files(folder) == {"config.yaml": "second"}
    assert list_files(tmp_path) == {"config.yaml": "second"}


def test_a_resumable_half_is_neither_lost_nor_taken_for_a_result(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), output_folder(tmp_path / "out", "predict", resumable=True) as folder:
        (folder / "answer").write_text("1")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []
    with pytest.raises(UserError, match="--resume"):
        write_result(tmp_path / "out", command="predict", resumable=True)
    with output_folder(tmp_path / "out", "predict", resume=True, resumable=True) as folder:
        assert list_files(folder) == {"answer": "1"}
    assert list_files(tmp_path / "out") == {"answer": "1"}


def test_a_kill_at_any_step_of_the_exchange_loses_neither_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """A kill: nothing after it runs."""

    def count_steps(limit: int) -> Callable[[], None]:
        steps = iter(range(limit))

        def take_step() -> None:
            if next(steps, None) is None:
                raise Killed

        return take_step

    def patch(take_step: Callable[[], None]) -> None:
        for owner, name in ((Path, "rename"), (Path, "rmdir"), (module, "_write_record")):
            original = getattr(owner, name)

            def run(*args: object, _original: Callable[..., object] = original, **kwargs: object) -> object:
                take_step()
                return _original(*args, **kwargs)

            monkeypatch.setattr(owner, name, run)

    old = {"sub/old.txt": "old", "summary.json": "old"}
    new = {"sub/new.txt": "new", "summary.json": "new"}
    outcomes = set()
    for limit in range(30):
        out = tmp_path / str(limit)
        write_result(out, "old")
        with monkeypatch.context() as context:
            monkeypatch = context
            patch(count_steps(limit))
            is_killed = False
            try:
                write_result(out, overwrite=True)
            except Killed:
                is_killed = True
        with suppress(UserError, KeyboardInterrupt), output_folder(out, "index", overwrite=True):
            raise KeyboardInterrupt  # any later command, which itself changes nothing, finishes the exchange
        content = list_files(out)
        assert content in (old, new), (limit, content)
        outcomes.add((is_killed, content == new))
        if not is_killed:
            break
    assert outcomes == {(True, False), (True, True), (False, True)}


def test_two_commands_in_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from medim.output_folder import output_folder
from medim.types import UserError
try:
    with output_folder(Path({str(tmp_path / "out")!r}), "index", overwrite=True, resume="resume" in sys.argv):
        print("entered")
except UserError as error:
    print(error)
"""
    with output_folder(tmp_path / "out", "index") as folder:
        (folder / "summary.json").write_text("first")
        for arguments in ([], ["resume"]):
            answer = subprocess.run(
                [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
            )
            assert f"another medim command (process {os.getpid()}) is writing to this folder" in answer.stdout
    assert list_files(tmp_path / "out") == {"summary.json": "first"}


def test_the_lock_of_a_killed_command_is_released(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from medim.output_folder import output_folder
with output_folder(Path({str(tmp_path / "out")!r}), "index") as folder:
    (folder / "half").write_text("x")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    write_result(tmp_path / "out")
    assert list_files(tmp_path / "out") == {"sub/new.txt": "new", "summary.json": "new"}


def test_a_rejection_is_written_beside_an_earlier_result_and_replaced_without_a_flag(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("reasons")

    write_rejection_file(tmp_path / "out", "index", write)
    assert list_files(tmp_path / "out") == {"rejected.csv": "reasons"}
    write_result(tmp_path / "out")
    assert list_files(tmp_path / "out") == {"sub/new.txt": "new", "summary.json": "new"}
    write_rejection_file(tmp_path / "out", "index", write)
    assert list_files(tmp_path / "out") == {"sub/new.txt": "new", "summary.json": "new"}
    assert (tmp_path / "out.rejected.csv").read_text() == "reasons"


def test_a_page_that_is_added_later_belongs_to_the_result(tmp_path: Path) -> None:
    write_result(tmp_path / "out", "old")
    (tmp_path / "out" / "report.html").write_text("page")
    record_output_file(tmp_path / "out" / "report.html")
    write_result(tmp_path / "out", overwrite=True)
    assert "report.html" not in list_files(tmp_path / "out")


def test_results_are_no_sources_but_cohorts_and_foreign_folders_are(tmp_path: Path) -> None:
    write_result(tmp_path / "answers", command="predict")
    write_result(tmp_path / "cohort", command="example")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / MARKER).touch()
    assert is_result_folder(tmp_path / "answers")
    assert [name for name in ("cohort", "old", "none") if is_result_folder(tmp_path / name)] == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"command": 1}', json.dumps({"files": 3}).encode()])
def test_a_damaged_record_protects_the_folder(tmp_path: Path, content: bytes) -> None:
    write_result(tmp_path / "out", "old")
    (tmp_path / "out" / MARKER).write_bytes(content)
    with pytest.raises(UserError, match="without a list of its files"):
        write_result(tmp_path / "out", overwrite=True)
    assert list_files(tmp_path / "out")["summary.json"] == "old"


def test_a_file_in_the_way_and_a_folder_that_cannot_be_created_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="got a file"):
        write_result(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"run: could not be written .*Choose another --out"):
        write_result(tmp_path / "file" / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="could not be written"):
        write_result(tmp_path / "out")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_lock_ends_with_the_command_although_a_forked_process_is_still_there(tmp_path: Path) -> None:
    end = multiprocessing.get_context("fork").Event()
    with output_folder(tmp_path / "out", "index") as folder:
        (folder / "summary.json").write_text("first")
        loader = multiprocessing.get_context("fork").Process(target=end.wait)
        loader.start()
    write_result(tmp_path / "out", overwrite=True)
    end.set()
    loader.join()
    assert list_files(tmp_path / "out")["summary.json"] == "new"


START = ("config.yaml", "figures/views.png")


def start_run(out: Path, *files: str, command: str = "pretrain") -> None:
    with suppress(RuntimeError), output_folder(out, command, direct_files=RUN, start_files=START) as folder:
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("first")
        raise RuntimeError("no device")


def test_a_folder_without_a_checkpoint_and_a_result_is_taken_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    start_run(out, "config.yaml", "figures/views.png", ".config.yaml.0.medim-part")
    with output_folder(out, "pretrain", direct_files=RUN, start_files=START) as folder:
        assert folder == out
        assert list_files(out) == {}
        (folder / "summary.json").write_text("second")
    assert list_files(out) == {"summary.json": "second"}


@pytest.mark.parametrize(
    ("files", "command"),
    [
        (("config.yaml", "checkpoints/step-5.ckpt"), "pretrain"),
        (("config.yaml", "notes.txt"), "pretrain"),
        (("config.yaml",), "finetune"),
        (("summary.json",), "pretrain"),
        (("config.yaml", "figures/notes.png"), "pretrain"),
    ],
    ids=["checkpoint", "foreign file", "other command", "summary", "foreign figure"],
)
def test_a_folder_with_anything_else_is_not_taken_again(tmp_path: Path, files: tuple[str, ...], command: str) -> None:
    start_run(tmp_path / "run", *files, command=command)
    with (
        pytest.raises(UserError, match="expected an empty or new folder"),
        output_folder(tmp_path / "run", "pretrain", direct_files=RUN, start_files=START),
    ):
        pass
    assert list_files(tmp_path / "run") == dict.fromkeys(sorted(files), "first")


def test_a_file_that_the_user_added_to_an_attempt_is_not_removed(tmp_path: Path) -> None:
    start_run(tmp_path / "run", "config.yaml")
    (tmp_path / "run" / "figures").mkdir()
    (tmp_path / "run" / "figures" / "views.png").write_text("precious")
    with pytest.raises(UserError, match="expected an empty or new folder"):
        write_result(tmp_path / "run", command="pretrain", direct_files=RUN, start_files=START)
    assert list_files(tmp_path / "run") == {"config.yaml": "first", "figures/views.png": "precious"}


def test_a_complete_run_of_start_files_only_is_a_result(tmp_path: Path) -> None:
    with output_folder(tmp_path / "run", "pretrain", direct_files=RUN, start_files=START) as folder:
        (folder / "config.yaml").write_text("complete")
    with (
        pytest.raises(UserError, match="expected an empty or new folder"),
        output_folder(tmp_path / "run", "pretrain", direct_files=RUN, start_files=START),
    ):
        pass
