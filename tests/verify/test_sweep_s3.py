"""Sweeps through S3: a server of moto's on this machine, and s3fs, as users have it.

Neither is installed with the tests: their botocore needs python-dateutil below 3, and constraints.txt has 4.
"""

from importlib import import_module
from typing import Any

import pytest
from sweep_files import TWO, rows_of, untimed, written

pytest.importorskip(
    "s3fs", reason="s3fs is not installed: pip install s3fs 'moto[server]' in an environment of its own"
)
pytest.importorskip(
    "moto", reason="moto is not installed: pip install s3fs 'moto[server]' in an environment of its own"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of libraries that these bring
]


def test_a_sweep_through_s3_is_the_same(pico, tmp_path, monkeypatch):
    ThreadedMotoServer: Any = import_module("moto.server").ThreadedMotoServer
    from ppx.verify import sweep

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(name, value)
        import fsspec

        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        file = written(tmp_path, TWO, pico)
        sweep(file, tmp_path / "results", storage="s3://bucket/sweep", keep="best")
        sweep(file, tmp_path / "usual")
        usual, travelled = untimed(tmp_path / "usual"), untimed(tmp_path / "results")
        cells = [name for name in usual if name.startswith("cells/")]
        assert cells
        assert {name: travelled[name] for name in cells} == {name: usual[name] for name in cells}
        kept = [row["bundle"].removeprefix("s3://") for row in rows_of(tmp_path / "results")]
        assert all(files.exists(f"{bundle}/complete.json") for bundle in kept)
        files.rm(f"bucket/sweep/{cells[0].rpartition('/')[0]}/complete.json")
        again = sweep(file, tmp_path / "other", storage="s3://bucket/sweep")  # one of them has to run again
        assert len(again.results) == 2
        assert {name: untimed(tmp_path / "other")[name] for name in cells} == {name: usual[name] for name in cells}
    finally:
        server.stop()
