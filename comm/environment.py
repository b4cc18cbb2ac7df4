"""The environment that launchers leave for a backend: reading and changing it."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def ring_hosts(environ: Mapping[str, str]) -> list[list[str]]:
    """The "ip:port" addresses of each rank in `MLX_HOSTFILE`; none in `mlx.launch -n 1`'s.

    Raises:
        ValueError: The file is not a list of lists of addresses, or has no entry for this rank.
    """
    path, rank = environ["MLX_HOSTFILE"], environ["MLX_RANK"]
    text = Path(path).read_text().strip()
    if not text:
        return []
    try:
        hosts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"MLX_HOSTFILE={path} is not JSON: {error}.") from None
    if not isinstance(hosts, list) or not all(isinstance(host, list) for host in hosts):
        raise ValueError(f'MLX_HOSTFILE={path} must hold a list of lists of "ip:port".')
    if not rank.isdigit() or int(rank) >= len(hosts):
        raise ValueError(f"MLX_RANK={rank}, but MLX_HOSTFILE={path} names {len(hosts)} ranks.")
    return hosts


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Sets environment variables, or removes those that are None, for the duration of a `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    _change(variables)
    try:
        yield
    finally:
        _change(before)


def _change(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
