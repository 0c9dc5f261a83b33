"""The processes of one launch: which one this is, and what they tell each other.

Under `accelerate launch` or torchrun the same command runs in several processes, on one machine or many; without a launcher
there is one, and everything here is then free. Accelerate owns devices and backends; the first process writes the files.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel

from .runs import ClipgenError


def join(device: str = "cuda") -> torch.device:
    """Take this process into the launch it belongs to; nothing where there is no launcher, or it is in already.

    `cpu` joins by gloo even where there are GPUs. Returns the device to compute on: the given one, or in a launch this
    process's own.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(device)
    from accelerate import PartialState

    # a day: one process may have more to read, hash or write than the others, who wait for it
    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=1)).device


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1  # some builds are without


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


@cache
def tell(sentence: str) -> None:
    """A sentence for the user on stderr: once, and by the first process alone. An empty one is nothing to tell."""
    if sentence and is_main():
        print("".join(c if c.isprintable() else "?" for c in sentence), file=sys.stderr)


def barrier() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def broadcast(item: object) -> object:
    """What the first process gave, for all."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items)
    return items[0]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, on each of them; the tensor itself where there is one."""
    if world_size() > 1:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, on each of them; the tensor itself where there is one."""
    return tensor if world_size() == 1 else all_reduce_sum(tensor) / world_size()


def training_device(device: str) -> torch.device:
    """As `join`, for a training.

    Raises ClipgenError: Accelerate is configured to cut models in pieces, which these trainings do not need.
    """
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise ClipgenError("FSDP and DeepSpeed are not supported: choose plain multi-GPU in 'accelerate config'")
    return join(device)


def data_parallel(*modules: nn.Module) -> list[nn.Module]:
    """Modules whose gradients are averaged over the processes in the backward pass (DDP); where there is one, the modules."""
    if world_size() == 1:
        return list(modules)
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no")  # autocast is the step functions' own
    return [accelerator.prepare(module) for module in modules]


def microbatches(parts: list, *modules: nn.Module) -> Iterator:
    """Yield the parts of a batch; the gradients of the modules travel between processes with the last part only."""
    replicas = [module for module in modules if isinstance(module, DistributedDataParallel)]
    for index, part in enumerate(parts):
        with ExitStack() as stack:
            for replica in replicas if index + 1 < len(parts) else []:
                stack.enter_context(replica.no_sync())
            yield part


@contextmanager
def together() -> Iterator[None]:
    """What a process raises because another one of its launch has ended becomes one sentence."""
    try:
        yield
    except RuntimeError as error:  # of gloo as it is, of NCCL a subclass: only the text tells them from others
        if world_size() == 1 or not re.search(r"gloo|nccl|connection|socket|timed out", str(error), re.IGNORECASE):
            raise
        ended = "another process of this launch has ended, and told why"
        raise ClipgenError(f"{ended}: run the same command again, with any number of processes, to resume") from None


def launch(function: Callable, *arguments: object, processes: int = 1) -> None:
    """Call a function in that many processes of this machine, from a notebook: one GPU each, or the CPU where there is none.

    With one process it is called right here. What it returns is lost: it must write what is to stay. Raises
    ClipgenError: fewer GPUs than processes, or a process that failed.
    """
    if processes < 1:
        raise ClipgenError(f"{processes} processes cannot be started: give 1 or more")
    if processes == 1:
        function(*arguments)
        return
    from accelerate import debug_launcher, notebook_launcher

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ClipgenError(f"{processes} processes need as many GPUs and this machine has {gpus}: give {gpus}")
    try:
        (notebook_launcher if gpus else debug_launcher)(_joined, (function, *arguments), num_processes=processes)
    except (RuntimeError, ProcessException) as error:  # of a process that failed, with its whole traceback as text
        reason = str(error).strip().splitlines()[-1].removeprefix("clipgen_lib.runtime.runs.ClipgenError: ")
        raise ClipgenError(f"one of {processes} processes failed: {reason}") from None


def _joined(function: Callable, *arguments: object) -> None:
    if not torch.cuda.is_available():
        # a forked process that starts OpenMP threads of its own may wait for ever for those of its parent
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    join()
    if world_size() == 1:  # Accelerate keeps what the notebook's own process was, which is no part of the launch
        raise ClipgenError("Accelerate was used in this notebook before: restart the kernel and launch first")
    with together():
        function(*arguments)
