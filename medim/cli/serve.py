"""Commands of the DICOM node: `serve start`, `serve status`, `serve show`, `serve retry`, `serve drop`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from medim.cli.options import PublicKeyOption
from medim.cli.terminal import print_result, register_command
from medim.types import UsageError

_DEFAULT_COMMAND = "start"
SpoolOption = Annotated[Path, typer.Option("--spool", metavar="FOLDER", help="Folder of the images and answers.")]
KeyArgument = Annotated[str, typer.Argument(help="Key of a series, or the beginning of it.")]


class ServeGroup(TyperGroup):
    """Group whose command `start` may be left out: `medim serve PACKAGE` starts a node."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `start` unless the first word is a command or `--help`."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = [_DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


serve_app = typer.Typer(
    cls=ServeGroup, no_args_is_help=True, help="Receive series, answer each once, and send the answers."
)


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Command-line arguments of `medim serve PACKAGE`."""

    package: Annotated[Path, typer.Argument(help="A package.")]
    spool: SpoolOption
    ae_title: Annotated[str, typer.Option("--ae-title", metavar="AET", help="AE title of the node.")] = "MEDIM"
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Address of the receiver.")] = (
        "127.0.0.1:11112"
    )
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="AET@HOST", help="Sender; HOST may be a network. May be repeated."),
    ] = None
    forward: Annotated[
        list[str] | None,
        typer.Option("--forward", metavar="AET@HOST:PORT", help="Destination of the answers. May be repeated."),
    ] = None
    ask: Annotated[
        str | None,
        typer.Option("--ask", metavar="AET@HOST:PORT", help="Archive to query for the number of images of a series."),
    ] = None
    unconfirmed: Annotated[
        Literal["answer", "hold"],
        typer.Option("--unconfirmed", help="Treatment of a series without a number of images to compare with."),
    ] = "hold"
    late: Annotated[
        Literal["replace", "hold"], typer.Option("--late", help="Treatment of images that arrive after the answer.")
    ] = "hold"
    quiet_time: Annotated[
        float, typer.Option("--quiet-time", metavar="S", help="Seconds without a new image before an answer.", min=0.1)
    ] = 30.0
    max_wait: Annotated[
        float, typer.Option("--max-wait", metavar="S", help="Seconds until an incomplete series is on hold.", min=0.1)
    ] = 1800.0
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", help="Number of predicting processes.", min=1)] = 1
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", metavar="S", help="Time limit of one prediction.", min=1)
    ] = 600.0
    max_memory: Annotated[
        float, typer.Option("--max-memory", metavar="GIB", help="Memory limit of a predicting process.", min=1)
    ] = 8.0
    keep: Annotated[
        float, typer.Option("--keep", metavar="H", help="Hours until delivered series are deleted.", min=0)
    ] = 24.0
    min_free: Annotated[
        float,
        typer.Option("--min-free", metavar="GIB", help="Free disk space below which no image is accepted.", min=0),
    ] = 1.0
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Address of /metrics and /health.")
    ] = None
    public_key: PublicKeyOption = None
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate of the node (PEM).")
    ] = None
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Key of the certificate.")] = None
    tls_ca: Annotated[
        Path | None, typer.Option("--tls-ca", metavar="FILE", help="Certificates of the peers' authorities (PEM).")
    ] = None


@register_command(serve_app, "start")
def start(arguments: ServeArguments) -> None:
    """Run the node until SIGTERM; `start` may be left out."""
    from medim.node.settings import NodeSettings, check_ae_title, parse_address, parse_destination, parse_peer
    from medim.node.start import list_sop_classes, open_package, start_node

    public_key = arguments.public_key.resolve() if arguments.public_key else None
    package = open_package(arguments.package.resolve(), public_key)
    settings = NodeSettings(
        package=arguments.package.resolve(),
        package_sha256=package.sha256,
        public_key=public_key,
        modality=package.contract.modality,
        sop_classes=list_sop_classes(package),
        spool=arguments.spool.resolve(),
        listen=parse_address(arguments.listen, "--listen"),
        ae_title=check_ae_title(arguments.ae_title, "--ae-title"),
        allow=tuple(parse_peer(text, "--allow") for text in arguments.allow or ()),
        forward=tuple(parse_destination(text, "--forward") for text in arguments.forward or ()),
        ask=parse_destination(arguments.ask, "--ask") if arguments.ask else None,
        quiet_seconds=arguments.quiet_time,
        max_wait_seconds=arguments.max_wait,
        unconfirmed=arguments.unconfirmed,
        late=arguments.late,
        workers=arguments.jobs,
        series_seconds=arguments.max_seconds,
        memory_bytes=int(arguments.max_memory * 2**30),
        keep_hours=arguments.keep,
        min_free_bytes=int(arguments.min_free * 2**30),
        metrics=parse_address(arguments.metrics, "--metrics") if arguments.metrics else None,
        tls=_collect_tls_files(arguments),
    )
    start_node(settings)


@register_command(serve_app)
def status(spool: SpoolOption) -> None:
    """Count series and objects by state; list those without an answer."""
    from medim.node.admin import NodeAdmin

    print_result("node", NodeAdmin(spool).describe_node())


@register_command(serve_app)
def show(key: KeyArgument, spool: SpoolOption) -> None:
    """Show the state, answers and events of a series."""
    from medim.node.admin import NodeAdmin

    print_result("series", NodeAdmin(spool).describe_series(key))


@register_command(serve_app)
def retry(key: KeyArgument, spool: SpoolOption) -> None:
    """Predict a series again, or send its rejected answer again."""
    from medim.node.admin import NodeAdmin

    print_result("retry", {"action": NodeAdmin(spool).retry_series(key)})


@register_command(serve_app)
def drop(key: KeyArgument, spool: SpoolOption) -> None:
    """Delete the images of a series, so that it can be sent again."""
    from medim.node.admin import NodeAdmin

    NodeAdmin(spool).drop_series(key)
    print_result("drop", {"deleted": key})


def _collect_tls_files(arguments: ServeArguments) -> Any:
    """Collect the files of TLS; None without them.

    Raises:
        UsageError: some of the three options are missing.
    """
    from medim.node.settings import TlsFiles

    files = (arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    if not any(files):
        return None
    if arguments.tls_cert is None or arguments.tls_key is None or arguments.tls_ca is None:
        raise UsageError("--tls-cert, --tls-key, --tls-ca: expected all three, or none.")
    return TlsFiles(
        certificate=arguments.tls_cert.resolve(),
        private_key=arguments.tls_key.resolve(),
        authorities=arguments.tls_ca.resolve(),
    )
