"""Where the launchers of a job's machines meet: torch's c10d rendezvous, to which they may come in any order, and to
which none comes back whose worker has ended for a reason of its own.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta

from torch.distributed import Store
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from ftrun.errors import UserError

BACKEND, ROUND = "ftrun", "FTRUN_ROUND"
PATIENCE = 900  # seconds that machines wait for one another
_LOOK = 1.0  # seconds between two looks at whether the host is there


class Rendezvous(DynamicRendezvousHandler):
    """ended: what a worker of this machine has ended with, which is raised where the next round would begin."""

    ended: Callable[[], Exception | None]

    def get_backend(self) -> str:
        """See base class."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """See base class. A round's workers find ROUND in their environment, the same on all machines."""
        if (why := self.ended()) is not None:
            raise why
        found = super().next_rendezvous()
        if found.rank == 0:
            found.store.set(ROUND, uuid.uuid4().hex)
        os.environ[ROUND] = found.store.get(ROUND).decode()
        return found


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """A handler for torch's launcher. Raises UserError where the place to meet cannot be reached."""
    backend, store = _backend(parameters)
    made = Rendezvous.from_backend(
        parameters.run_id,
        store,
        backend,
        parameters.min_nodes,
        parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(join=timedelta(seconds=PATIENCE)),
    )
    made.ended = parameters.config["ended"]
    return made


def _backend(parameters: RendezvousParameters) -> tuple[C10dRendezvousBackend, Store]:
    """The machine of the endpoint holds the store; the others connect to it once it is there."""
    host, _, port = parameters.endpoint.rpartition(":")
    try:
        here = _is_here(host)
    except OSError as error:
        raise UserError(f"rdzv_endpoint={parameters.endpoint}: no such host: {error.strerror}") from None
    if not here:
        _wait_for(parameters.endpoint, host, int(port))
    try:
        parameters.config["is_host"] = here and not _answers(host, int(port))
        return create_backend(parameters)
    except RendezvousConnectionError:
        if not parameters.config["is_host"]:
            raise
        parameters.config["is_host"] = False  # another launcher of this machine was quicker
        return create_backend(parameters)


def _is_here(host: str) -> bool:
    """Whether a host's name or address is this machine's. Raises OSError for a name that nobody knows."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with suppress(OSError), closing(socket.socket(family, kind, protocol)) as probe:
            probe.bind(address)  # only an address of one's own can be bound
            return True
    return False


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 2 * _LOOK).close()
    except OSError:
        return False
    return True


def _wait_for(endpoint: str, host: str, port: int) -> None:
    """Until the host is there: torch's own waiting hears no Ctrl-C, and prints a trace for each try."""
    until = time.monotonic() + PATIENCE
    while not _answers(host, port):
        if time.monotonic() > until:
            raise UserError(f"rdzv_endpoint={endpoint}: nobody answers there; is ftrun started on that machine?")
        time.sleep(_LOOK)


rendezvous_handler_registry.register(BACKEND, create)
