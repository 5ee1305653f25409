"""One process or many: `torchrun`'s process group, DDP and FSDP2, and a training state that does not depend on them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=10)  # for a step, a validation or a checkpoint; after that the others are given up


@dataclass(frozen=True)
class World:
    """This process among `size` of them, which share a `store` of small values."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            dist.barrier()

    def first(self, name: str, work: Callable[[], None]) -> None:
        """Let the first process do `work`, however long it takes, while the others wait for it; `name` is used once.

        Not at a barrier, whose timeout is one of minutes. If the first process fails, torchrun ends the others.
        """
        if self.is_first:
            work()
        if self.store is not None:
            if self.is_first:
                self.store.set(name, "done")
            while not self.store.check([name]):
                time.sleep(0.2)


@contextmanager
def world() -> Iterator[World]:
    """Join the other processes if `torchrun` started this one, and leave them at the end. Uses GPUs where there are."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield World(device=torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    group = {"rank": rank, "world_size": size, "store": dist.PrefixStore("group", store)}
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, **group)
    try:
        yield World(rank, size, device, dist.PrefixStore("minibert", store))
    finally:
        dist.destroy_process_group()


def distribute(loss: nn.Module, world: World, *, fsdp: bool) -> nn.Module:
    """The loss as all processes compute it together: replicated (DDP), or with parameters sharded layer by layer."""
    loss.to(world.device)
    if fsdp:
        if world.size == 1:
            raise ValueError(
                "fsdp shards the parameters over several processes, but this is the only one: use torchrun"
            )
        mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
        for layer in loss.model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        return fully_shard(loss, mesh=mesh)
    return DistributedDataParallel(loss) if world.size > 1 else loss


def set_sync(module: nn.Module, sync: bool) -> None:
    """Whether the next backward pass adds up gradients over processes: only the last of an accumulated step does."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(sync)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync


def shard_again(module: nn.Module) -> None:
    """Give up the whole parameters that FSDP keeps after a forward pass that no backward pass has followed.

    Until then the module has others than those that the optimizer knows.
    """
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A copy of the tensor on the CPU, put together from all processes if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).to("cpu", copy=True)


def _like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as `target` is: on its device, and sharded as it is."""
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Each parameter with its optimizer state, by the parameter's name; whole tensors, the same for any `World`.

    Raises RuntimeError for a parameter that the optimizer does not know, whose state would be lost.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise RuntimeError(f"{name} is not among the optimizer's parameters: its state cannot be saved")
    return {
        name: {"value": whole(parameter), **{key: whole(value) for key, value in optimizer.state[parameter].items()}}
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """The inverse of `state_of`. Raises ValueError for a state of other parameters; nothing has changed then."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != state.keys():
        different = sorted(parameters.keys() ^ state.keys())
        raise ValueError(f"the checkpoint is of another architecture: {', '.join(different[:5])} ... differ")
    for name, parameter in parameters.items():
        shape = state[name]["value"].shape
        if shape != parameter.shape:
            raise ValueError(f"{name}: {tuple(shape)} in the checkpoint, {tuple(parameter.shape)} here")
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states: dict[int, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        values = dict(state[name])
        parameter.copy_(_like(parameter, values.pop("value")))
        if values:
            states[numbers[id(parameter)]] = {
                key: value if value.ndim == 0 else _like(parameter, value) for key, value in values.items()
            }
    # It knows where each kind of state belongs: a fused AdamW keeps its count of steps beside the parameters
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
