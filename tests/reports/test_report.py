from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from medim.config import load_config
from medim.data.index.index import Index, build_index
from medim.evaluation.evaluate import evaluate
from medim.reports.comparison import compute_differences
from medim.reports.report import write_report_page
from medim.reports.runs import read_history
from medim.reports.training_curves import VERDICT_BANNERS
from medim.training.pretrain.verdict import TrainingVerdict
from medim.types import UserError
from tests.evaluation.conftest import make_masks, make_run

CHROMIUM = Path("/usr/bin/chromium")
DOWNLOADS = ("data:image/svg+xml;charset=utf-8", "data:text/csv;charset=utf-8")
NASTY = "<script>alert(1)</script>"


def pretraining(folder: Path, verdict: str = "learning") -> Path:
    """The files of a pretraining run of two objectives, as medim.training writes them."""
    folder.mkdir(parents=True)
    lines = ["step,name,loss,chance,val"]
    for step in range(1, 41):
        lines += [f"{step},local_dim,{3.4 - step / 50},3.466,", f"{step},local_dim/score,{step},,"]
        lines += [f"{step},prior_matching,{1 + 0.1 * np.sin(step)},,"]
        lines += [f"{step},local_dim,,,{3.45 - step / 50}", f"{step},prior_matching,,,1.01"] if step % 20 == 0 else []
    (folder / "history.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(f"name: mri-crop # {NASTY}\n")
    summary = {
        "schema_version": 1,
        "command": "pretrain",
        "objectives": {"local_dim": 1.0, "prior_matching": 0.1},
        "steps": 40,
        "input_shape": [32, 48, 32],
        "loss": {
            "local_dim": {"first": 3.38, "last": 2.6, "val": 2.65},
            "prior_matching": {"first": 1.0, "last": 1.0, "val": None},
        },
        "chance": {"local_dim": 3.466, "prior_matching": None},
        "verdict": verdict,
        "rankme": 12.3,
        "feature_std": 0.81,
        "seconds_per_step": 0.25,
        "dataloader_wait_fraction": 0.04,
        "peak_memory_bytes": 1_234_000_000,
        "device": "cpu",
        "config_hash": "0123456789ab",
        "index_hash": "f" * 64,
        "versions": {"medim": "0.1.0", "torch": "2.13"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def finetuning(folder: Path, init: str, dice: float) -> Path:
    folder.mkdir(parents=True)
    lines = [f"{step},loss,{2 / step},," for step in range(1, 31)]
    (folder / "history.csv").write_text("\n".join(["step,name,loss,chance,val", *lines]) + "\n")
    metrics = {
        "dice": {"value": dice, "ci_low": dice - 0.02, "ci_high": dice + 0.02, "n": 40},
        "hd95_front": {"value": 2.5, "ci_low": None, "ci_high": None, "n": 39},
    }
    summary = {
        "command": "finetune",
        "task": "segmentation",
        "init": init,
        "n_labelled": 20,
        "steps": 30,
        "val": {"n": 40, "subjects": 13, "rejected": 0, "metrics": metrics},
        "config_hash": "0123456789ab",
        "index_hash": "f" * 64,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def package(folder: Path) -> Path:
    (folder / "parity").mkdir(parents=True)
    contract = {
        "name": "boxes",
        "version": "1.0.0",
        "kind": "segmenter",
        "modality": "mri",
        "classes": ["front", "back"],
    }
    (folder / "medim.json").write_text(json.dumps({**contract, "preprocess": [{"op": "ras"}], "intended_use": NASTY}))
    gates = {"random_inputs": {"verdict": "pass", "measured": 2e-6, "allowed": 1e-4}}
    (folder / "parity" / "report.json").write_text(json.dumps({"schema_version": 1, "gates": gates}))
    return folder


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory, segmenter: dict[str, Any], classifier: dict[str, Any]
) -> tuple[Path, Index]:
    """A folder with one of everything, as `make demo` leaves it, and the index of its images."""
    home = tmp_path_factory.mktemp("report")
    folder = home / "demo"
    index = build_index(make_masks(home / "source"), "mri")
    index.write(folder / "index")
    pretraining(folder / "pretrain")
    finetuning(folder / "finetune", "pretrained", 0.861)
    finetuning(folder / "scratch", "scratch", 0.843)
    evaluate(make_run(home / "runs" / "segmenter", segmenter), index, folder / "evaluate")
    evaluate(make_run(home / "runs" / "classifier", classifier), index, folder / "evaluate-classes")
    package(folder / "package")
    (folder / "stopped").mkdir()
    (folder / "stopped" / "config.yaml").write_text("name: mri\n")
    (folder / "logs").mkdir()
    return folder, index


@pytest.fixture(scope="module")
def path(demo: tuple[Path, Index]) -> Path:
    return write_report_page(demo[0])


@pytest.fixture(scope="module")
def html(path: Path) -> str:
    return path.read_text()


class Page(HTMLParser):
    """Ids, links, headings and figures of a page, and whether its tags close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag not in ("meta", "link", "path", "use", "wbr", "img"):
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        self.references += [found[k] for k in ("href", "src", "xlink:href") if k in found]
        self.references += [f"#{name}" for k in ("aria-labelledby",) for name in found.get(k, "").split()]
        self.references += re.findall(r"url\(([^)]+)\)", found.get("clip-path", "") + found.get("style", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def words(html: str) -> str:
    """A page without its pictures, whose bytes may spell anything, and without its downloads."""
    return re.sub(r'src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"|href="data:[^"]+"', "", html)


def test_a_folder_of_parts_becomes_one_page_with_contents_and_a_comparison(html: str) -> None:
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert titles == [
        "Pretrained against scratch",
        "Images: index",
        "Pretraining: pretrain",
        "Fine-tuning: finetune",
        "Fine-tuning: scratch",
        "Evaluation: evaluate",
        "Evaluation: evaluate-classes",
        "Package: package",
        "Unfinished: stopped",
    ]
    assert re.findall(r'<li><a href="#[^"]+">(.*?)</a>', html) == titles
    assert "Dice, mean over classes: +0.018" in html
    assert "0.861 (0.841 to 0.881)" in html


def test_the_page_is_whole_and_refers_to_nothing_but_itself(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    inner = [reference for reference in page.references if reference.startswith("#")]
    assert {reference[1:] for reference in inner} <= set(page.ids)
    outer = {reference.split(",")[0] for reference in page.references if not reference.startswith("#")}
    assert outer == {"data:", "data:image/jpeg;base64", *DOWNLOADS}
    assert "script" not in page.tags
    assert "http" not in words(html).replace("http-equiv", "")


def test_every_figure_is_a_file_to_download_with_its_numbers(html: str) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", html, flags=re.DOTALL)
    assert len(figures) >= 10
    names = set()
    for figure in figures:
        links = re.findall(r'<a href="(data:[^,]+),([^"]+)" download="([^"]+)"', figure)
        assert [kind for kind, *_ in links] == list(DOWNLOADS)
        svg, table = (unquote(unescape(content)) for _, content, _ in links)
        root = ElementTree.fromstring(svg)
        assert root.attrib["width"].endswith("pt")
        assert not re.search(r"var\(|#0[1-8]0|inherit", svg)
        used = [href[1:] for one in root.iter() for name, href in one.items() if name.endswith("}href")]
        assert set(used) <= {one.attrib["id"] for one in root.iter() if "id" in one.attrib}
        rows = list(csv.reader(table.splitlines()))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
        names |= {name for *_, name in links}
    assert "Pretraining-pretrain-Loss-of-local_dim.csv" in names
    assert "training,1,3.38\n" in unquote(html)
    assert "validation,40,2.65\n" in unquote(html)


def test_results_of_an_earlier_metric_rule_are_named_and_misses_stand_beside_distances(
    demo: tuple[Path, Index], html: str, tmp_path: Path
) -> None:
    assert html.count("Metric rule 1, of an earlier version") == 3  # both fine-tunings and the comparison
    evaluation = shutil.copytree(demo[0] / "evaluate", tmp_path / "evaluate")
    content = json.loads((evaluation / "metrics.json").read_text())
    assert content["metric_rule"] == 2
    content["metrics"]["hd95_front"] |= {"value": 7.5, "ci_low": None, "ci_high": None, "n": 8, "missed": 3}
    (evaluation / "metrics.json").write_text(json.dumps(content))
    new = write_report_page(tmp_path).read_text()
    assert "Metric rule 1" not in new
    assert "3 of 8 missed" in new
    assert "A missed structure counts with the diagonal of its image as distance." in new
    del content["metric_rule"]
    (evaluation / "metrics.json").write_text(json.dumps(content))
    assert "Metric rule 1, of an earlier version" in write_report_page(tmp_path).read_text()


def test_every_figure_has_its_words(html: str) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", html, flags=re.DOTALL)
    assert len(figures) >= 10
    for figure in figures:
        assert re.search(r'<svg role="img" aria-labelledby="\S+-title \S+-desc"', figure)
        assert re.search(r"<title[^>]*>[^<]{5,}</title><desc[^>]*>[^<]*\d[^<]*</desc>", figure)
    assert "Training loss of local_dim over 40 steps: 3.38 at first, 2.6 at last; 2.65 on validation subjects" in html


def test_what_files_say_is_text_and_never_markup(html: str) -> None:
    assert NASTY not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2  # the config and the package's intended use


def test_the_same_files_give_the_same_bytes(demo: tuple[Path, Index], html: str) -> None:
    assert write_report_page(demo[0]).read_text() == html


def test_the_page_holds_no_path_of_this_machine_and_subjects_under_pictures_alone(
    demo: tuple[Path, Index], html: str
) -> None:
    folder, index = demo
    assert str(folder.parent) not in html
    without = re.sub(r'<figure class="tile">.*?</figure>', "", html, flags=re.DOTALL)
    assert all(f"<figcaption>{record.subject}</figcaption>" in html for record in index.records)
    assert not any(record.subject in without for record in index.records)


METHODS = {
    "pretrain": (
        "The encoder was a 3D network with the encoder unet and the decoder unet. It was pretrained without labels on "
        "MRI with reconstruction, local Deep InfoMax and prediction of coordinates as objectives. Preprocessing: image "
        "axes were made orthogonal; axes were reoriented to right, anterior and superior; images were resampled to "
        "1 × 1 × 1 mm; intensities were clipped to the percentiles 0.5 and 99.5; intensities were normalised (mean 0, "
        "standard deviation 1). Each step used 1 crop of 32 × 48 × 32 voxels per image with random augmentation "
        "(contrast, intensity scale and noise). The encoder was trained for 40 steps with batches of 12 images using "
        "AdamW (peak learning rate 0.002, weight decay 0.01) and a cosine schedule after a linear warm-up of 30 steps. "
        "Software: medim 0.1.0 and PyTorch 2.13."
    ),
    "finetune": (
        "The network was a 3D network with the encoder unet, the decoder unet and a head for segmentation. It was "
        "trained for segmentation on 20 labelled images (MRI), starting from pretrained weights. Preprocessing: image "
        "axes were made orthogonal; axes were reoriented to right, anterior and superior; images were resampled to "
        "1 × 1 × 1 mm; intensities were clipped to the percentiles 0.5 and 99.5; intensities were normalised (mean 0, "
        "standard deviation 1). The network was trained for 30 steps with batches of 2 images using AdamW (peak "
        "learning rate 0.01, weight decay 0.01) and a cosine schedule after a linear warm-up of 20 steps; pretrained "
        "parts were trained with 0.3 times the learning rate; the head was initialised by a linear probe. Performance "
        "was measured on 40 validation images of 13 subjects. Intervals are 95 % percentile bootstrap intervals over "
        "subjects."
    ),
}


@pytest.mark.parametrize(("kind", "preset"), [("pretrain", "mri-crop"), ("finetune", "mri-crop-segmentation")])
def test_a_page_has_a_methods_paragraph_for_a_paper(tmp_path: Path, kind: str, preset: str) -> None:
    run = pretraining(tmp_path / "run") if kind == "pretrain" else finetuning(tmp_path / "run", "pretrained", 0.8)
    config = load_config("pretrain", preset) if kind == "pretrain" else load_config("finetune", preset)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    page = unescape(write_report_page(run).read_text())
    block = re.search(r"<summary>Methods paragraph for a paper</summary>\s*<pre>(.*?)</pre>", page, flags=re.DOTALL)
    assert block
    assert block[1] == METHODS[kind]
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"where": "fov_x<140"}))
    page = unescape(write_report_page(run).read_text())
    assert f"{METHODS[kind]} Images were selected by the condition fov_x<140 (--where).</pre>" in page
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | {"decoder": 1e300}))
    with pytest.raises(UserError, match=r"config\.yaml: expected the configuration of a run"):
        write_report_page(run)


@pytest.mark.parametrize("verdict", get_args(TrainingVerdict))
def test_each_verdict_is_told_in_words(tmp_path: Path, verdict: str) -> None:
    html = write_report_page(pretraining(tmp_path / "run", verdict)).read_text()
    assert f'<p class="headline">{VERDICT_BANNERS[verdict].headline}</p>' in html
    assert VERDICT_BANNERS[verdict].text in html
    assert "<nav" not in html  # one section needs no contents


def test_a_page_begins_with_kind_name_date_version_and_data_and_has_no_paragraph_among_its_numbers(
    tmp_path: Path, html: str
) -> None:
    run = pretraining(tmp_path / "run")
    content = json.loads((run / "summary.json").read_text())
    reason = "lowest validation loss of the objectives with a chance level, without labels"
    content |= {"advice": "Look at the sample views. Train longer.", "checkpoint_selection": {"step": 20}}
    content["checkpoint_selection"]["reason"] = reason
    (run / "summary.json").write_text(json.dumps(content))
    (run / "config.yaml").write_text("modality: mri\n")
    os.utime(run / "summary.json", (1_796_083_200,) * 2)
    page = write_report_page(run).read_text()
    head = re.search(r"<header>(.*?)</header>", page, flags=re.DOTALL)
    assert head
    assert re.findall(r"<(?:h1|p)[^>]*>(.*?)</", head[1]) == [
        "Pretraining: run",
        "Results of 2026-12-01, medim version 0.1.0",
        f"Data: MRI; index {'f' * 12}",
    ]
    assert "<title>Pretraining: run – medim report</title>" in page
    assert f'<p class="fact"><span>Choice of the saved step:</span> {reason}</p>' in page
    assert '<p class="fact"><span>Advice:</span> Look at the sample views. Train longer.</p>' in page
    assert re.search(r"<dt>Encoder saved from step</dt><dd>20</dd>", page)
    assert all(len(value) < 60 for value in re.findall(r"<dd>(.*?)</dd>", page))
    assert "<h1>Report</h1>" in html  # the folder "demo" may be named after a person
    assert re.search(r"Data: MRI: \d+ images of \d+ subjects; index \w{12}<", html)


def test_the_curves_are_those_of_the_history(tmp_path: Path) -> None:
    curves = read_history(pretraining(tmp_path / "run") / "history.csv", ["local_dim", "prior_matching", "absent"])
    assert [curve.name for curve in curves] == ["local_dim", "prior_matching"]
    assert curves[0].loss[:2] == pytest.approx([3.38, 3.36])
    assert list(curves[0].steps) == list(range(1, 41))
    assert curves[0].val == [(20, pytest.approx(3.05)), (40, pytest.approx(2.65))]
    assert (curves[0].chance, curves[1].chance) == (3.466, None)


def test_a_history_without_its_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(UserError, match="expected the columns step, name"):
        read_history(tmp_path / "history.csv", ["loss"])


def test_a_folder_with_nothing_to_report_and_a_package_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contain no run, evaluation or index"):
        write_report_page(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        write_report_page(tmp_path / "nowhere")
    with pytest.raises(UserError, match="must not be changed"):
        write_report_page(package(tmp_path / "package"))


def test_two_evaluations_of_the_same_images_are_paired(tmp_path: Path, index: Index, segmenter: dict[str, Any]) -> None:
    pretrained = {**segmenter, "provenance": {**segmenter["provenance"], "parent": "0" * 64}}
    for name, spec in (("one", pretrained), ("two", segmenter)):
        evaluate(make_run(tmp_path / "runs" / name, spec), index, tmp_path / "both" / name)
    html = write_report_page(tmp_path / "both").read_text()
    assert "+0.000 (+0.000 to +0.000), no clear difference" in html  # the same weights


def test_arms_measured_on_other_images_are_not_compared(
    tmp_path: Path, index: Index, segmenter: dict[str, Any]
) -> None:
    pretrained = {**segmenter, "provenance": {**segmenter["provenance"], "parent": "0" * 64}}
    fewer = dataclasses.replace(index, records=index.records[:4])
    evaluate(make_run(tmp_path / "runs" / "one", pretrained), index, tmp_path / "both" / "one")
    evaluate(make_run(tmp_path / "runs" / "two", segmenter), fewer, tmp_path / "both" / "two")
    assert "Pretrained against scratch" not in write_report_page(tmp_path / "both").read_text()


def test_a_difference_is_over_the_images_both_have_a_value_of() -> None:
    rows = [
        {"image": f"i{k}", "subject": f"s{k}", "class": "it", "dice": 0.5 + k / 100, "hd95": 1.0, "surface_dice": 0.5}
        for k in range(20)
    ]
    better = [{**row, "dice": row["dice"] + 0.1, "hd95": None if k == 3 else 3.0} for k, row in enumerate(rows)]
    found = compute_differences(better, rows, ["it"])
    assert found["dice"]["value"] == pytest.approx(0.1)
    assert found["dice"]["ci_low"] == pytest.approx(0.1)  # every image gains the same: pairing leaves no spread
    assert (found["hd95_it"]["value"], found["hd95_it"]["n"]) == (2.0, 19)
    assert found["dice_it"]["n"] == 20
    assert compute_differences(better[1:], rows, ["it"]) == {}


def test_a_difference_of_classifiers_is_the_difference_of_their_metrics() -> None:
    def rows(shift: float) -> list[dict[str, Any]]:
        rng = np.random.default_rng(0)
        out: list[dict[str, Any]] = []
        for k in range(60):
            label = "ab"[k % 2]
            p = float(np.clip(0.5 + shift * (k % 2 - 0.5) + rng.normal(0, 0.2), 0, 1))
            keys = {"image": f"i{k}", "subject": f"s{k}", "label": label, "prediction": "b" if p > 0.5 else "a"}
            out += [{**keys, "class": "a", "probability": 1 - p}, {**keys, "class": "b", "probability": p}]
        return out

    found = compute_differences(rows(0.4), rows(0.0), ["a", "b"])
    assert found["auroc"]["value"] is not None
    assert found["auroc"]["value"] > 0.2
    assert found["auroc"]["ci_low"] is not None
    assert found["auroc"]["ci_low"] > 0


def test_rejected_images_are_told_with_their_reasons(tmp_path: Path, index: Index, classifier: dict[str, Any]) -> None:
    records = (dataclasses.replace(index.records[0], label="huge"), *index.records[1:])
    marked = dataclasses.replace(index, records=records)
    evaluate(make_run(tmp_path / "run", classifier), marked, tmp_path / "out")
    assert "unknown-class" in write_report_page(tmp_path / "out").read_text()


def test_an_evaluation_without_a_defined_score_has_a_page(
    tmp_path: Path, index: Index, classifier: dict[str, Any]
) -> None:
    evaluate(make_run(tmp_path / "run", classifier), index, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for metric in content["metrics"].values():
        metric |= {"value": None, "ci_low": None, "ci_high": None}
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(content))
    assert "not defined" in write_report_page(tmp_path / "out").read_text()


@pytest.mark.parametrize("key", ["classes", "columns"])
def test_cases_that_do_not_fit_the_metrics_are_refused_by_name(
    key: str, tmp_path: Path, index: Index, classifier: dict[str, Any]
) -> None:
    evaluate(make_run(tmp_path / "run", classifier), index, tmp_path / "out")
    if key == "classes":
        content = json.loads((tmp_path / "out" / "metrics.json").read_text())
        (tmp_path / "out" / "metrics.json").write_text(json.dumps({**content, "classes": ["x", "y"]}))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "out" / "cases.parquet")
    with pytest.raises(UserError, match=r"cases\.parquet: expected the cases of metrics\.json"):
        write_report_page(tmp_path / "out")


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


def test_a_browser_shows_the_page_without_error_request_or_overflow(path: Path, browser: Any) -> None:
    for width, scheme in ((400, "light"), (400, "dark"), (1280, "light")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        messages: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message, kept=messages: kept.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error, kept=messages: kept.append(str(error)))
        page.on("request", lambda request, kept=requests: kept.append(request.url))
        page.goto(path.as_uri())
        assert messages == []
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(
            "[...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().width > 250)"
        )
        names = page.get_by_role("img").count()
        assert names == page.locator("figure").count() > 0
        page.close()


def test_on_paper_every_folded_text_is_shown_on_white(path: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 800, "height": 800}, color_scheme="dark")
    page.goto(path.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(
        "[...document.querySelectorAll('pre')].every(p => p.checkVisibility({contentVisibilityAuto: true}))"
    )
    page.close()
