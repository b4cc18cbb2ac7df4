"""`comm` is also the name of a package of Jupyter's. Here both are in one environment, in every order.

The default tests use a stand-in with the layout of Jupyter's package. With `--exhaustive` a fresh environment gets the
real one, ipykernel and ipywidgets from the package index, and a real kernel trains a step.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from comm.editable import add_files, finder_files

ROOT = Path(__file__).parents[2]
THEIR_INIT = """
from .base_comm import BaseComm
__all__ = ["create_comm", "get_comm_manager"]
def create_comm(): ...
def get_comm_manager(): ...
"""
THEIR_BASE = """
import comm
class BaseComm:
    def __init__(self, target_name=""):
        self.target_name = target_name
        comm.get_comm_manager().comms.append(self)
        self.publish_msg("comm_open", data={}, metadata=None, buffers=None, target_name=target_name)
    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **keys):
        raise NotImplementedError
class CommManager:
    def __init__(self):
        self.comms = []
"""
HIDDEN = "lacks mlx-trainer's names, since Jupyter's package of that name"
BOTH_WORK = """
import comm, comm.base_comm
manager = comm.get_comm_manager()
assert isinstance(manager, comm.base_comm.CommManager) and comm.get_comm_manager() is manager
made = comm.create_comm(target_name="slider")
assert isinstance(made, comm.base_comm.BaseComm) and manager.comms == [made]
comm.create_comm = lambda: "the kernel's"
from comm import create_comm
assert create_comm() == "the kernel's"
"""
TRAIN_A_STEP = """
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
from mlx_lm.models import llama
from parallel import TensorParallel, init, value_and_grad

sizes = dict(model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=4,
             rms_norm_eps=1e-6, vocab_size=64)
model = TensorParallel(llama.Model(llama.ModelArgs(**sizes)), init())
def loss_fn(model, batch):
    losses = nn.losses.cross_entropy(model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:])
    return losses.sum(), mx.array(losses.size)
step, optimizer, losses = value_and_grad(model, loss_fn), optim.Adam(1e-2), []
for _ in range(3):
    loss, grads, num_tokens = step([{"tokens": mx.arange(24).reshape(2, 12)}])
    optimizer.update(model, grads)
    losses.append(loss.item())
assert losses[2] < losses[1] < losses[0] and num_tokens.item() == 22
print("trained")
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages with the stand-in for Jupyter's `comm`."""
    folder = tmp_path / "site-packages"
    write_theirs(folder)
    return folder


def write_theirs(folder: Path) -> None:
    (folder / "comm").mkdir(parents=True, exist_ok=True)
    (folder / "comm" / "__init__.py").write_text(THEIR_INIT)
    (folder / "comm" / "base_comm.py").write_text(THEIR_BASE)


def write_ours(folder: Path) -> None:
    for package in ("comm", "parallel", "trainer"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, dirs_exist_ok=True, ignore=ignored)


def python(site: Path, code: str, *further: Path) -> subprocess.CompletedProcess:
    """Runs code where `site` is the first folder of installed packages, then `further`; ours is nowhere else."""
    start = (
        f"import sys, site\nsite.addsitedir({str(site)!r})\n"
        f"sys.path += {[*map(str, further), sysconfig.get_path('purelib')]!r}\n"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", start + code], cwd=site.parent, capture_output=True, text=True, timeout=120
    )


def test_editable_install_goes_before_theirs(site: Path) -> None:
    """Jupyter's `comm`, in site-packages, found before the editable one; its names missing from ours; a package of
    that name in the program's own folder no longer found first."""
    for name, text in finder_files(ROOT).items():
        (site / name).write_text(text)
    done = python(site, BOTH_WORK + TRAIN_A_STEP, ROOT)
    assert done.stdout == "trained\n", done.stderr
    (site.parent / "own" / "comm").mkdir(parents=True)
    (site.parent / "own" / "comm" / "__init__.py").write_text("mine = True")
    done = python(site, "sys.path.insert(0, 'own')\nimport comm\nprint(comm.mine)")
    assert done.stdout == "True\n", done.stderr


def test_ours_installed_over_theirs(site: Path) -> None:
    """Jupyter's names gone with the file that ours replaced."""
    write_ours(site)
    done = python(site, BOTH_WORK + TRAIN_A_STEP)
    assert done.stdout == "trained\n", done.stderr


