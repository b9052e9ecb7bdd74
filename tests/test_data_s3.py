"""Shards from a real S3-compatible server that is killed and started again in the middle."""

import socket
import subprocess
import sys
import time

import pytest

from mae.data import pack, store
from mae.data.known import digits
from mae.data.source import Arrays
from tests.test_data_shards import KEEP, loaded, opened, same

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow


class Server:
    """moto's server with a bucket of packed shards; its memory is lost with it, so they are put anew."""

    def __init__(self, packed):
        self.packed = packed
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("photos")
        for path in sorted(self.packed.rglob("*.*")):
            files.put_file(str(path), f"photos/set/{path.relative_to(self.packed)}")

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path, monkeypatch):
    whole = digits("train", in_chans=3, val_fraction=0.2)
    source = Arrays(whole.images[:400], whole.labels[:400], whole.classes, "digits")
    for split in ("train", "val"):
        pack.pack(source, tmp_path / "packed" / split, KEEP, per_shard=20, workers=1)
    server = Server(tmp_path / "packed")
    for key, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(store, "PAUSE", 0.1)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize(("workers", "kind"), [(0, "auto"), (2, "thread"), (2, "process")])
def test_nothing_is_lost_and_nothing_comes_twice(server, tmp_path, workers, kind):
    plain = loaded(opened(server.packed, tmp_path), 0)
    source = opened("s3://photos/set", tmp_path, retry_s=60.0)
    taken = []

    def steps():
        from mae.data.loader import Loader
        from tests.test_data_shards import LOADING, transform

        loader = Loader(
            source, transform(), 16, 8, 0, max_bad_fraction=0.0, num_workers=workers, **(LOADING | {"workers": kind})
        )
        for epoch in (0, 1):
            yield from ([dict(b) for b in step] for step in loader.steps(epoch))
        loader.close()

    for number, batches in enumerate(steps()):
        taken.append(batches)
        if number == 3:
            server.stop()
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"]).wait()
            server.start()
    same(plain, taken)
    assert source.index.names  # all were read from the bucket: the cache holds them
    assert len(list((tmp_path / "cache" / "shards").rglob("*.tar"))) == 20


def test_a_server_that_is_gone_is_said_in_a_sentence(server, tmp_path):
    server.stop()
    with pytest.raises(ValueError, match="data.root=s3://photos/set cannot be reached"):
        opened("s3://photos/set", tmp_path, retry_s=0.1)
    server.start()
