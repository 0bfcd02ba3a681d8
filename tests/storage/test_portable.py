"""On systems that lack what Linux has, task vectors, merges of files and the callback work too."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# What macOS and Windows lack, or what fails there. Torch and Lightning are imported before: what
# they use on Linux is not the question.
TAKE_AWAY = """\
import builtins, io, mmap, os, pathlib, resource, sys

def lacks(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

MACOS = ("O_TMPFILE", "posix_fallocate", "posix_fadvise", "sched_getaffinity", "memfd_create")
MACOS += ("fdatasync", "copy_file_range", "sendfile", "splice")
WINDOWS = ("pread", "preadv", "pwrite", "pwritev", "O_DIRECTORY", "fork", "getuid", "geteuid")
WINDOWS += ("mkfifo", "killpg", "getpgid", "setsid", "getloadavg")

def without_proc(original):
    def refusing(path, *arguments, **options):
        if isinstance(path, (str, os.PathLike)) and str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return original(path, *arguments, **options)
    return refusing

def take_away(system):
    lacks(os, *MACOS)
    lacks(mmap, *[name for name in dir(mmap) if name.startswith("MADV_")])
    lacks(mmap, "MAP_NORESERVE", "MAP_POPULATE")
    io.open = builtins.open = without_proc(builtins.open)
    os.open = without_proc(os.open)
    os.listdir = without_proc(os.listdir)
    if system == "macos":
        return
    lacks(os, *WINDOWS)
    lacks(mmap, "MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE", "MAP_ANONYMOUS")
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    open_file = os.open
    def no_folder(path, flags, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, flags, *arguments, **options)
    os.open = no_folder
    fsync = os.fsync
    def fsync_of_writable(handle):
        os.write(handle, b"")
        fsync(handle)
    os.fsync = fsync_of_writable
    def refuse_open_files(original):
        def replace(source, target):
            if os.path.isdir(target):
                raise PermissionError(13, "Access is denied", str(target))
            for mapped in MAPS():
                if mapped in (os.path.realpath(source), os.path.realpath(target)):
                    raise PermissionError(1224, "a file that is mapped is open", mapped)
            return original(source, target)
        return replace
    sys.platform = "win32"
    os.replace = refuse_open_files(os.replace)
    os.rename = refuse_open_files(os.rename)

def MAPS(read=io.open):
    with read("/proc/self/maps") as file:
        return {line.split(maxsplit=5)[5].strip() for line in file if line.count("/")}
"""

WORK = """\
import sys
import torch
from torch import nn
import lightning as L
from portable_system import take_away
import safetensors.torch, xxhash, filelock

take_away(sys.argv[1])

from pathlib import Path
from cl_merge import TaskVector, merge_checkpoints
from cl_merge.callbacks import MergeCallback
from cl_merge.storage.files import load_state, remove_leftovers, save_state

base = {"w": torch.randn(70, 90), "b": torch.randn(90)}
files = []
for task in range(3):
    tuned = {name: tensor + torch.randn_like(tensor) for name, tensor in base.items()}
    for store in ("float32", "int4"):
        vector = TaskVector.between(base, tuned)
        for _ in range(2):
            vector.save(f"task{task}-{store}.safetensors", store=store)
            vector = TaskVector.load(f"task{task}-{store}.safetensors")
        files.append(f"task{task}-{store}.safetensors")
for folder in ("base", "base.safetensors"):
    save = safetensors.torch.save_file
    Path("base").mkdir(exist_ok=True)
    save(base, "base/model.safetensors" if folder == "base" else folder)
torch.save({"state_dict": base}, "base.pt")
Path("folder").mkdir()
for output in ("merged.safetensors", "folder", "new/folder"):
    for given in ("base", "base.safetensors", "base.pt"):
        out = output if given == "base" else f"{given}-{output.replace('/', '-')}"
        merge_checkpoints(given, files, out, method="ties", shard_bytes=10_000)
merge_checkpoints("base", files, "merged.safetensors", method="magmax", overwrite=True)
save_state("state.ckpt", {"w": torch.ones(2)})
save_state("state.ckpt", load_state("state.ckpt"))
remove_leftovers(".")

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
    def training_step(self, batch, index):
        return self.layer(batch).square().mean()
    def test_step(self, batch, index):
        self.log("loss", self.layer(batch).square().mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

model = Model()
callback = MergeCallback("magmax", directory="vectors")
loader = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)
for task in range(2):
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )
    trainer.fit(model, loader)
    trainer.test(model, loader, verbose=False)
print(sorted(path.name for path in Path(".").rglob("*") if path.name.startswith(".")))
"""


@pytest.mark.parametrize("system", ["macos", "windows"])
def test_task_vectors_merges_and_the_callback_need_nothing_of_linux(tmp_path, system):
    (tmp_path / "portable_system.py").write_text(TAKE_AWAY)
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "in").mkdir()
    path = os.pathsep.join(str(entry) for entry in (tmp_path, *sys.path) if entry)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "work.py", system],
        cwd=tmp_path / "in",
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert (tmp_path / "in/new/folder/model.safetensors.index.json").exists()
    assert len(list((tmp_path / "in/vectors").glob("*.safetensors"))) == 2
