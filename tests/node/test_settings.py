from __future__ import annotations

from pathlib import Path

import pytest

from medim.node.settings import (
    Address,
    NodeSettings,
    Peer,
    check_ae_title,
    parse_address,
    parse_destination,
    parse_peer,
    read_settings,
    write_settings,
)
from medim.types import UsageError, UserError


def test_settings_survive_the_file_in_the_spool(settings: NodeSettings) -> None:
    full = settings.model_copy(
        update={"allow": (Peer(ae_title="A", host="10.0.0.0/8"),), "forward": (parse_destination("P@h:104", "--x"),)}
    )
    write_settings(full)
    assert read_settings(full.spool) == full


@pytest.mark.parametrize("content", [None, b"{}", b"no json"])
def test_a_folder_that_is_not_a_spool_is_reported(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "node.json").write_bytes(content)
    with pytest.raises(UserError, match=r"spool|cannot be read"):
        read_settings(tmp_path)


def test_addresses_are_parsed() -> None:
    assert parse_address("127.0.0.1:104", "--listen") == Address(host="127.0.0.1", port=104)
    assert parse_address("[::1]:104", "--listen") == Address(host="::1", port=104)
    assert str(parse_destination("PACS@[::1]:104", "--forward")) == "PACS@[::1]:104"
    assert parse_peer("MR 1@10.0.0.0/24", "--allow") == Peer(ae_title="MR 1", host="10.0.0.0/24")


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000", ":104", "a@b:104", "::1:104"])
def test_an_address_of_another_form_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        parse_address(text, "--listen")


@pytest.mark.parametrize("text", ["PACS", "@h:104", "P" * 17 + "@h:104", "A\\B@h:104", "PÄCS@h:104", "PACS@h"])
def test_a_destination_of_another_form_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_destination(text, "--forward")


@pytest.mark.parametrize("text", ["A", "A@", "@10.0.0.1", "A@10.0.0.1/99", "A@no-such-host.invalid"])
def test_a_sender_of_another_form_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected|resolved"):
        parse_peer(text, "--allow")


def test_a_peer_matches_by_title_and_host() -> None:
    peer = Peer(ae_title="A", host="10.0.0.0/24")
    assert peer.matches("A ", "10.0.0.9")
    assert peer.matches("A", "::ffff:10.0.0.9")
    assert not peer.matches("B", "10.0.0.9")
    assert not peer.matches("A", "10.0.1.9")
    assert Peer(ae_title="A", host="127.0.0.1").matches("A", "127.0.0.1")


def test_only_addresses_of_this_machine_are_loopback() -> None:
    assert Address(host="localhost", port=1).is_loopback
    assert not Address(host="0.0.0.0", port=1).is_loopback
    assert check_ae_title(" A ", "--ae-title") == "A"
