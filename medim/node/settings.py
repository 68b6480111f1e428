"""Settings of a node, which its processes read from the spool."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from typing import Literal

from pydantic import Field

from medim.files import write_bytes
from medim.package.schema import StrictModel
from medim.types import Modality, UsageError, UserError

SETTINGS_FILE = "node.json"
UnconfirmedPolicy = Literal["answer", "hold"]
LatePolicy = Literal["replace", "hold"]
_AE_TITLE = re.compile(r"[ -\[\]-~]{1,16}")  # printable ASCII without the backslash


class Address(StrictModel):
    """Host and port."""

    host: str
    port: int = Field(ge=0, le=65535)

    @property
    def is_loopback(self) -> bool:
        """Whether all addresses of the host are those of this machine alone."""
        return all(ipaddress.ip_address(address).is_loopback for address in resolve_host(self.host))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Peer(StrictModel):
    """Application entity that may send to the node.

    Attributes:
        ae_title: calling AE title.
        host: host name, IP address or network such as 10.1.0.0/16.
    """

    ae_title: str
    host: str

    def matches(self, ae_title: str, address: str) -> bool:
        """Whether a caller has this title and one of the addresses of this host."""
        if ae_title.strip() != self.ae_title:
            return False
        caller = _parse_address(address)
        if "/" in self.host:
            return caller in ipaddress.ip_network(self.host, strict=False)
        return caller in {_parse_address(text) for text in resolve_host(self.host)}


class Destination(StrictModel):
    """Application entity that the node sends to.

    Attributes:
        ae_title: called AE title.
        address: host and port.
    """

    ae_title: str
    address: Address

    def __str__(self) -> str:
        return f"{self.ae_title}@{self.address}"


class TlsFiles(StrictModel):
    """PEM files of a TLS connection with certificates on both sides."""

    certificate: Path
    private_key: Path
    authorities: Path


class NodeSettings(StrictModel):
    """Settings of a node.

    Attributes:
        package: folder of the package.
        package_sha256: digest of the package at the start of the node.
        public_key: Ed25519 public key of the expected signer.
        modality: modality of the images.
        sop_classes: UIDs of the storage classes that the package accepts; empty for all images.
        spool: folder of the received series, the answers and the journal.
        listen: address of the receiver.
        ae_title: AE title of the node.
        allow: senders; empty allows every sender on this machine.
        forward: destinations of the answers.
        ask: archive that is queried for the number of images of a series.
        quiet_seconds: time without a new image after which a series may be complete.
        max_wait_seconds: time without a new image after which an incomplete series is put on hold.
        unconfirmed: treatment of a series without a number of images to compare with.
        late: treatment of images that arrive after the answer.
        workers: number of processes that predict.
        series_seconds: time limit of one prediction.
        memory_bytes: limit of the address space of a worker.
        retry_seconds: delay before each further attempt at a failed prediction.
        keep_hours: time after delivery until the images and the answer are deleted.
        min_free_bytes: free disk space below which no image is accepted.
        metrics: address of the HTTP server of metrics.
        tls: certificates; None for connections without encryption.
    """

    package: Path
    package_sha256: str
    public_key: Path | None = None
    modality: Modality
    sop_classes: tuple[str, ...] = ()
    spool: Path
    listen: Address
    ae_title: str
    allow: tuple[Peer, ...] = ()
    forward: tuple[Destination, ...] = ()
    ask: Destination | None = None
    quiet_seconds: float = Field(default=30.0, gt=0)
    max_wait_seconds: float = Field(default=1800.0, gt=0)
    unconfirmed: UnconfirmedPolicy = "hold"
    late: LatePolicy = "hold"
    workers: int = Field(default=1, ge=1)
    series_seconds: float = Field(default=600.0, gt=0)
    memory_bytes: int = Field(default=8 << 30, gt=0)
    retry_seconds: tuple[float, ...] = Field(default=(10.0, 60.0), min_length=1)
    keep_hours: float = Field(default=24.0, ge=0)
    min_free_bytes: int = Field(default=1 << 30, ge=0)
    metrics: Address | None = None
    tls: TlsFiles | None = None


def write_settings(settings: NodeSettings) -> None:
    """Write the settings into the spool; they contain no password and no key."""
    write_bytes(settings.spool / SETTINGS_FILE, settings.model_dump_json(indent=1).encode() + b"\n")


def read_settings(spool: Path) -> NodeSettings:
    """Read the settings of the node of a spool.

    Raises:
        UserError: the folder is not the spool of a node.
    """
    path = spool / SETTINGS_FILE
    try:
        return NodeSettings.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{spool}: expected the spool of a node, found no {SETTINGS_FILE}. Check --spool.") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read. Start `medim serve` again, which writes it.") from error


def parse_address(text: str, option: str) -> Address:
    """Parse HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        UsageError: the text has another form.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:]+)\]|([^\s:@/]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise UsageError(f"{option} {text}: expected HOST:PORT, such as 127.0.0.1:11112.")
    return Address(host=match[1] or match[2], port=int(match[3]))


def parse_destination(text: str, option: str) -> Destination:
    """Parse AET@HOST:PORT.

    Raises:
        UsageError: the text has another form.
    """
    ae_title, separator, address = text.rpartition("@")
    if not separator:
        raise UsageError(f"{option} {text}: expected AET@HOST:PORT, such as PACS@10.0.0.5:104.")
    return Destination(ae_title=check_ae_title(ae_title, option), address=parse_address(address, option))


def parse_peer(text: str, option: str) -> Peer:
    """Parse AET@HOST; the host may be a network.

    Raises:
        UsageError: the text has another form, or the host cannot be resolved.
    """
    ae_title, separator, host = text.rpartition("@")
    if not separator or not host:
        raise UsageError(f"{option} {text}: expected AET@HOST, such as SCANNER@10.0.0.7 or SCANNER@10.0.0.0/24.")
    host = host.removeprefix("[").removesuffix("]")
    if "/" in host:
        try:
            ipaddress.ip_network(host, strict=False)
        except ValueError:
            raise UsageError(f"{option} {text}: expected a network such as 10.0.0.0/24.") from None
    elif not resolve_host(host):
        raise UsageError(f"{option} {text}: the host cannot be resolved. Use its IP address.")
    return Peer(ae_title=check_ae_title(ae_title, option), host=host)


def check_ae_title(text: str, option: str) -> str:
    """Return an AE title without surrounding spaces.

    Raises:
        UsageError: the text is not an AE title.
    """
    title = text.strip()
    if not _AE_TITLE.fullmatch(title):
        raise UsageError(f"{option} {text}: expected an AE title of 1 to 16 characters of ASCII without a backslash.")
    return title


def resolve_host(host: str) -> tuple[str, ...]:
    """List the IP addresses of a host; empty if the name is unknown."""
    try:
        return tuple(sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}))
    except OSError:
        return ()


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an IP address; an IPv4 address in the form of IPv6 becomes plain."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
