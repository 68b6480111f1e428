from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from medim.cli import app
from medim.files import read_json, write_json
from medim.reports.figures import wilson_interval
from medim.study.comparisons import build_comparisons
from medim.study.report.methods import fill_checklists
from medim.study.report.report import is_study, write_study_page
from medim.study.results_table import SCHEMA
from medim.types import UserError
from tests.reports.test_report import CHROMIUM, DOWNLOADS, Page
from tests.study.report.conftest import audit_of

Study = Callable[..., Path]
TITLES = [
    "Benefit of pretraining",
    "Validity checks",
    "Cohort and splits",
    "Results by arm and budget",
    "Curves",
    "Pretraining runs",
    "Leakage and shortcuts",
    "Worst cases",
    "Methods and reproduction",
]


@pytest.fixture(scope="module")
def page(planted: Path) -> Path:
    return write_study_page(planted)


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return page.read_text()


def banner(html: str, section: str) -> tuple[str, str, str]:
    """State, headline and text of a section's banner."""
    found = re.search(
        rf'<section id="{section}".*?<div class="banner (\w+)">\s*<p class="headline">(.*?)</p>\s*<p>(.*?)</p>',
        html,
        flags=re.DOTALL,
    )
    assert found
    return found[1], found[2], found[3]


def change(folder: Path, **facts: Any) -> Path:
    write_json(folder / "summary.json", {**read_json(folder / "summary.json"), **facts})
    return folder


def test_the_page_has_its_parts_in_order_and_refers_to_nothing_but_itself(html: str) -> None:
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html) == TITLES
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {one.split(",")[0] for one in page.references if not one.startswith("#")} == {"data:", *DOWNLOADS}
    assert {one[1:] for one in page.references if one.startswith("#")} <= set(page.ids)
    assert "script" not in page.tags


def test_a_planted_benefit_is_told_in_labels(html: str) -> None:
    state, headline, text = banner(html, "verdict")
    assert state == "good"
    told = re.fullmatch(r"With 5 labels and the encoder you get what (\d+) labels \(.+\) give without\.", headline)
    assert told
    assert 15 <= int(told[1]) <= 27  # from scratch reaches it with 20
    assert text.startswith("dim, Dice, mean over classes: +0.")
    assert "3 comparisons of fine-tuned arms (Holm)" in text


def test_a_planted_null_is_no_evidence_of_a_benefit(study_of: Study) -> None:
    state, headline, text = banner(write_study_page(study_of(0.0)).read_text(), "verdict")
    assert (state, headline) == ("care", "No evidence of a benefit")
    assert text.startswith("No evidence of a benefit with ")


def test_harm_at_another_budget_and_labels_that_no_budget_paid_make_a_benefit_doubtful(study_of: Study) -> None:
    folder = study_of(0.1)
    assert banner(write_study_page(folder).read_text(), "verdict")[0] == "good"
    change(folder, n_selection_labels={"dim": 60})
    state, _, text = banner(write_study_page(folder).read_text(), "verdict")
    assert state == "care"
    assert "Labels outside the budgets selected the pretraining step of: dim (60)" in text
    found = read_json(folder / "summary.json")["comparisons"]
    found["rows"][-1]["verdict"] = "harm"
    change(folder, n_selection_labels={}, comparisons=found)
    state, _, text = banner(write_study_page(folder).read_text(), "verdict")
    assert (state, "Pretraining is worse than from scratch for: dim with 80 labels." in text) == ("care", True)


def test_a_study_of_an_earlier_metric_rule_is_named_and_states_no_penalty_of_misses(study_of: Study, html: str) -> None:
    penalty = "A missed structure counts with the diagonal of its image as distance."
    assert penalty in html
    assert "Metric rule 1" not in html
    folder = study_of(0.1)
    change(folder, metric_rule=1)
    old = write_study_page(folder).read_text()
    state, _, text = banner(old, "verdict")
    assert (state, "Metric rule 1, of an earlier version" in text) == ("care", True)
    assert penalty not in old


