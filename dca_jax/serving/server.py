"""A server's process: its socket, its signals, its beginning and its end."""

import ipaddress
import os
import socket
from types import FrameType
from typing import Any

import uvicorn

from dca_jax.errors import InputError
from dca_jax.fields import shown

BACKLOG = 2048  # connections that wait to be taken


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        InputError: the address is none of this machine's, or taken.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # the latter of a part of a name that is too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"cannot listen on {shown(host)} port {port}: {reason}; choose another --host or --port"
        ) from None


def is_loopback(opened: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(opened.getsockname()[0]).is_loopback


class Server(uvicorn.Server):
    """One that a first signal lets end when its answers are written, and a second at once."""

    def __init__(self, app: Any) -> None:
        options = {"access_log": False, "log_level": "warning", "lifespan": "off", "ws": "none"}
        super().__init__(uvicorn.Config(app, server_header=False, **options))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
