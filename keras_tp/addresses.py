"""Which job a process belongs to, as `keras.distribution.initialize` is told it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from keras_tp.errors import LayoutError

WHERE = "keras.distribution.initialize"


@dataclass(frozen=True)
class Job:
    """What was said of the job; None is what was not.

    Attributes:
        addresses: `"host:port"` of every process, or of the first alone.
        size: number of processes.
        rank: this process's number.
    """

    addresses: tuple[str, ...] = ()
    size: int | None = None
    rank: int | None = None

    def check(self, rank: int, size: int) -> None:
        """Raises LayoutError where the job that there is, is another."""
        problems = []
        if self.size not in (None, size):
            problems.append(f"num_processes is {self.size}, but this job has {size} processes.")
        if self.rank not in (None, rank):
            problems.append(f"process_id is {self.rank}, but this is process {rank} of its job.")
        if problems:
            raise LayoutError(
                [*problems[:-1], f"{problems[-1]} Under torchrun none of it need be said."],
                where=WHERE,
            )

    def complete(self) -> tuple[str, int, int]:
        """Where the ranks meet, how many they are, and which is this one.

        Raises:
            LayoutError: naming what is missing, and where it can be said.
        """
        if self.addresses and self.size is not None and self.rank is not None:
            return self.addresses[0], self.size, self.rank
        said = {
            "job_addresses": self.addresses or None,
            "num_processes": self.size,
            "process_id": self.rank,
        }
        missing = [name for name, value in said.items() if value is None]
        names = ", ".join(f"KERAS_DISTRIBUTION_{name.upper()}" for name in missing)
        raise LayoutError(
            f"{' and '.join(missing)} missing: give all three, set {names} in the environment, or "
            "start the processes with torchrun, which says it by itself.",
            where=WHERE,
        )

    @property
    def local_rank(self) -> int:
        """Which of the processes on its host this one is, so far as the addresses tell."""
        rank = self.rank or 0
        hosts = [address.rpartition(":")[0] for address in self.addresses]
        return hosts[:rank].count(hosts[rank]) if rank < len(hosts) else rank


def read_job(addresses: str | None, size: int | None, rank: int | None) -> Job:
    """Reads the arguments of `keras.distribution.initialize`.

    >>> read_job("10.0.0.1:1234,10.0.0.2:1234", None, 1).complete()
    ('10.0.0.1:1234', 2, 1)

    Raises:
        LayoutError: every number or address that makes no sense, at once.
    """
    listed = tuple(part.strip() for part in addresses.split(",")) if addresses else ()
    if size is None and len(listed) > 1:
        size = len(listed)
    problems = [
        f"address {address!r} is not of the form 'host:port'."
        for address in listed
        if not re.fullmatch(r".+:\d+", address)
    ]
    if size is not None and size < 1:
        problems.append(f"num_processes is {size}; it is a number from 1.")
    if len(listed) > 1 and size != len(listed):
        problems.append(
            f"job_addresses has {len(listed)} addresses, but num_processes is {size}. Give the "
            "address of every process, or of the first alone."
        )
    if rank is not None and not (rank >= 0 and (size is None or rank < size)):
        known = "" if size is None else f" to {size - 1}"
        problems.append(f"process_id is {rank}; it is a number from 0{known}.")
    if problems:
        raise LayoutError(problems, where=WHERE)
    return Job(listed, size, rank)
