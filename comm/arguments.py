"""What a collective may be given: ranks that exist and can be reached, and axes that an array has."""

import mlx.core as mx

from comm.capabilities import Capabilities


def check_rank(rank: int, size: int, what: str) -> None:
    """Refuse a rank that a group of `size` ranks does not have.

    Raises:
        ValueError: It has none of that number; `what` names the argument.
    """
    if not 0 <= rank < size:
        raise ValueError(f"{what} is {rank}; the group has ranks 0 to {size - 1}.")


def check_reach(rank: int, peer: int, size: int, capabilities: Capabilities, backend: str, what: str) -> None:
    """Refuse a message that the backend cannot carry.

    Args:
        rank, peer: The numbers of this rank and the other.
        size: The number of ranks in the group.
        capabilities: What the backend can carry.
        backend: The backend's name, for the message.
        what: What is tried, "send to" or "receive from".

    Raises:
        ValueError: There is no such rank, it is this one, or it is out of reach.
    """
    check_rank(peer, size, f"the rank to {what}")
    near = {(rank - 1) % size, (rank + 1) % size}
    if peer == rank:
        raise ValueError(f"Rank {rank} cannot {what} itself.")
    if capabilities.point_to_point == "none":
        raise ValueError(f"{backend} cannot {what} a rank; use a ring or MPI group.")
    if capabilities.point_to_point == "neighbours" and peer not in near:
        raise ValueError(
            f"Rank {rank} of {size} cannot {what} rank {peer} over {backend}: "
            f"it reaches ranks {sorted(near)} only. Split a group in which they are neighbours."
        )


def checked_axis(x: mx.array, axis: int) -> int:
    """The axis counted from the first; a scalar counts as a vector of one.

    Raises:
        ValueError: The array has no such axis.
    """
    dims = max(x.ndim, 1)
    if not -dims <= axis < dims:
        raise ValueError(f"axis is {axis}; an array of shape {x.shape} has axes 0 to {dims - 1}.")
    return axis % dims
