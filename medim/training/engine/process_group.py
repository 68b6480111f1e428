"""Process group of a run: ranks, gathering with gradients, and steps that the main process takes first."""

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
    """Processes of a run, and the rank of this process.

    Attributes:
        rank: rank of this process, 0 to count - 1; rank 0 is the main process, which alone writes and reports.
        devices: number of processes per node, one per device.
        nodes: number of machines.
        kind: kind of the devices: cpu, cuda.
        control: gloo group in which the other processes wait for the main process; None in a run of one process.
    """

    rank: int = 0
    devices: int = 1
    nodes: int = 1
    kind: str = "cpu"
    control: Any = None

    @property
    def count(self) -> int:
        """Total number of processes."""
        return self.devices * self.nodes

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def local_shard(self, whole: torch.Tensor) -> torch.Tensor:
        """Take the part of this process (ceil(N / count), ...) of a tensor (N, ...), padded with the last entry."""
        if self.count == 1:
            return whole
        each = -(-len(whole) // self.count)
        part = whole[self.rank * each : (self.rank + 1) * each]
        return part if len(part) == each else torch.cat([part, whole[-1:].expand(each - len(part), *whole.shape[1:])])

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Gather the parts (n, ...) of all processes in order of rank: (count * n, ...).

        The gradient is that of the sum of the losses of all processes. All processes compute the same loss from the
        gathered parts, so the gradients of each parameter add up to `count` times that of the loss, and the mean over
        processes by DistributedDataParallel is that of the loss.
        """
        if self.count == 1:
            return part
        whole: torch.Tensor = _GatherFunction.apply(part, self.rank, self.count)  # type: ignore[no-untyped-call]
        return whole

    def broadcast(self, value: T) -> T:
        """Return the value of the main process, a plain object, in all processes; values of the others are ignored."""
        if self.count == 1:
            return value
        values: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.control)
        main_value: T = values[0]
        return main_value

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in the main process while the others wait, then in the others.

        The other processes find the files that the main process has written, such as a store. Steps of the main process
        alone go under `if group.is_main:` in the block. If the block fails in the main process, the others exit with
        the exit code of that error without running the block.

        Raises:
            SystemExit: in all other processes, if the block fails in the main process.
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
        """Whether the flag is set in any process; all processes must call this at the same point of the run."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, group=self.control)
        return bool(flags)

    def check_same(self, **values: str | int) -> None:
        """Reject processes with different inputs.

        Raises:
            UserError: a value differs between the main process and this one.
        """
        main_values = self.broadcast(values)
        differences = [
            f"{key} {values[key]} (main process: {main_values[key]})"
            for key in values
            if values[key] != main_values[key]
        ]
        if self.any_true(bool(differences)):
            raise UserError(
                f"process {self.rank} of {self.count}: expected the same inputs as in the main process, got "
                f"{', '.join(differences) or 'a difference in another process'}. All processes need the same command, "
                "medim version, data and site key, and --out on a shared disk."
            )

    def check_batch(self, batch_size: int) -> None:
        """Reject a batch size that cannot be divided evenly.

        Raises:
            UsageError: batch_size is not a multiple of the number of processes.
        """
        if batch_size % self.count:
            below, above = batch_size // self.count * self.count, -(-batch_size // self.count) * self.count
            raise UsageError(
                f"batch_size: expected a multiple of the {self.count} processes, which share each batch, got "
                f"{batch_size}. Set batch_size={f'{below} or {above}' if below else above}, or other --devices."
            )

    def with_synced_batch_norm(self, network: nn.Module) -> nn.Module:
        """Convert batch normalisation to statistics over the images of all processes.

        Critics and heads do not need this, because their inputs are those of the global batch.

        Raises:
            UsageError: there is batch normalisation in several processes on a CPU; torch synchronises it only on CUDA.
        """
        if self.count == 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
            return network
        if self.kind != "cuda":
            raise UsageError(
                f"{type(network).__name__}: batch normalisation cannot be synchronised on {self.kind}, so each of the "
                f"{self.count} processes would normalise with its own images. Use norm in or gn and a summary "
                "without hidden layers, or --devices 1."
            )
        sync_network: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return sync_network


SINGLE_PROCESS = ProcessGroup()


class _GatherFunction(torch.autograd.Function):
    """Gather of the parts of all processes; the backward pass sums the gradients of a part in fp32 or wider.

    `torch.distributed.nn.functional.all_gather` has another backward pass: on NCCL it reduces in the dtype of the
    gradients, which rounds every partial sum in bf16 and fp16.
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, rank: int, count: int) -> torch.Tensor:
        """Gather parts (n, ...) of `count` processes to (count * n, ...), by rank."""
        ctx.rank, ctx.each = rank, len(part)
        whole = part.new_empty((count * len(part), *part.shape[1:]))
        _all_gather(whole, part.contiguous())
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Sum the gradients over processes, and return the rows of this process."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rank * ctx.each : (ctx.rank + 1) * ctx.each].to(gradient.dtype), None, None
