"""How many layers each pipeline stage gets: as many each, by the memory of its machine, or as given."""

import os
import socket
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

import comm
from comm.typed import integers, named_arrays
from parallel.lm_head import output_head, text_model


def even_split(num_layers: int, num_stages: int) -> list[int]:
    """Layers per stage, as equal as can be; the first stages have one more, as the last one has the head."""
    least, more = divmod(num_layers, num_stages)
    return [least + (stage < more) for stage in range(num_stages)]


def memory_split(
    layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, memory_bytes: Sequence[int]
) -> list[int]:
    """Layers per stage so that the fullest machine is as little full as can be; every stage has at least one.

    Args:
        layer_bytes: The size of each layer.
        first_bytes, last_bytes: The sizes of what the first stage (embedding) and the last (norm, head) have besides.
        memory_bytes: The memory of each stage's machine.
    """
    num_layers, num_stages = len(layer_bytes), len(memory_bytes)
    sums = [0]
    for size in layer_bytes:
        sums.append(sums[-1] + size)

    def fullness(stage: int, first: int, last: int) -> float:
        more = first_bytes * (stage == 0) + last_bytes * (stage == num_stages - 1)
        return (sums[last] - sums[first] + more) / memory_bytes[stage]

    # best[n]: the least fullness of the stages so far when they have the first n layers, and their counts.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(num_stages):
        ends = range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
        best = {
            end: min(
                (max(level, fullness(stage, start, end)), [*counts, end - start])
                for start, (level, counts) in best.items()
                if start < end
            )
            for end in ends
        }
    return best[num_layers][1]


def choose_split(
    model: nn.Module, split: str | Sequence[int], group: comm.Group, peers: Sequence[comm.Group] = ()
) -> list[int]:
    """Layers per stage, equal on all ranks.

    Args:
        model: The whole model.
        split: "even", "memory", or the counts.
        group: The stages.
        peers: Groups whose ranks must choose alike (data and tensor parallel): of the machines that hold the
            same stage, the smallest counts.

    Raises:
        ValueError: Unknown, or it does not fit the layers or the stages.
    """
    num_layers = len(text_model(model).model.layers)
    check_split(split, num_layers, group.size)
    if split == "even":
        return even_split(num_layers, group.size)
    if split == "memory":
        core = text_model(model).model
        layers = [_num_bytes(layer) for layer in core.layers]
        head = output_head(model)
        last = _num_bytes(head.module) if head is not None and head.module is not None else 0
        return memory_split(layers, _num_bytes(core.embed_tokens), last, _memory_of_stages(group, peers))
    assert not isinstance(split, str), "checked above"
    return list(split)


def check_split(split: str | Sequence[int], num_layers: int, num_stages: int) -> None:
    """Refuse a split that does not fit.

    Raises:
        ValueError: Unknown, or it does not fit the layers or the stages.
    """
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} layers cannot be cut into {num_stages} stages; each needs at least one.")
    if split in ("even", "memory"):
        return
    if isinstance(split, str):
        raise ValueError(f"split is {split!r}; it must be 'even', 'memory' or a list of layers per stage.")
    counts = list(split)
    if len(counts) != num_stages or any(count < 1 for count in counts) or sum(counts) != num_layers:
        raise ValueError(
            f"split {counts} has {len(counts)} stages and {sum(counts)} layers; {num_stages} stages of at least one "
            f"layer with {num_layers} layers together are needed."
        )


def _memory_of_stages(group: comm.Group, peers: Sequence[comm.Group]) -> list[int]:
    """Bytes that each stage's rank may use: its machine's memory over the ranks of this pipeline on it."""
    hosts = comm.all_gather_object(socket.gethostname(), group)
    mebibytes = mx.array(machine_bytes() // hosts.count(hosts[group.rank]) // 2**20, dtype=mx.int32)
    for peer in peers:
        mebibytes = peer.all_min(mebibytes)
    return [n * 2**20 for n in integers(group.all_gather(mebibytes))]


def machine_bytes() -> int:
    """Memory of this machine."""
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        return int(info["memory_size"] if "memory_size" in info else info["total_memory"])  # Metal's name and CUDA's
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _num_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in named_arrays(module.parameters()))
