"""What the process that starts the ranks of a job says to them and hears from them: one JSON object a line.

    {"ask": "job"}                                -> {"choices", "tree", "watched", "until", "rungs"}
    {"ask": "verdict", "step": 20, "loss": 2.5}   -> whether the run goes on
    {"ask": "stopped"}                            -> whether it is to save what it has and end
    {"ask": "ended", "code": 4, "message": "…"}   a rank ends for a reason of its own: not to be started anew
    {"ask": "trained"}                            the first rank, which is on this machine, has come to the end

The socket has a name and no file: nothing of it, nor of the job's secrets, outlives the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import struct
import threading
import uuid
from types import TracebackType
from typing import Any

from ftrun.errors import by_code
from ftrun.job import Job
from ftrun.tasks.shared import Watch


class Desk:
    """ended: what the first rank that said why it ends said. trained: whether the first rank, ours, was at the end."""

    def __init__(self, job: Job, watch: Watch | None = None) -> None:
        self.job, self.watch = job, watch
        self.ended: Exception | None = None
        self.trained = False
        self.name = f"ftrun-{uuid.uuid4().hex}"

    def __enter__(self) -> Desk:
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, ask: str, **given: Any) -> Any:
        """The reply to one line."""
        if ask == "job":
            watched: dict[str, Any] = {"watched": self.watch is not None}
            if self.watch is not None:
                watched |= {"until": self.watch.until, "rungs": sorted(self.watch.rungs)}
            return {"choices": self.job.choices, "tree": self.job.tree, **watched}
        if ask == "ended":
            self.ended = self.ended or by_code(given["code"], given["message"])
        elif ask == "trained":
            self.trained = True
        elif self.watch is not None:
            return self.watch.goes_on(given["step"], given["loss"]) if ask == "verdict" else self.watch.stopped()
        return None


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False  # one that waits for a verdict waits no longer than the process lasts

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        super().__init__("\0" + desk.name, _Conversation)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Only this user's processes are heard: a name without a file has no permissions."""
        found = request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", found)[1] == os.getuid()


class _Conversation(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        """One rank's lines, until it ends."""
        assert isinstance(self.server, _Server)
        with contextlib.suppress(OSError):
            for line in self.rfile:
                reply = self.server.desk.answer(**json.loads(line))
                self.wfile.write(json.dumps(reply, default=str).encode() + b"\n")


class Caller:
    """A rank's side."""

    def __init__(self, name: str) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect("\0" + name)
        self._lines = connection.makefile("rwb")

    def ask(self, what: str, **given: Any) -> Any:
        """One line, and the reply to it."""
        self._lines.write(json.dumps({"ask": what, **given}).encode() + b"\n")
        self._lines.flush()
        return json.loads(self._lines.readline())

    def watch(self, told: dict[str, Any], first: bool) -> Watch | None:
        """What a study wants of the run, from the reply to "job": the first rank asks on its way, for all of them."""
        if not told["watched"]:
            return None
        rungs = frozenset(told["rungs"])
        if not first:
            return Watch(rungs=rungs)
        return Watch(
            told["until"],
            rungs,
            lambda step, loss: bool(self.ask("verdict", step=step, loss=loss)),
            lambda: bool(self.ask("stopped")),
        )
