"""The processes of a run: who is who, gathering with gradients, and what the first does while the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from medim.types import UsageError, UserError

T = TypeVar("T")
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since PyTorch 2.13


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, and which of them this is.

    Attributes:
        rank: of this process, 0 to count - 1; the first leads: it alone writes and speaks.
        devices: processes a node, one a device.
        nodes: machines.
        kind: of the devices: cpu, cuda.
        control: gloo group in which the others wait for the first; None in a run of one process.
    """

    rank: int = 0
    devices: int = 1
    nodes: int = 1
    kind: str = "cpu"
    control: Any = None

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def local_shard(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part (ceil(N / count), ...) of a tensor (N, ...); what is missing repeats the last entry."""
        if self.count == 1:
            return whole
        each = -(-len(whole) // self.count)
        part = whole[self.rank * each : (self.rank + 1) * each]
        return part if len(part) == each else torch.cat([part, whole[-1:].expand(each - len(part), *whole.shape[1:])])

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The parts (n, ...) of all processes, in order: (count * n, ...).

        The gradient is that of the sum of all processes' losses. All compute the same loss of what they gathered, so
        that each parameter's gradients add up to `count` times the loss's, and DistributedDataParallel's mean over
        processes is the loss's.
        """
        if self.count == 1:
            return part
        whole: torch.Tensor = _GatherFunction.apply(part, self.rank, self.count)  # type: ignore[no-untyped-call]
        return whole

    def broadcast(self, value: T) -> T:
        """Return the first process's value, a plain object, in all processes; the others' values are ignored."""
        if self.count == 1:
            return value
        values: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.control)
        main_value: T = values[0]
        return main_value

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in the first process while the others wait, then in the others.

        The others find the files that the first has written, such as a store. A step that the first process takes
        alone goes under `if group.is_main:` in the block. If the block fails in the first process, the others exit
        with the exit code of that error and without running the block.

        Raises:
            SystemExit: in every other process, if the block fails in the first.
        """
        if self.count == 1:
            yield
            return
        if not self.is_main:
            exit_code = self.broadcast(0)
            if exit_code:
                raise SystemExit(exit_code)
            yield
            return
        try:
            yield
        except BaseException as error:
            self.broadcast(int(getattr(error, "exit_code", 1)))
            raise
        self.broadcast(0)

    def any_true(self, flag: bool) -> bool:
        """Whether the flag is up in any process; all must ask at the same point of the run."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, group=self.control)
        return bool(flags)

    def check_same(self, **values: str | int) -> None:
        """Refuse processes that are about to compute different things.

        Raises:
            UserError: a value differs between the first process and this one.
        """
        main_values = self.broadcast(values)
        differences = [
            f"{key} {values[key]} (the first: {main_values[key]})" for key in values if values[key] != main_values[key]
        ]
        if self.any_true(bool(differences)):
            raise UserError(
                f"process {self.rank} of {self.count}: expected what the first process has, got "
                f"{', '.join(differences) or 'another process that differs'}. All need the same command, "
                "the same medim, the same data and site key, and --out on a shared disk."
            )

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that does not divide.

        Raises:
            UsageError: batch_size is no multiple of the processes.
        """
        if batch_size % self.count:
            below, above = batch_size // self.count * self.count, -(-batch_size // self.count) * self.count
            raise UsageError(
                f"batch_size: expected a multiple of the {self.count} processes, over all of which it counts, got "
                f"{batch_size}. Set batch_size={f'{below} or {above}' if below else above}, or other --devices."
            )

    def with_synced_batch_norm(self, network: nn.Module) -> nn.Module:
        """The network with batch normalisation over the images of all processes.

        Critics and heads need none of this: they see the global batch.

        Raises:
            UsageError: batch normalisation in several processes on a CPU; torch synchronises it on CUDA alone.
        """
        if self.count == 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
            return network
        if self.kind != "cuda":
            raise UsageError(
                f"{type(network).__name__}: batch normalisation cannot be synchronised on {self.kind}, so each of the "
                f"{self.count} processes would normalise by its own images. Choose norm in or gn, and a summary "
                "without hidden layers; or --devices 1."
            )
        sync_network: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return sync_network


SINGLE_PROCESS = ProcessGroup()


class _GatherFunction(torch.autograd.Function):
    """Join the parts of all processes; the way back adds up what all say of a part, in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, rank: int, count: int) -> torch.Tensor:
        """Parts (n, ...) of `count` processes to (count * n, ...), by rank."""
        ctx.rank, ctx.each = rank, len(part)
        whole = part.new_empty((count * len(part), *part.shape[1:]))
        _all_gather(whole, part.contiguous())
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The rows of this process, of the sum over processes."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rank * ctx.each : (ctx.rank + 1) * ctx.each].to(gradient.dtype), None, None
