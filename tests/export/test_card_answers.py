from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from medim.cli import app
from medim.export.builder import ExportOptions, create_builder
from medim.export.card_answers import MAX_TEXT_LENGTH, read_card_answers
from medim.export.checks import check_privacy
from medim.export.run import load_finished_run
from medim.package.contract import NOT_REPORTED
from medim.package.model_card import CARD_FILE, FIELDS, parse_model_card
from medim.package.package import load_package
from medim.types import UsageError, UserError

TEMPLATE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "fill-model-card.md"


def write_card(folder: Path, text: str) -> Path:
    path = folder / "card.yaml"
    path.write_text(text)
    return path


def read_template() -> dict[str, dict[str, str]]:
    (block,) = re.findall(r"<!-- template -->\n```yaml\n(.*?)```", TEMPLATE.read_text(), re.DOTALL)
    content: dict[str, dict[str, str]] = yaml.safe_load(block)
    return content


def test_the_template_of_the_docs_fills_each_field_that_no_run_determines(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    template = read_template()
    answers = {section: {name: f"answer to {name}" for name in fields} for section, fields in template.items()}
    card = write_card(tmp_path, yaml.safe_dump(answers))
    for kind, run in runs.items():
        finished = load_finished_run(run)
        empty = create_builder(finished, ExportOptions()).build_card()
        filled = create_builder(finished, ExportOptions(card=card, licence=card)).build_card()
        n_answers = sum(map(len, template.values()))
        assert empty.not_reported - filled.not_reported == n_answers + 1, kind  # and the licence
        for section, fields in answers.items():
            for name, answer in fields.items():
                assert empty.sections[section][name] == NOT_REPORTED
                assert filled.sections[section][name] == answer
    assert create_builder(finished, ExportOptions(card=card)).contract.intended_use == "answer to intended use"
    open_fields = {
        (s, n) for s, fields in filled.sections.items() for n, value in fields.items() if value == NOT_REPORTED
    }
    assert all(name not in template.get(section, {}) for section, name in open_fields)


def test_an_empty_template_answers_nothing(tmp_path: Path) -> None:
    assert read_card_answers(write_card(tmp_path, yaml.safe_dump(read_template()))) == {}


def test_values_are_text_numbers_or_lists_of_these(tmp_path: Path) -> None:
    text = "Data:\n  sample size: 400\n  dates: 2019 to 2024\n  sources and sites: [Site A, Site B, 3]\n"
    answers = {"sample size": 400, "dates": "2019 to 2024", "sources and sites": "Site A; Site B; 3"}
    assert read_card_answers(write_card(tmp_path, text)) == {"Data": answers}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Date:\n  dates: x\n", "no section 'Date' in a model card. Did you mean 'Data'?"),
        ("Data:\n  age and sexes: x\n", "no field 'age and sexes' in section Data. Did you mean 'age and sex'?"),
        ("Data:\n  1: x\n", "no field 1 in section Data."),
        ("Data: x\n", "Data: expected fields with their values, got 'x'"),
        ("- x\n", "expected a YAML mapping, got list"),
        ("Data:\n  dates: yes\n", "Data: dates: expected text, a number or a list of these, got True"),
        ("Data:\n  dates: 2019-01-01\n", "Data: dates: expected text, a number or a list"),
        ("Data:\n  dates: {from: 1}\n", "Data: dates: expected text, a number or a list"),
        ('Data:\n  dates: "a\\e[31m"\n', r"expected text without control characters, got '\x1b'"),
        ('Data:\n  dates: "a\\tb"\n', "without control characters"),
        ("Data:\n  dates: '  '\n", "of 1 to 5000 characters, got 0."),
        (f"Data:\n  dates: {'x' * (MAX_TEXT_LENGTH + 1)}\n", "got 5001."),
        ("Data:\n  dates: x\n  dates: y\n", "dates"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused_by_file_section_and_field(
    text: str, message: str, tmp_path: Path
) -> None:
    card = write_card(tmp_path, text)
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        read_card_answers(card)
    assert str(card) in str(error.value)


def test_a_field_that_the_run_determines_cannot_be_answered(runs: dict[str, Path], tmp_path: Path) -> None:
    finished = load_finished_run(runs["classifier"])
    for field in ("kind: chatbot", "weights (sha256): ab"):
        card = write_card(tmp_path, f"Model:\n  {field}\n")
        with pytest.raises(UsageError, match=f"Model: {re.escape(field.split(':')[0])}: the run or another option"):
            create_builder(finished, ExportOptions(card=card))
    card = write_card(tmp_path, "Intended use:\n  not for: nothing\n")
    with pytest.raises(UsageError, match="not for: the run or another option determines this field"):
        create_builder(finished, ExportOptions(card=card))
    card = write_card(tmp_path, "Intended use:\n  intended use: triage\n")
    with pytest.raises(UsageError, match="the intended use is also given by --intended-use"):
        create_builder(finished, ExportOptions(card=card, intended_use="triage"))


def test_the_names_of_authors_are_no_leak_in_the_card_and_one_elsewhere(tmp_path: Path) -> None:
    for file in (CARD_FILE, "medim.json"):
        (tmp_path / file).write_text("by quillon, in /home/quillon/run")
    texts = {CARD_FILE: "authors: quillon"}
    gate = check_privacy(tmp_path, {"quillon"}, "", {}, texts)
    assert gate["found"] == {CARD_FILE: ["/home/quillon/run"], "medim.json": ["/home/quillon/run", "quillon"]}


@pytest.mark.slow
def test_the_command_writes_the_answers_into_the_package(runs: dict[str, Path], tmp_path: Path) -> None:
    card = write_card(tmp_path, "Identity:\n  authors: [Ada Zyx, Bo Quillon]\nData:\n  sample size: 400\n")
    licence = tmp_path / "licence.txt"
    licence.write_text("For the partners of the trial only.\n")
    package = tmp_path / "package"
    options = ["--card", card, "--licence", licence, "--intended-use", "Triage of films", "--name", "triage"]
    command = ["export", runs["classifier"], "--out", package, *options, "--version", "1.2.0"]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    contents = load_package(package)
    fields = parse_model_card(contents.read_file(CARD_FILE))
    assert (contents.contract.name, contents.contract.version) == ("triage", "1.2.0")
    assert fields.sections["Identity"]["authors"] == "Ada Zyx; Bo Quillon"
    assert (fields.sections["Data"]["sample size"], fields.sections["Identity"]["licence"]) == (400, "see LICENSE")
    assert f"{fields.not_reported} not reported" in done.output
    assert json.loads((package / "configs" / "metadata.json").read_text())["intended_use"] == "Triage of films"
    assert contents.read_file("LICENSE") == licence.read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--card", "none.yaml"], 2, "none.yaml: cannot be read"),
        (["--licence", "none.txt"], 1, "none.txt: cannot be read"),
        (["--intended-use", " "], 2, "--intended-use: expected text"),
    ],
)
def test_a_wrong_option_leaves_no_package(
    options: list[str], code: int, message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["export", str(runs["encoder"]), "--out", str(tmp_path / "package"), *options])
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert list(tmp_path.iterdir()) == []


def test_every_section_has_a_field_of_the_template() -> None:
    assert set(read_template()) == set(FIELDS) - {"Training"}


def test_a_licence_that_is_no_text_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "licence").write_bytes(b"\xff\xfe")
    options = ["--out", str(tmp_path / "package"), "--licence", str(tmp_path / "licence")]
    done = CliRunner().invoke(app, ["export", str(runs["encoder"]), *options])
    assert (done.exit_code, "expected text in UTF-8" in done.output) == (1, True)
    with pytest.raises(UserError):
        load_package(tmp_path / "package")
