"""A digest of a model folder's weights that reads little of them: shard names, sizes, headers and sampled blocks.

It tells another model of the same shape apart, not a change of single numbers between the samples of a large file.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

NUM_BLOCKS = 16  # of each shard
BLOCK_BYTES = 1 << 16


def weights_digest(folder: Path) -> str:
    """sha256 of the folder's safetensors files, as far as they are read; kept as long as sizes and times stay."""
    files = sorted(folder.glob("*.safetensors"))
    return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    content = hashlib.sha256()
    for path, size, _ in files:
        content.update(f"{Path(path).name} {size}\n".encode())
        with open(path, "rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            content.update(file.read(min(header_bytes, size)))
            last = max(size - BLOCK_BYTES, 0)
            for start in sorted({last * block // (NUM_BLOCKS - 1) for block in range(NUM_BLOCKS)}):
                file.seek(start)
                content.update(file.read(BLOCK_BYTES))
    return content.hexdigest()
