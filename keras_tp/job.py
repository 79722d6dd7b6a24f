"""The job: which ranks there are, how this process joins them, and how it leaves."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from datetime import timedelta

import keras
import torch
import torch.distributed as dist

from keras_tp.errors import LayoutError
from keras_tp.watchdog import start_watching, stop_watching

# As torch has it: how long a collective may wait. (gloo's is for slow networks.)
_LIMITS = {"gloo": timedelta(minutes=30), "nccl": timedelta(minutes=10)}
_VARIABLE = "KERAS_TP_TIMEOUT"
# How much later gloo gives up, which says less.
_LATER = timedelta(minutes=1)


def initialize(backend: str | None = None, *, timeout: timedelta | float | None = None) -> None:
    """Joins the ranks of the job into a process group.

    Under `torchrun` the group spans the ranks it started; without it this
    process becomes a job of one rank. A second call, or one after
    `torch.distributed.init_process_group`, joins nothing, but its timeout counts.

    Call it first in a script that runs on GPUs: it also picks this rank's GPU
    (`LOCAL_RANK`), and Keras creates weights on the GPU that is current.

    From then on a thread of each rank looks once a second whether it waits for the others. After
    `timeout` in one collective it says which rank is missing and where that is, and ends this
    process, so that torchrun ends or restarts the job.

    Args:
        backend: `"gloo"` or `"nccl"`; by default nccl if Keras computes on CUDA
            (see `KERAS_TORCH_DEVICE`), gloo otherwise.
        timeout: how long ranks wait for one that does not come, here and in any collective, as a
            timedelta or in seconds. By default what the environment variable
            `KERAS_TP_TIMEOUT` says, in seconds, or else what torch has: 30 minutes for gloo, 10
            for nccl, whose own watchdog then ends the job.

    Raises:
        LayoutError: more ranks than GPUs on this host, and no backend given; ranks that do not
            come; a timeout that is no number above 0.
    """
    if dist.is_initialized():
        limit = _limit(timeout, dist.get_backend()).total_seconds()
        start_watching(limit, anew=timeout is not None)
    elif launched():
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        join(backend, timeout, int(os.environ.get("LOCAL_RANK", 0)), f"{address}:{port}")
    else:
        join(backend, timeout, int(os.environ.get("LOCAL_RANK", 0)), "", 0, 1)


def launched() -> bool:
    """Whether `torchrun`, or what sets the same environment, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted_here() -> bool:
    """Whether `torchrun` started this process in place of one that failed, all on one host.

    It keeps the store in which ranks tell each other their addresses, with those of ranks that
    are gone (pytorch issue 135712): one that comes early tries to meet the dead. On several
    hosts, whose counts of restarts may differ, its own way out is to be set where it is started:
    `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`.
    """
    told = os.environ.get
    return (
        _in_torchrun()
        and told("GROUP_WORLD_SIZE") == "1"
        and told("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    )


def _in_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def join(
    backend: str | None,
    timeout: timedelta | float | None,
    local_rank: int,
    address: str,
    rank: int | None = None,
    size: int | None = None,
) -> None:
    """Joins the process group and picks a GPU; see `initialize`.

    Args:
        backend: as for `initialize`.
        timeout: as for `initialize`.
        local_rank: which of the ranks on this host this process is.
        address: `"host:port"` where the ranks meet: the first one's, or torchrun's.
        rank: which this one is; else the environment says it.
        size: how many there are; else the environment says it.
    """
    rank = job_rank() if rank is None else rank
    size = job_size() if size is None else size
    on_cuda = device_type() == "cuda"
    if on_cuda:
        gpus = torch.cuda.device_count()
        if local_rank >= gpus and backend is None:
            raise LayoutError(
                f"rank {rank} is number {local_rank} on a host of {gpus} "
                "GPUs, counting from 0. Start as many ranks as GPUs, or let them share with "
                "backend='gloo'.",
                where="this job",
            )
        torch.cuda.set_device(local_rank % gpus)
    backend = backend or ("nccl" if on_cuda else "gloo")
    limit = _limit(timeout, backend)
    store = dist.HashStore() if size == 1 else _meet(address, rank, size, limit)
    torchs = limit if "nccl" in backend else limit + _LATER
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=torchs)
    leave_at_exit()
    start_watching(limit.total_seconds())


def _limit(timeout: timedelta | float | None, backend: str) -> timedelta:
    if isinstance(timeout, timedelta):
        timeout = timeout.total_seconds()
    given = os.environ.get(_VARIABLE) if timeout is None else timeout
    if given is None:
        return _LIMITS.get(backend, _LIMITS["gloo"])
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise LayoutError(
            f"the timeout is {given!r}; it is a number of seconds, above 0.",
            where=f"this job (keras_tp.initialize(timeout=...), or {_VARIABLE})",
        )
    return timedelta(seconds=seconds)


def _meet(address: str, rank: int, size: int, limit: timedelta) -> dist.Store:
    """The store in which ranks tell each other where they are, once all of them have come."""
    host, _, port = address.rpartition(":")
    hosts_it = rank == 0 and not _in_torchrun()
    try:
        kept = dist.TCPStore(
            host.strip("[]"),
            int(port),
            size,
            hosts_it,
            limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise LayoutError(
            f"rank {rank} finds nobody at {address!r} within {limit.total_seconds():.0f} s "
            f"({type(error).__name__}). That is where rank 0, or torchrun, is to be found "
            "(MASTER_ADDR and MASTER_PORT, or the first of the job's addresses).",
            where="this job",
        ) from error
    store: dist.Store = kept
    if restarted_here():
        store = dist.PrefixStore(f"life{os.environ['TORCHELASTIC_RESTART_COUNT']}", kept)
    names = [f"keras_tp/here{other}" for other in range(size)]
    store.set(names[rank], "")
    try:
        store.wait(names, limit)
    except RuntimeError as error:
        missing = [other for other, name in enumerate(names) if not store.check([name])]
        raise LayoutError(
            f"rank {rank} has waited {limit.total_seconds():.0f} s for the {size} ranks of the job "
            f"to come, and these did not: {', '.join(map(str, missing))}. Each must be started, "
            "and each must call keras_tp.initialize() or parallelize. If they need longer, allow "
            f"for it: keras_tp.initialize(timeout=...), or {_VARIABLE} in seconds.",
            where="this job",
        ) from error
    return store


def job_rank() -> int:
    """This process's rank in the job, before and after `initialize`."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def job_size() -> int:
    """Number of ranks in the job, before and after `initialize`."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


_LETTING_GO: list[Callable[[], None]] = []


def let_go_at_exit(let_go: Callable[[], None]) -> None:
    """Has `let_go()` drop references to process groups before this process leaves the job."""
    _LETTING_GO.append(let_go)


@functools.cache
def leave_at_exit() -> None:
    """Has this process leave the job before its interpreter ends."""
    atexit.register(_leave)


def _leave() -> None:
    # The worker threads of a gloo group must end before the interpreter does: one
    # that still lets go of a tensor then finds no interpreter, and aborts a job
    # that was done. They end with the last reference to their group, and the
    # meshes here are to hold the only ones.
    stop_watching()
    for let_go in _LETTING_GO:
        let_go()
    if dist.is_initialized():
        dist.destroy_process_group()


def device_type() -> str:
    """`"cuda"` or `"cpu"`: where Keras puts tensors."""
    return keras.ops.convert_to_tensor(0).device.type