def test_cells_that_lost_a_class_are_counted_and_make_a_benefit_doubtful(study_of: Study) -> None:
    folder = study_of(0.1)
    title = "Fine-tuned cells whose model does not find some class"
    assert title not in write_study_page(folder).read_text()  # a study of an earlier version
    change(folder, lost_classes=[])
    html = write_study_page(folder).read_text()
    assert banner(html, "verdict")[0] == "good"
    assert title in html
    change(
        folder,
        lost_classes=[{"cell": "scratch, 5 labels, encoder 0, subset 0", "classes": {"front": 0.0, "back": 0.06}}],
    )
    html = write_study_page(folder).read_text()
    for section in ("verdict", "counts"):
        state, _, text = banner(html, section)
        assert (state, "1 fine-tuned cell does not find some class" in text) == ("care", True)
    assert "Cells that lost a class" in html
    assert "6 %" in html


def test_one_run_against_one_run_makes_a_benefit_doubtful(study_of: Study) -> None:
    folder = study_of(0.1)
    found = read_json(folder / "summary.json")["comparisons"]
    for row in found["rows"]:
        row["difference"]["seeds"] = 1
    change(folder, comparisons=found)
    state, _, text = banner(write_study_page(folder).read_text(), "verdict")
    assert state == "care"
    assert "One encoder is compared with one from-scratch run" in text


def test_an_encoder_that_learnt_nothing_makes_a_benefit_doubtful(study_of: Study) -> None:
    folder = study_of(0.1)
    run = {
        "verdict": "at-chance",
        "steps": 2,
        "loss": {},
        "chance": {},
        "rankme": 2.0,
        "feature_std": 0.1,
        "curves": [],
    }
    arms = {"dim": [run, {**run, "verdict": "learning"}]}
    write_json(folder / "pretraining.json", {"schema_version": 2, "arms": arms})
    state, _, text = banner(write_study_page(folder).read_text(), "verdict")
    assert state == "care"
    assert "Unhealthy runs among 2 pretraining runs of dim: at-chance." in text


def test_an_encoder_without_validation_makes_a_benefit_doubtful_but_is_not_called_unhealthy(study_of: Study) -> None:
    folder = study_of(0.1)
    run = {"verdict": "not-measured", "steps": 2, "loss": {}, "chance": {}, "rankme": None, "feature_std": None}
    arms = {"dim": [{**run, "curves": []}, {**run, "curves": [], "verdict": "learning"}]}
    write_json(folder / "pretraining.json", {"schema_version": 2, "arms": arms})
    html = write_study_page(folder).read_text()
    state, _, text = banner(html, "verdict")
    assert state == "care"
    assert "because they have no validation losses: 1." in text
    assert "Unhealthy" not in text
    assert banner(html, "health")[:2] == ("care", "At least one encoder was not validated")


def test_a_study_that_was_stopped_between_subsets_is_compared_by_what_all_budgets_have(study_of: Study) -> None:
    folder = study_of(0.1)
    table = pq.read_table(folder / "results.parquet")
    later = [row for row in table.to_pylist() if (row["budget"], row["subset_seed"]) != ("20", 1)]
    pq.write_table(pa.Table.from_pylist(later, schema=table.schema), folder / "results.parquet")
    summary = read_json(folder / "summary.json")
    rows = build_comparisons(folder, summary)
    assert rows is not None
    assert [row["labels_saved"] for row in rows["rows"]] == [None] * 3
    change(folder, comparisons=rows)
    write_study_page(folder)


def test_a_planted_harm_is_told_as_harm(study_of: Study) -> None:
    state, headline, _ = banner(write_study_page(study_of(-0.1)).read_text(), "verdict")
    assert state == "bad"
    assert headline.startswith("The encoder does harm: with ")


def test_an_anchor_neither_takes_the_headline_nor_costs_the_encoder_its_correction(study_of: Study, html: str) -> None:
    page = write_study_page(study_of(0.1, anchor=0.3)).read_text()
    assert banner(page, "verdict") == banner(html, "verdict")
    assert "anchor" in page