def test_without_jupyter_its_names_are_absent() -> None:
    """`hasattr(comm, "create_comm")` that raises, or an error about a missing file of ours."""
    done = python(ROOT, "import comm\nprint(hasattr(comm, 'create_comm'))\ncomm.get_comm_manager")
    assert done.stdout == "False\n", done.stderr
    assert done.stderr.endswith("AttributeError: comm.get_comm_manager is Jupyter's; it needs ipykernel installed.\n")


@pytest.mark.parametrize("later", ["installed", "removed"])
def test_one_sentence_where_theirs_hides_ours(tmp_path: Path, later: str) -> None:
    """`cannot import name 'init' from 'comm'`, or a traceback of the command line, for Jupyter's `comm` installed
    over ours, or removed with the file that both have."""
    site = tmp_path / "site-packages"
    write_ours(site)
    if later == "installed":
        write_theirs(site)
    else:
        (site / "comm" / "__init__.py").unlink()
    done = python(site, "try:\n    import parallel\nexcept ImportError as error:\n    print(error)")
    assert done.stdout.count("\n") == 1 and HIDDEN in done.stdout, done.stderr
    assert "pip install --force-reinstall --no-deps" in done.stdout and str(site / "comm") in done.stdout
    recipe = ROOT / "recipes" / "quickstart.yaml"
    for verb in ("run", "generate", "validate") if later == "installed" else ():
        target = str(tmp_path) if verb == "generate" else str(recipe)
        done = python(site, f"from trainer.__main__ import main\nsys.exit(main([{verb!r}, {target!r}]))")
        assert "Traceback" not in done.stderr
        assert done.returncode == (0 if verb == "validate" else 1), done.stderr
        assert verb == "validate" or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)


def test_editable_wheel_lists_what_is_added(tmp_path: Path) -> None:
    """A wheel whose list of files lacks one of them, which installers refuse or never remove."""
    wheel = tmp_path / "a-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a-1.dist-info/RECORD", "a.py,,\n")
    add_files(wheel, {"b.pth": "import b\n"})
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("b.pth") == b"import b\n"
        record = archive.read("a-1.dist-info/RECORD").decode()
    assert record == "a.py,,\nb.pth,sha256=p-77zyolADj5IU1If5io6gr-oeJZPcAwhbhKs-SvZlQ,9\n"


KERNEL = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3")
try:
    messages = []
    reply = client.execute_interactive(sys.argv[1], output_hook=messages.append, timeout=120)
    print(reply["content"]["status"])
    print("".join(message["content"].get("text", "") for message in messages))
    print([message["content"]["target_name"] for message in messages if message["msg_type"] == "comm_open"])
    print(*reply["content"].get("traceback", ()), sep="\\n")
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""
WIDGET = "\nimport ipywidgets\nipywidgets.IntSlider().value = 3\n"


@pytest.mark.parametrize("order", ["editable", "after", "before"])
def test_real_kernel(tmp_path: Path, exhaustive: None, order: str) -> None:
    """What the stand-in does not have: ipykernel's and ipywidgets' real use of `comm`, and what pip does to a folder
    that two packages share."""
    venv.create(tmp_path / "env", with_pip=True)
    inside = tmp_path / "env" / "bin" / "python"
    ours = ["-e", str(ROOT)] if order == "editable" else [str(shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored))]
    lots = [["ipykernel", "ipywidgets"], ["--no-deps", *ours]]
    for lot in lots[::-1] if order == "before" else lots:
        subprocess.run([inside, "-m", "pip", "install", "-q", *lot], check=True, cwd=tmp_path)
    packages = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (packages / "zz-mlx.pth").write_text(sysconfig.get_path("purelib") + "\n")  # MLX and mlx-lm from here, last

    def kernel(code: str) -> subprocess.CompletedProcess:
        command = [inside, "-c", KERNEL, code]
        return subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=240)

    done = kernel(WIDGET + TRAIN_A_STEP)
    if order == "before":
        assert done.stdout.startswith("error") and HIDDEN in done.stdout, done.stderr
        again = ["-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", str(tmp_path / "copy")]
        assert f"{' '.join(again[1:3])} --force-reinstall --no-deps {tmp_path / 'copy'}" in done.stdout
        subprocess.run([inside, *again], check=True, cwd=tmp_path)
        done = kernel(WIDGET + TRAIN_A_STEP)
    assert done.stdout.startswith("ok\ntrained\n") and "'jupyter.widget'" in done.stdout, done.stdout + done.stderr


def ignored(folder: str, names: list[str]) -> set[str]:
    """What a copy of the project for installing does not need."""
    return {name for name in names if name in ("tests", "build", "runs", "__pycache__") or name.startswith(".")}
