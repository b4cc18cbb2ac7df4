"""`init` of our `comm`, or one sentence where Python finds Jupyter's package of that name instead.

Jupyter's `comm`, installed after ours into the same folder, replaces our `comm/__init__.py`; uninstalled, it takes
that file away.
"""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import comm

DISTRIBUTION = "mlx-trainer"


def hidden_comm(error: ImportError) -> ImportError:
    """What to raise where our names cannot be imported from `comm`: `error`, if the package is ours."""
    if "GradientFusion" in dir(comm):
        return error
    found = getattr(comm, "__file__", None) or ", ".join(comm.__path__)
    return ImportError(
        f"The package `comm` that Python finds ({found}) lacks {DISTRIBUTION}'s names, since Jupyter's package of that "
        f"name was installed or removed later; this command mends it, for both: {install_command()}"
    )


def install_command() -> str:
    """The pip command that puts our files back, from where they were installed."""
    words = ["pip", "install", "--force-reinstall", "--no-deps"]
    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:  # a checkout that was never installed
        return shlex.join([*words, "-e", str(Path(__file__).parents[1])])
    if text is None:  # from a package index
        return shlex.join([*words, DISTRIBUTION])
    origin = json.loads(text)
    if origin.get("dir_info", {}).get("editable"):
        words.append("-e")
    url = urlparse(origin["url"])
    kind = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
    return shlex.join([*words, url2pathname(url.path) if url.scheme == "file" and not kind else kind + url.geturl()])


try:
    from comm import init as init
except ImportError as error:
    raise hidden_comm(error) from None