def test_one_label_curve_of_all_arms_precedes_tables_and_contents_and_details_are_folded(study_of: Study) -> None:
    page = write_study_page(study_of(0.1, anchor=0.05)).read_text()
    assert page.index('<figure class="large">') < min(page.index("<table"), page.index("<nav"))
    first_figure = page.split('<figure class="large">')[1].split("</figure>")[0]
    assert "<figcaption>Dice over labels: all arms<span" in first_figure
    assert re.search(r"<desc[^>]*>Dice\. dim: 0\.\d+ .*; anchor: 0\.\d+ .*; from scratch: 0\.\d+ ", first_figure)
    folded = re.findall(r"<details><summary>([^<]+)</summary>\s*<div[^>]*>\s*<table", page)
    assert folded == [
        "Evaluation images in training data (of 12 images)",
        "Label budgets",
        "Labels and steps saved",
        "All metrics with 80 labels",
        "Learning rates",
    ]
    curves = page.split('id="curves"')[1].split("</section>")[0]
    assert curves.count("<figure") - curves.split("Each arm over labels")[1].count("<figure") == 3  # one per budget


def test_calibration_of_a_study_has_counts_and_wilson_intervals_over_cases(study_of: Study) -> None:
    folder = study_of(0.1, budgets=("20",))
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    rng = np.random.default_rng(0)
    classified = []
    for row in rows:
        if row["metric"] == "dice":
            truth = int(row["case"][-2:]) % 2
            p = float(np.clip(0.3 + 0.4 * truth + rng.normal(0, 0.2), 0.05, 0.95))
            for metric, value in (("truth", float(truth)), ("probability_a", 1 - p), ("probability_b", p)):
                classified.append({**row, "metric": metric, "value": value})
    pq.write_table(pa.Table.from_pylist(classified, schema=SCHEMA), folder / "results.parquet")
    counts = {**read_json(folder / "summary.json")["counts"], "classes": ["a", "b"]}
    change(folder, task="classification", metric="auroc", counts=counts, comparisons=None)
    change(folder, comparisons=build_comparisons(folder, read_json(folder / "summary.json")))
    html = write_study_page(folder).read_text()
    figure = html.split("<figcaption>Calibration of the probabilities with 20 labels")[1].split("</figcaption>")[1]
    figure = figure.split("</figure>")[0]
    bins = re.findall(r"correct (0\.\d\d|1\.00) \((\d\.\d\d) to (\d\.\d\d); (\d+) predictions\)", figure)
    assert sum(int(count) for *_, count in bins) == 2 * 4 * 12  # arms, runs, cases
    for share, low, high, count in bins:
        expected = wilson_interval(float(share) * int(count) / 4, int(count) / 4)
        assert (float(low), float(high)) == pytest.approx(expected, abs=0.03)
        assert f">{count}</text>" in figure
    assert "Wilson intervals, in which each case counts once" in banner(html, "curves")[2]


def test_one_budget_is_told_in_the_metric_because_it_has_no_curve_of_labels(study_of: Study) -> None:
    _, headline, _ = banner(write_study_page(study_of(0.1, budgets=("20",))).read_text(), "verdict")
    expected = r"With 20 labels the pretrained encoder is better: \+0\.\d+ \(.*\) against from scratch\."
    assert re.fullmatch(expected, headline)


def test_every_figure_has_its_words_and_its_numbers(html: str) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", html, flags=re.DOTALL)
    assert len(figures) == 1 + 3 + 1  # over labels, over steps at each budget, by subject
    for figure in figures:
        assert re.search(r'<svg role="img" aria-labelledby="\S+-title \S+-desc"', figure)
        assert re.search(r"<title[^>]*>[^<]{5,}</title><desc[^>]*>[^<]*\d[^<]*</desc>", figure)
    assert re.search(r"dim: 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\) at 5 labels, ", html)


def test_the_table_has_value_difference_p_and_rate_of_every_arm_and_budget(html: str) -> None:
    rows = re.findall(r"<tr role=\"row\">(.*?)</tr>", html, flags=re.DOTALL)
    assert sum('data-head="Difference to scratch"' in row for row in rows) == 6
    assert sum('data-head="p, Holm"' in row and "benefit" in row for row in rows) == 3
    table = html.split("by labels and arm</caption>")[1].split("</table>")[0]
    arms = re.findall(r'role="rowheader">([\w ]+?)(?: <span|</th>)', table)
    assert arms == ["from scratch", "dim"] * 3
    assert "× 1: 0.610, × 3: 0.640" in html


