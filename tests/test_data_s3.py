"""Shards from a real S3-compatible server that is killed and started again in the middle.

The server (moto) is not installed beside us, for it wants another antlr than Hydra: MOTO_PYTHON names a python
that has it, as .ci/run does.
"""

import os

import pytest

from mae.data import remote
from tests.test_data_http import Server, packed_digits, read_over_a_restart
from tests.test_data_shards import loaded, opened, same

s3fs = pytest.importorskip("s3fs")
PYTHON = os.environ.get("MOTO_PYTHON", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="MOTO_PYTHON names no python that has moto")]


class Bucket(Server):
    """moto's server with a bucket of packed shards; its memory is lost with it, so they are put anew."""

    def __init__(self, packed):
        super().__init__(lambda port: [PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", port])
        self.packed = packed

    def start(self):
        super().start()
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("photos")
        for path in sorted(self.packed.rglob("*.*")):
            files.put_file(str(path), f"photos/set/{path.relative_to(self.packed)}")


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Bucket(packed_digits(tmp_path / "packed"))
    for key, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(remote, "PAUSE", 0.1)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize(("workers", "kind"), [(0, "auto"), (2, "thread"), (2, "process")])
def test_nothing_is_lost_and_nothing_comes_twice(server, tmp_path, workers, kind):
    plain = loaded(opened(server.packed, tmp_path), 0)
    source = opened("s3://photos/set", tmp_path, retry_s=60.0)
    same(plain, read_over_a_restart(source, server, workers, kind, gone=2.0))
    assert len(list((tmp_path / "cache" / "shards").rglob("*.tar"))) == 20  # all were read from the bucket


def test_a_server_that_is_gone_is_said_in_a_sentence(server, tmp_path):
    server.stop()
    with pytest.raises(ValueError, match="data.root=s3://photos/set cannot be reached"):
        opened("s3://photos/set", tmp_path, retry_s=0.1)
    server.start()
