"""Jupyter's names in `comm`: its package of messages between kernel and notebook has the same name as this one.

ipykernel and ipywidgets use `comm.create_comm`, `comm.get_comm_manager` and `comm.base_comm`. The last is a file of
Jupyter's own, found because `comm.__path__` holds the folders of both packages. The first two are made here on top
of it, as installing this package over Jupyter's replaces the file in which it has them. A kernel puts its own in
their place by setting the attributes of `comm`.
"""

import functools
from typing import Any

from comm.base_comm import BaseComm, CommManager


class SilentComm(BaseComm):
    """A comm where no kernel runs: its messages go nowhere."""

    def publish_msg(self, msg_type: str, *args: Any, **keys: Any) -> None:
        """Drop the message."""


def create_comm(*args: Any, **keys: Any) -> BaseComm:
    """A comm for a program that is not a kernel; takes `BaseComm`'s arguments."""
    return SilentComm(*args, **keys)


@functools.cache
def get_comm_manager() -> CommManager:
    """The manager of this process's comms."""
    return CommManager()