def test_a_study_that_is_not_complete_says_so_first_and_is_never_good(study_of: Study) -> None:
    cells = {"all": 24, "done": 20, "left": ["dim, 80 labels"], "failed": [{"cell": "dim, 5 labels", "reason": "NaN"}]}
    html = write_study_page(change(study_of(0.1), complete=False, cells=cells)).read_text()
    said = "This study is not complete: 20 of 24 cells are done, 1 failed."
    assert banner(html, "verdict")[0] == banner(html, "counts")[0] == "care"
    assert said in banner(html, "verdict")[2]
    assert "NaN" in html


def test_a_study_without_results_has_a_page_that_says_so(study_of: Study) -> None:
    folder = change(
        study_of(0.1), complete=False, comparisons=None, cells={"all": 2, "done": 0, "left": [], "failed": []}
    )
    (folder / "results.parquet").unlink()
    assert banner(write_study_page(folder).read_text(), "verdict")[:2] == ("bad", "No result")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (
            {"pretrain": {"images": 3, "subjects": 2}, "finetune": {"images": 0, "subjects": 0}},
            "Trained on part of the evaluation split: dim.",
        ),
        (None, "Training images not fully recorded: dim."),
    ],
)
def test_contamination_takes_the_green_from_a_benefit(study_of: Study, counts: Any, said: str) -> None:
    html = write_study_page(change(study_of(0.1), contamination={"dim": [counts, counts]})).read_text()
    assert banner(html, "verdict")[0] == "care"
    assert said in banner(html, "verdict")[2]
    assert ("3 images, 2 subjects" in html) == (counts is not None)


@pytest.mark.parametrize(
    ("auroc", "state", "said"),
    [
        ({}, "good", ""),
        ({"raw_size": 0.8, "raw_intensity": 0.8, "input_intensity": 0.8}, "good", ""),  # less than the model
        ({"padding": 0.6}, "care", "can be predicted without the image content, from padding (AUROC 0.600)"),
        ({"input_intensity": 0.88}, "care", "from input intensity (AUROC 0.880)"),  # as well as the model
    ],
)
def test_a_shortcut_takes_the_green_from_a_benefit_where_it_may_be_all_that_was_learnt(
    study_of: Study, auroc: dict[str, float], state: str, said: str
) -> None:
    folder = change(study_of(0.1), task="classification")
    write_json(folder / "audit.json", audit_of(**auroc))
    html = write_study_page(folder).read_text()
    for section in ("verdict", "counts", "leaks"):
        assert banner(html, section)[0] == state
        assert said in " ".join(banner(html, section))
    assert f"{auroc.get('raw_size', 0.5):.3f} (" in html.split("AUROC of the image size alone")[1][:200]
    assert "the best model 0.900 (0.850 to 0.950)" in html


def test_files_that_predict_the_label_are_amber_though_the_network_does_not_see_them(study_of: Study) -> None:
    folder = study_of(0.1)
    write_json(folder / "audit.json", audit_of(raw_intensity=0.95, input_intensity=0.8))
    html = write_study_page(folder).read_text()
    state, headline, text = banner(html, "leaks")
    assert (state, headline) == (
        "care",
        "The files predict the label as well as the best model, by raw intensity (AUROC 0.950)",
    )
    assert "The best model has 0.900 (0.850 to 0.950). The network does not see these values" in text
    assert banner(html, "verdict")[0] == "good"


def test_the_audit_stands_on_the_page_with_its_figure_groups_and_look_alikes(study_of: Study) -> None:
    folder = study_of(0.1)
    write_json(folder / "audit.json", audit_of(input_size=0.8))
    section = write_study_page(folder).read_text().split('id="leaks"')[1].split("</section>")[0]
    assert re.search(r"<desc[^>]*>dim, 80 labels 0\.900 \(0\.850 to 0\.950\); raw size 0\.500", section)
    for text in ("site: north", "too few subjects", "north, south", "image20", "the same for all images"):
        assert text in section
    assert "sex: not probed" in section


