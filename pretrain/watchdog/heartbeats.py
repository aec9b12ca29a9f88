"""Signs of life between ranks: JSON lines over TCP that no peer, whatever it does, can make wait.

`torch.distributed.TCPStore` would not do: its calls block while the process that serves it is stopped, whatever their
timeout, and it prints stacks when that process ends.
"""

import json
import secrets
import socket
from typing import Any

CONNECT_TIMEOUT_S = 10
LONGEST = 65536  # bytes of an unfinished line: more is no peer of ours

Message = dict[str, Any]


class Channel:
    """A connection that never blocks.

    Attributes:
        closed: the other side is gone, or what it sent was no message.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setblocking(False)
        self._received = b""
        self.closed = False

    def send(self, message: Message) -> None:
        """Send, unless the other side has not read for so long that nothing more fits; then it is dropped."""
        line = json.dumps(message).encode() + b"\n"
        try:
            # A part of a line would spoil the next one.
            self.closed |= self._socket.send(line) < len(line)
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[Message]:
        """What has come since the last call."""
        try:
            while not self.closed:
                data = self._socket.recv(LONGEST)
                self._received += data
                self.closed = not data
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._received = self._received.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if len(self._received) > LONGEST or not all(isinstance(m, dict) for m in messages):
            self.closed = True
            return []
        return messages

    def close(self) -> None:
        self.receive()  # closing on data that nobody read would take the last message from the other side
        self._socket.close()


class Hub:
    """Rank 0's side: the connections of the others.

    Attributes:
        port: where it listens.
        token: what a peer has to show with its first message; the port is open to all who reach this host.
    """

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._strangers: list[Channel] = []
        self._peers: dict[int, Channel] = {}

    def receive(self) -> list[tuple[int, Message]]:
        """What has come since the last call, with the ranks that sent it."""
        early = self._accept()
        return early + [(rank, message) for rank, channel in self._peers.items() for message in channel.receive()]

    def _accept(self) -> list[tuple[int, Message]]:
        """Let in those who show the token; returns what they said next."""
        while True:
            try:
                self._strangers.append(Channel(self._listener.accept()[0]))
            except OSError:  # nobody waits
                break
        waiting: list[Channel] = []
        early: list[tuple[int, Message]] = []
        for channel in self._strangers:
            messages = channel.receive()
            if messages and messages[0].get("token") == self.token:
                rank = messages[0]["rank"]
                if rank in self._peers:
                    self._peers[rank].close()
                self._peers[rank] = channel
                early += [(rank, message) for message in messages[1:]]
            elif messages or channel.closed:
                channel.close()
            else:
                waiting.append(channel)
        self._strangers = waiting
        return early

    def send(self, message: Message) -> None:
        """Send to all."""
        for channel in self._peers.values():
            channel.send(message)

    def connected(self) -> set[int]:
        """Ranks that there is a connection to."""
        return {rank for rank, channel in self._peers.items() if not channel.closed}

    def close(self) -> None:
        for channel in [*self._peers.values(), *self._strangers]:
            channel.close()
        self._listener.close()


def connect(address: tuple[str, int], token: str, rank: int, timeout_s: float = CONNECT_TIMEOUT_S) -> Channel | None:
    """A connection of `rank` to the hub at (host, port), or None where it cannot be reached."""
    try:
        channel = Channel(socket.create_connection(address, timeout=timeout_s))
    except OSError:
        return None
    channel.send({"token": token, "rank": rank})
    return channel
