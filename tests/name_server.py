"""A name server with addresses that a test changes, for gRPC's resolver."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

# Types of records, their class, and the flags of an authoritative answer.
ADDRESS, INTERNET, ANSWER = 1, 1, 0x8580
BIGGEST = 4096


class NameServer:
    """Answers every question for an IPv4 address with ``addresses``, over UDP at ``url``; other questions with none."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.questions = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.url = "127.0.0.1:{1}".format(*self._socket.getsockname())

    def serve(self) -> None:
        """Answer until the socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                question, client = self._socket.recvfrom(BIGGEST)
                if not question:
                    return
                self._socket.sendto(self._answer(question), client)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends what waits in another thread
        self._socket.close()

    def _answer(self, question: bytes) -> bytes:
        end = question.index(b"\0", 12) + 5  # of the name, its type and its class
        (kind,) = struct.unpack(">H", question[end - 4 : end - 2])
        addresses = list(self.addresses) if kind == ADDRESS else []
        self.questions += kind == ADDRESS
        header = question[:2] + struct.pack(">5H", ANSWER, 1, len(addresses), 0, 0)
        # Each record's name is that of the question, which begins at byte 12; it may be kept for no time.
        record = struct.pack(">HHHIH", 0xC00C, ADDRESS, INTERNET, 0, 4)
        return header + question[12:end] + b"".join(record + socket.inet_aton(address) for address in addresses)


@contextlib.contextmanager
def name_server() -> Iterator[NameServer]:
    server = NameServer()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    server.close()
    thread.join(5)