def test_a_segmentation_says_that_no_shortcut_was_looked_for_and_one_without_audit_that_nothing_is_known(
    study_of: Study, html: str
) -> None:
    folder = study_of(0.1)
    write_json(folder / "audit.json", {**audit_of(), "shortcuts": [], "groups": [], "probes": []})
    state, _, text = banner(write_study_page(folder).read_text(), "leaks")
    assert (state, "Shortcuts were not tested." in text) == ("plain", True)
    assert "not reported" in write_study_page(folder).read_text().split('id="leaks"')[1].split("</section>")[0]
    assert banner(html, "leaks")[:2] == ("plain", "not reported")


def test_the_checklists_have_every_item_once_and_in_order() -> None:
    items: dict[str, list[str]] = {}
    for checklist, item, *_ in fill_checklists(defaultdict(lambda: None)):
        items.setdefault(checklist, []).append(item)
    assert items["CLAIM 2024"] == [str(n) for n in range(1, 45)]
    tripod = (
        "1 2 3a 3b 3c 4 5a 5b 6a 6b 6c 7 8a 8b 8c 9a 9b 9c 10 11 12a 12b 12c 12d 12e 12f 12g 13 14 15 16 17 18a 18b "
    )
    tripod += "18c 18d 18e 18f 19 20a 20b 20c 21 22 23a 23b 24 25 26 27a 27b 27c"
    assert items["TRIPOD+AI"] == tripod.split()


def test_labels_that_chose_an_encoders_step_stand_in_the_methods(study_of: Study) -> None:
    folder = study_of(0.1)
    assert "a probe with training labels" not in write_study_page(folder).read_text()
    write_json(folder / "summary.json", {**read_json(folder / "summary.json"), "n_selection_labels": {"dim": 60}})
    assert "It was selected by a probe with training labels (their number in brackets) for dim (60)." in (
        write_study_page(folder).read_text()
    )


def test_a_subject_on_two_sides_is_counted(study_of: Study) -> None:
    folder = study_of(0.1)
    with (folder / "splits" / "0.csv").open("a") as file:
        file.write("again,s-000000000000,train,,,\n")
    assert banner(write_study_page(folder).read_text(), "cohort")[0] == "bad"


def test_a_class_that_looks_like_markup_is_text(study_of: Study) -> None:
    html = write_study_page(study_of(0.1, name="<b>")).read_text()
    assert "<b>" not in html
    assert "segmentation of &lt;b&gt; on MRI" in html


def test_the_methods_hold_the_numbers_and_what_is_unknown_is_not_reported(html: str, study_of: Study) -> None:
    text = banner(html, "methods")[2]
    assert text.startswith(
        "We compared networks initialised with the weights of dim (2 pretraining runs) with the same network trained "
        "from random weights. The task was segmentation of cube on MRI. Of 95 files or series, 2 could not be used, "
        "and 1 had no label or mask for this task. "
    )
    assert "No evaluation image had the same pixels as a training image." in text
    assert "axes were reoriented to right, anterior and superior; intensities were normalised (mean 0," in text
    assert (
        "Fine-tuned networks were trained for 40 steps with batches of 2 images using AdamW (peak learning rate before "
        "selection 0.001, weight decay 0.01) and a cosine schedule after a linear warm-up of 4 steps. Training used "
        "nested subsets of 5, 20 and 80 labelled images of whole subjects, with 2 draws of each size."
    ) in text
    assert text.endswith("In total, 24 runs were evaluated with medim 0.1.0.")
    assert "medim study --encoder dim=runs/a,runs/b" in html
    assert "f" * 64 in html
    folder = study_of(0.1)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    head = {**config["head"], "dice": "image", "class_weights": "balanced", "focal_gamma": 2.0}
    views = {**config["views"], "foreground_share": 0.33}
    (folder / "config.yaml").write_text(
        yaml.safe_dump({**config, "head": head, "balanced_batches": True, "views": views})
    )
    assert (
        "; the Dice loss was computed for each image; the focal loss had gamma 2; classes were weighted with weights "
        "from the labelled images; each batch had equally many images of each class; 33 % of the crops were centred on "
        "foreground."
    ) in banner(write_study_page(folder).read_text(), "methods")[2]
    (folder / "config.yaml").unlink()
    text = banner(write_study_page(folder).read_text(), "methods")[2]
    assert "Network, preprocessing and training schedule were not reported." in text


