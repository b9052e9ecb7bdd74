"""Shards over plain HTTP, from a server that is killed and started again in the middle."""

import logging
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import first_digits, make_loader, of_type

from mae.data import pack, remote
from mae.data.shards.source import Shards
from tests.test_data_shards import KEEP, LOADING, loaded, opened, same, transform

pytest.importorskip("aiohttp")  # with which fsspec speaks HTTP; s3fs brings it


class Server:
    """Something that listens on a port of its own, by `command`, and can be killed and started again."""

    def __init__(self, command):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.command = f"http://127.0.0.1:{self.port}", command(str(self.port))

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.1)

    def stop(self):
        self.process.kill()
        self.process.wait()


def packed_digits(folder):
    """400 images in 20 shards, as train and as val."""
    source = first_digits(400)
    for split in ("train", "val"):
        pack.pack(source, folder / split, KEEP, per_shard=20, workers=1)
    return folder


def read_over_a_restart(source, server, workers, kind, gone):
    """The batches of two epochs, the server being away for `gone` seconds after a few of them."""
    options = LOADING | {"workers": kind, "num_workers": workers, "max_bad_fraction": 0.0}
    loader = make_loader(source, transform(), 16, 8, 0, **options)
    taken, restart, cache = [], None, of_type(remote.Remote, of_type(Shards, source).store).cache
    with ThreadPoolExecutor(1) as pool:
        for epoch in (0, 1):
            for step in loader.steps(epoch):
                taken.append([dict(batch) for batch in step])
                if len(taken) == 4:
                    server.stop()
                    assert len(list(cache.rglob("*.tar"))) < 20  # there is more to come
                    restart = pool.submit(lambda: (time.sleep(gone), server.start()))
        assert restart is not None
        restart.result()
    loader.close()
    return taken


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = packed_digits(tmp_path / "packed")
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder)]
    server = Server(lambda port: [*command, port])
    monkeypatch.setattr(remote, "PAUSE", 0.1)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize(("workers", "kind"), [(0, "auto"), (2, "thread"), (2, "process")])
def test_nothing_is_lost_and_nothing_comes_twice(server, tmp_path, caplog, workers, kind):
    caplog.set_level(logging.INFO)
    plain = loaded(opened(tmp_path / "packed", tmp_path), 0)
    source = opened(server.url, tmp_path, retry_s=60.0)
    same(plain, read_over_a_restart(source, server, workers, kind, gone=1.0))
    assert kind == "process" or "tried again in" in caplog.text  # it was missed
    assert len(list((tmp_path / "cache" / "shards").rglob("*.tar"))) == 20  # all were fetched


def test_shards_without_an_index_are_found_by_the_list_of_files(server, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "packed" / split / "index.bin").unlink()
    assert "shard-000000.tar" in urllib.request.urlopen(f"{server.url}/train/", timeout=5).read().decode()
    source = opened(server.url, tmp_path)
    assert len(source) == 400 and source.labels is not None and len(opened(server.url, tmp_path, "val")) == 400


CLOSED = """
import http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    def list_directory(self, path):
        self.send_error(403)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_an_index_needs_no_list_of_files_and_a_refusal_no_second_try(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = packed_digits(tmp_path / "packed")
    server = Server(lambda port: [sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{CLOSED}", port])
    server.start()
    try:
        assert len(opened(server.url, tmp_path, retry_s=60.0)) == 400
        (folder / "train" / "index.bin").unlink()
        with pytest.raises(ValueError, match=r"cannot be reached: .*403"):
            opened(server.url, tmp_path, retry_s=600.0)
        assert "tried again in" not in caplog.text
    finally:
        server.stop()


def test_a_server_that_is_gone_is_said_in_a_sentence(server, tmp_path):
    server.stop()
    with pytest.raises(ValueError, match=f"data.root={server.url} cannot be reached: .*") as error:
        opened(server.url, tmp_path, retry_s=0.1)
    assert "\n" not in str(error.value)
    server.start()
