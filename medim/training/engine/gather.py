"""Views and features of the global batch, gathered from all processes on access.

Each process has a part of the batch. All processes run the same objectives and access the attributes in the same order,
so the collective operations match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch

from medim.training.engine.process_group import ProcessGroup
from medim.types import Features, Views


class GatheredViews(Views):
    """Views of the global batch.

    Args:
        own: views of this process; all processes have the same number.
        group: the processes of the run.
    """

    own: Views
    _group: ProcessGroup

    def __init__(self, own: Views, group: ProcessGroup) -> None:
        self.__dict__.update(own=own, _group=group)

    @cached_property
    def image(self) -> torch.Tensor:
        """Images of all processes: (B, V, C, ...)."""
        return self._group.gather(self.own.image)

    @cached_property
    def location(self) -> torch.Tensor:
        """Locations of all processes: (B, V, spatial_dims)."""
        return self._group.gather(self.own.location)


class GatheredFeatures(Features):
    """Features of the global batch.

    Args:
        own: features of this process; all processes have the same number.
        count: N, number of images of all processes.
        gather: function that joins the parts of all processes: (n, ...) to (count, ...).
    """

    own: Features
    count: int
    _gather: Callable[[torch.Tensor, int], torch.Tensor]

    def __init__(self, own: Features, count: int, gather: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self.__dict__.update(own=own, count=count, _gather=gather)

    @cached_property
    def maps(self) -> tuple[torch.Tensor, ...]:
        """Feature maps of all processes, each (N, channels, ...); each map is gathered on first access."""
        maps = _GatheredMaps(self.own.maps)
        maps.gather = lambda part: self._gather(part, self.count)
        return maps

    @cached_property
    def summary(self) -> torch.Tensor:
        """Summaries of all processes: (N, summary_channels)."""
        return self._gather(self.own.summary, self.count)


class _GatheredMaps(tuple[torch.Tensor, ...]):
    """Maps of this process with the interface of the gathered maps."""

    gather: Callable[[torch.Tensor], torch.Tensor]

    def __getitem__(self, level: Any) -> Any:
        indices = range(len(self))[level]
        if isinstance(indices, range):
            return tuple(self[place] for place in indices)
        cache: dict[int, torch.Tensor] = self.__dict__.setdefault("found", {})
        if indices not in cache:
            cache[indices] = self.gather(super().__getitem__(indices))
        return cache[indices]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[place] for place in range(len(self)))