def test_the_same_study_gives_the_same_bytes(page: Path, html: str) -> None:
    assert write_study_page(page.parent).read_text() == html


def test_medim_report_knows_a_study(planted: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(planted)])
    assert (done.exit_code, TITLES[0] in (planted / "report.html").read_text()) == (0, True), done.output
    assert not is_study(tmp_path)
    write_json(tmp_path / "summary.json", {"command": "pretrain"})
    with pytest.raises(UserError, match="expected a study, got pretrain"):
        write_study_page(tmp_path)


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield started
        started.close()


def test_a_browser_shows_the_page_without_error_request_or_overflow(page: Path, browser: Any) -> None:
    for width in (400, 1280):
        tab = browser.new_page(viewport={"width": width, "height": 800})
        said: list[str] = []
        tab.on("console", lambda message, kept=said: kept.append(message.text))
        tab.on("pageerror", lambda error, kept=said: kept.append(str(error)))
        tab.on("request", lambda request, kept=said: kept.append(request.url))
        tab.goto(page.as_uri())
        assert [one for one in said if not one.startswith("data:")] == [page.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.get_by_role("img").count() == tab.locator("figure").count() > 0
        with tab.expect_download() as download:
            tab.get_by_role("link", name="Dice over labels: all arms, CSV").click()
        assert download.value.suggested_filename == "Benefit-of-pretraining-Dice-over-labels-all-arms.csv"
        assert Path(download.value.path()).read_text().startswith("arm,labels,Dice,low,high\ndim,5,0.")
        tab.close()


@pytest.mark.parametrize(("width", "media"), [(700, "print"), (1280, "screen")])
def test_no_table_is_cut_on_paper_or_on_a_screen(study_of: Study, browser: Any, width: int, media: str) -> None:
    folder = study_of(0.1)
    comparisons = read_json(folder / "summary.json")["comparisons"]
    for row in comparisons["rows"]:
        for span in row["labels_saved"].values():
            if isinstance(span, dict) and "low" in span:
                for end in ("value", "low", "high"):
                    span[end] = {"value": 112_120.0, "censored": "more than"}
                span["low"] = {"value": -112_120.0, "censored": "fewer than"}
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(write_study_page(change(folder, comparisons=comparisons)).as_uri())
    tab.emulate_media(media=media)
    tab.evaluate("document.querySelectorAll('details').forEach(block => block.open = true)")
    assert tab.get_by_text("fewer than").count() >= 9
    assert tab.evaluate("[...document.querySelectorAll('.scroll')].every(one => one.scrollWidth <= one.clientWidth)")
    main = tab.locator("main").bounding_box()
    edges = tab.evaluate("[...document.querySelectorAll('td, th')].map(one => one.getBoundingClientRect().right)")
    assert max(edges) <= main["x"] + main["width"] + 1
    tab.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metric", "nosuch"),
        ("contamination", {"dim": [{"pretrain": {}, "finetune": {}}]}),
        ("contamination", {"dim": [{}]}),
        ("train_val_duplicates", {}),
    ],
)
def test_a_value_that_no_study_writes_is_refused_by_the_name_of_the_file(study_of: Study, key: str, value: Any) -> None:
    folder = change(study_of(0.1), **{key: value})
    with pytest.raises(UserError, match=r"summary\.json: expected"):
        write_study_page(folder)


@pytest.mark.parametrize("metric", ["auroc", "balanced_accuracy"])
def test_an_audit_without_a_metric_of_a_model_is_refused_by_the_name_of_the_file(study_of: Study, metric: str) -> None:
    folder = change(study_of(0.1), task="classification")
    audit = audit_of(input_size=0.8)
    audit["models"] = {name: {k: v for k, v in one.items() if k != metric} for name, one in audit["models"].items()}
    write_json(folder / "audit.json", audit)
    with pytest.raises(UserError, match=rf"audit\.json: expected the metric '{metric}'"):
        write_study_page(folder)
