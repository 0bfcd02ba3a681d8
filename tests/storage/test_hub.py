"""Ids of the hub are taken for checkpoints where nothing here has that name."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from file_cases import listed, read, write
from safetensors.torch import save

from cl_merge import cli
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.storage import open_weights
from cl_merge.storage.hub import is_hub_id


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What the hub was asked for; it has the folders within ``hub`` that a test makes."""
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision, allow_patterns))
        folder = tmp_path / "hub" / repo_id
        if not folder.is_dir():
            raise OSError(f"404: {repo_id} not found\nfor several reasons")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return asked


def model(folder, by):
    write(folder, "model", {"w": torch.ones(3) + by}, "safetensors")
    (folder / "config.json").write_text("{}")


def test_a_merge_of_models_of_the_hub_names_them_by_their_ids(tmp_path, hub):
    for name, by in (("org/base", 0), ("org/one", 1), ("other/two.5", 3)):
        model(tmp_path / "hub" / name, by)
    done = merge_checkpoints("org/base", ["org/one@v1", "other/two.5"], "out", method="average")
    assert read(Path("out"))["w"].tolist() == [3, 3, 3]
    assert Path("out/config.json").read_text() == "{}"
    inputs = json.loads(done.provenance["cl_merge.inputs"])
    assert [entry["file"] for entry in inputs] == ["org/base", "org/one@v1", "other/two.5"]
    assert [(repo, revision) for repo, revision, _ in hub] == [
        ("org/base", None),
        ("org/one", "v1"),
        ("other/two.5", None),
    ]
    assert all("*.safetensors" in wanted and "*.bin" not in wanted for *_, wanted in hub)


def test_pickled_weights_are_asked_for_where_there_are_no_others(tmp_path, hub):
    folder = tmp_path / "hub/org/old"
    model(folder, 0)
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with open_weights("org/old") as weights:
        assert weights.read("w").tolist() == [1, 1, 1]
        assert weights.path == Path("org/old")
    assert [wanted for *_, wanted in hub][1:] == [["*.bin"]]


def test_what_is_here_is_not_asked_for(tmp_path, hub):
    write(Path("runs"), "task", {"w": torch.ones(1)}, "safetensors")
    model(Path("org/base"), 0)
    open_weights("org/base").close()
    for path in ("runs/tsak", "runs/none.pt", "x/none.safetensors", "/a/b", "a", "a/b/c"):
        with pytest.raises(InputError, match="there is no file or folder '"):
            open_weights(path)
    assert hub == []


def test_a_name_that_is_neither_here_nor_on_the_hub(hub, capsys):
    assert cli.main(["merge", "org/none", "org/no@v2", "-o", "out"]) == 2
    assert capsys.readouterr().err == (
        "cl-merge: there is no file or folder 'org/none', and the Hugging Face hub does not give "
        "it: 404: org/none not found\n"
    )
    assert listed(".") == []


def test_nothing_is_downloaded_where_a_file_is_missing(tmp_path, hub):
    model(tmp_path / "hub/org/base", 0)
    with pytest.raises(InputError, match="there is no file or folder 'none.safetensors'"):
        merge_checkpoints("org/base", ["none.safetensors"], "out")
    assert hub == []


def test_without_the_library_of_the_hub(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError) as caught:
        open_weights("org/base")
    assert str(caught.value) == (
        "there is no file or folder 'org/base'; to take it from the Hugging Face hub: pip install "
        "huggingface_hub"
    )


@pytest.mark.parametrize("word", ["a/b@", "a/b@x y", "a b/c", "-a/b", "a/-b", "a/b:key"])
def test_what_is_no_id(word, hub):
    assert not is_hub_id(Path(word))


COMMIT = "0" * 39 + "1"
FILES = {
    "model.safetensors": save({"w": torch.ones(3)}, {"format": "pt"}),
    "config.json": b"{}",
    "photo.png": b"large",
    "original/consolidated.safetensors": b"the same once more",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download of a whole model needs."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []  # noqa: RUF012 - of one server

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.asked.append(path)
        if path.startswith("/api/models/org/name/revision/"):
            files = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode())
        elif path.startswith("/api/models/org/name/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in FILES.items()
            ]
            self.answer(json.dumps(rows).encode())
        elif (name := path.partition(f"/resolve/{COMMIT}/")[2]) in FILES:
            self.answer(FILES[name])
        else:
            self.answer(b"no", 404)

    def answer(self, data, code=200):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_download_takes_the_weights_and_what_describes_them(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = (
        "from cl_merge import merge_checkpoints\n"
        "merge_checkpoints('org/name@main', ['org/name'], 'out', method='average')\n"
        # Without a connection what was downloaded is found again.
        "from huggingface_hub import constants\n"
        "constants.HF_HUB_OFFLINE, constants.ENDPOINT = True, 'http://127.0.0.1:9'\n"
        "merge_checkpoints('org/name', ['org/name@main'], 'again', method='average')"
    )
    port = server.server_address[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    run = [sys.executable, "-c", script]
    try:
        subprocess.run(run, env=environment, cwd=tmp_path, check=True)
    finally:
        server.shutdown()
        server.server_close()
    assert read(tmp_path / "out")["w"].tolist() == [1, 1, 1]
    assert listed(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    got = {path.partition(f"{COMMIT}/")[2] for path in Hub.asked} - {""}
    assert got == {"config.json", "model.safetensors"}
    assert read(tmp_path / "again")["w"].tolist() == [1, 1, 1]
