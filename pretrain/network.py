"""The network by which the processes of several hosts reach each other."""

import ipaddress
import json
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

import psutil
from torch.distributed import Store

from lrnn.errors import UserError

GLOO_NETWORK = "GLOO_SOCKET_IFNAME"
LOOPBACK = "127.0.0.1"


class Place(NamedTuple):
    """Where a process waits for the others: the name of its host, and the address that gloo tells them."""

    host: str
    address: str


def choose_network() -> None:
    """Let gloo use the network by which this host reaches the main process, if its own choice would be loopback.

    gloo binds to the address of the host's name. Debian and Ubuntu give that name 127.0.1.1 in /etc/hosts, which other
    hosts do not reach. A network that the user chose in GLOO_SOCKET_IFNAME is kept. NCCL chooses by itself.
    """
    if GLOO_NETWORK in os.environ or not _is_loopback(_bound_address(socket.gethostname())):
        return
    interface = _interface(_own_address(os.environ["MASTER_ADDR"]))
    if interface is not None:
        os.environ[GLOO_NETWORK] = interface


def check_network(store: Store, rank: int, world_size: int) -> None:
    """Check that gloo's processes can reach each other, before they wait for each other in vain.

    Args:
        store: the store in which the processes met.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        UserError: on all ranks, if there are several hosts and one has only its loopback address to offer.
    """
    if world_size == 1:
        return
    store.set(f"lrnn/place/{rank}", json.dumps(_this_place()))
    if rank == 0:
        places = [Place(*json.loads(store.get(f"lrnn/place/{i}"))) for i in range(world_size)]
        store.set("lrnn/network", _fault(places))
    if fault := store.get("lrnn/network").decode():
        store.set(f"lrnn/told/{rank}", "")
        if rank == 0:  # The store ends with this process.
            store.wait([f"lrnn/told/{i}" for i in range(world_size)])
        raise UserError(fault)


def _fault(places: list[Place]) -> str:
    """Return what is wrong with the places of all processes, an empty string if they are fine."""
    alone = next((place for place in places if _is_loopback(place.address)), None)
    if alone is None or len({place.host for place in places}) == 1:
        return ""
    return (
        f"other hosts do not reach {alone.host}, whose name has the address {alone.address} there: give its address in "
        f"/etc/hosts, as torchrun's --local-addr, or the name of its network interface in {GLOO_NETWORK}"
    )


def _this_place() -> Place:
    name = socket.gethostname()
    chosen = os.environ.get(GLOO_NETWORK)
    if chosen is None:
        return Place(name, _bound_address(name))
    addresses = psutil.net_if_addrs().get(chosen.split(",")[0], [])  # gloo itself refuses an unknown one
    return Place(name, next((a.address for a in addresses if a.family == socket.AF_INET), chosen))


def _bound_address(name: str) -> str:
    """Return the first address of a name that this host can bind to, loopback if there is none, as gloo chooses it."""
    return _first_that_works(name, socket.SOCK_STREAM, lambda s, address: s.bind((address, 0)))


def _own_address(other: str) -> str:
    """Return the address from which this host speaks to another one, loopback if it has none. Nothing is sent."""
    return _first_that_works(other, socket.SOCK_DGRAM, lambda s, address: s.connect((address, 9)))


def _first_that_works(name: str, kind: int, use: Callable[[socket.socket, str], object]) -> str:
    """Return this host's address of the first socket with which `use` reaches an address of the name, or loopback."""
    for family, address in _addresses(name):
        with socket.socket(family, kind) as s:
            try:
                use(s, address)
            except OSError:
                continue
            return str(s.getsockname()[0])
    return LOOPBACK


def _addresses(name: str) -> list[tuple[int, str]]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(family, str(address[0])) for family, _, _, _, address in found]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # the name of an interface
        return address == "lo"


def _interface(address: str) -> str | None:
    """Return the network interface that has an address, None if it is loopback or none has it."""
    if _is_loopback(address):
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(a.address == address for a in found)), None)
