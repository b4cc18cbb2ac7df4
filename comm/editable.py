"""The build backend of this project: setuptools', and an editable install in which `comm` is ours.

Jupyter's package `comm` lies in site-packages, where Python looks before it asks setuptools for the folders of
editable packages. So the editable wheel gets a finder of its own for this one name, asked first. Ours then offers
Jupyter's names too (`comm.jupyter`). Ordinary wheels are setuptools' alone. Only pip and its like import this.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools.build_meta import (
    build_editable as _setuptools_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# As if the project's folder stood on sys.path, for one name, right before site-packages.
_FINDER = '''"""Finds the editable package comm before one of the same name in site-packages."""
import sys
from importlib.machinery import PathFinder
from itertools import takewhile


class CommFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "comm":
            before = takewhile(lambda entry: not entry.endswith("-packages"), sys.path)
            return PathFinder.find_spec(name, [*before, {root!r}])


sys.meta_path.insert(0, CommFinder)
'''


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """Writes the editable wheel and returns its name."""
    name = _setuptools_editable(wheel_directory, config_settings, metadata_directory)
    add_files(Path(wheel_directory, name), finder_files(Path(__file__).resolve().parents[1]))
    return name


def finder_files(root: Path) -> dict[str, str]:
    """Names and texts of the files for site-packages that make `comm` the one in `root`."""
    module = "_mlx_trainer_comm_finder"
    return {f"{module}.py": _FINDER.format(root=str(root)), f"{module}.pth": f"import {module}\n"}


def add_files(wheel: Path, files: dict[str, str]) -> None:
    """Add text files to a wheel, and to its list of files."""
    with zipfile.ZipFile(wheel) as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()}
    record = next(entry for entry in content if entry.endswith(".dist-info/RECORD"))
    for entry, text in files.items():
        data = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        content[entry] = data
        content[record] += f"{entry},sha256={digest},{len(data)}\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)
