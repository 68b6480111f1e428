from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from medim.package.contract import NOT_REPORTED
from medim.package.model_card import CARD_FILE, CARD_PAGE, FIELDS, build_model_card, parse_model_card
from medim.package.package import Package, PackageError


def test_every_field_stands_on_the_page_and_what_is_not_known_is_counted(packages: dict[str, Package]) -> None:
    package = packages["segmenter"]
    page, card = package.read_file(CARD_PAGE).decode(), parse_model_card(package.read_file(CARD_FILE))
    assert all(f"| {field} |" in page for fields in FIELDS.values() for field in fields)
    assert "| patient population |  | **not reported** |" in page
    assert "| classes | 14 | anterior, posterior |" in page
    assert card.not_reported == page.count("**not reported**")
    assert f"\n{card.not_reported} fields are not reported.\n" in page
    assert card.banner in page.splitlines()[2]


def test_what_the_run_recorded_is_on_the_card(packages: dict[str, Package]) -> None:
    contract = packages["segmenter"].contract
    parent = "ef" * 32
    contract = contract.model_copy(update={"provenance": {**contract.provenance, "parent": parent}})
    run = {"init": "pretrained", "n_labelled": 5, "steps": 100}
    sections = build_model_card(contract, {}, run).sections
    assert sections["Model"]["parent encoder (sha256)"] == parent
    assert sections["Training"]["initial weights"] == "parent encoder"
    assert (sections["Data"]["labelled images"], sections["Training"]["steps"]) == (5, 100)
    assert sections["Model"]["encoder"] == "unet (channels [4, 8])"
    assert sections["Model"]["why this encoder"] == NOT_REPORTED


def _forget(content: dict[str, Any]) -> None:
    del content["sections"]["Data"]["dates"]


def _invent(content: dict[str, Any]) -> None:
    content["sections"]["Data"]["colour"] = "blue"


def _hide(content: dict[str, Any]) -> None:
    content["not_reported"] -= 1


def _add(content: dict[str, Any]) -> None:
    content["run_me"] = "$(reboot)"


@pytest.mark.parametrize("change", [_forget, _invent, _hide, _add])
def test_a_card_that_is_none_is_refused(packages: dict[str, Package], change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(packages["segmenter"].read_file(CARD_FILE))
    change(content)
    with pytest.raises(PackageError, match="model card"):
        parse_model_card(json.dumps(content).encode())
