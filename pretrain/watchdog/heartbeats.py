"""Signs of life between ranks: JSON lines over TCP, sent and received without ever waiting for a peer.

`torch.distributed.TCPStore` is no alternative: its calls block while the process that serves it is stopped, despite
their timeout, and it prints stacks when that process ends.
"""

import json
import secrets
import socket
from typing import Any

CONNECT_TIMEOUT_S = 10
LONGEST = 65536  # bytes of an unfinished line; only a foreign peer sends more

Message = dict[str, Any]


class Channel:
    """A connection that never blocks.

    Attributes:
        closed: whether the other side is gone, or has sent something that is no message.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setblocking(False)
        self._received = b""
        self.closed = False

    def send(self, message: Message) -> None:
        """Send a message. Drop it if the other side has not read for so long that nothing more fits."""
        line = json.dumps(message).encode() + b"\n"
        try:
            # After part of a line, the next line could not be read.
            self.closed |= self._socket.send(line) < len(line)
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[Message]:
        """Return the messages that arrived since the last call."""
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
        # If a socket is closed with unread data, the other side loses the last message that was sent to it.
        self.receive()
        self._socket.close()


class Hub:
    """Rank 0's side: the connections of all other ranks.

    Attributes:
        port: port on which it listens.
        token: secret that the first message of a peer must contain, because anyone who reaches this host can connect.
    """

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._unknown: list[Channel] = []
        self._peers: dict[int, Channel] = {}

    def receive(self) -> list[tuple[int, Message]]:
        """Return the messages that arrived since the last call, each with the rank that sent it."""
        early = self._accept()
        return early + [(rank, message) for rank, channel in self._peers.items() for message in channel.receive()]

    def _accept(self) -> list[tuple[int, Message]]:
        """Accept connections that show the token; return the messages that followed it."""
        while True:
            try:
                self._unknown.append(Channel(self._listener.accept()[0]))
            except OSError:  # Nobody is waiting.
                break
        waiting: list[Channel] = []
        early: list[tuple[int, Message]] = []
        for channel in self._unknown:
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
        self._unknown = waiting
        return early

    def send(self, message: Message) -> None:
        """Send a message to all ranks."""
        for channel in self._peers.values():
            channel.send(message)

    def connected(self) -> set[int]:
        """Return the ranks that are connected."""
        return {rank for rank, channel in self._peers.items() if not channel.closed}

    def close(self) -> None:
        for channel in [*self._peers.values(), *self._unknown]:
            channel.close()
        self._listener.close()


def connect(address: tuple[str, int], token: str, rank: int, timeout_s: float = CONNECT_TIMEOUT_S) -> Channel | None:
    """Connect `rank` to the hub at (host, port). Return None if it cannot be reached."""
    try:
        channel = Channel(socket.create_connection(address, timeout=timeout_s))
    except OSError:
        return None
    channel.send({"token": token, "rank": rank})
    return channel
