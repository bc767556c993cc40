"""Prints what the launcher and the collectives need to know of this node's network: address, interface, host or not.

    python network.py MASTER_ADDR [LOCAL_ADDR]      ->      10.0.0.2 eth0 false

LOCAL_ADDR is the address that the route to MASTER_ADDR leaves from, unless it is given. The interface is the one that
carries it, "-" if none does by name. The last word says whether this node is MASTER_ADDR, and so holds the rendezvous.

Standard library only: it runs before anything else does. Linux.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """Returns the family and the first address of ``host``; raises ValueError where it has none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"MASTER_ADDR={host!r} has no address ({error}); give a training node's name") from None
    return family, str(address[0])


def source_address(family: socket.AddressFamily, address: str) -> str:
    """Returns the local address of the route to ``address``; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise ValueError(f"no route to MASTER_ADDR ({address}): {error}; check the node's network") from None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Returns the name of the interface that carries ``address``, "-" if there is none."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return "lo"
    if wanted.version == 6:
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if ipaddress.ip_address(bytes.fromhex(fields[0])) == wanted:
                return fields[5]
        return "-"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return "-"


def main(arguments: list[str]) -> int:
    """Returns the exit code; prints one line."""
    if len(arguments) not in (1, 2):
        print("usage: network.py MASTER_ADDR [LOCAL_ADDR]", file=sys.stderr)
        return 2
    try:
        family, master = resolve(arguments[0])
        local = arguments[1] if len(arguments) == 2 else source_address(family, master)
        print(local, interface_of(local), "true" if local == master else "false")
    except ValueError as error:
        print(f"network: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
