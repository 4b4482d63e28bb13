"""The catalogue in a PostgreSQL database with its files in an S3 store, both real."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openm6.hub.catalogue import DATA, MODEL, Catalogue
from tests.conftest import drawing_session
from tests.hub.test_catalogue import records
from tests.processes import free_port

pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow


def program(name: str) -> str | None:
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of its own. It refuses to run as root: then it runs as nobody."""
    if program("initdb") is None:
        pytest.skip("PostgreSQL is not installed")
    folder = Path("/tmp") / f"openm6-postgres-{os.getpid()}"
    folder.mkdir()
    user = None
    if os.getuid() == 0:
        user = "nobody"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)

    def run(name: str, *words: str) -> None:
        subprocess.run([str(program(name)), *words], check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)

    port, data = free_port(), str(folder / "data")
    try:
        run("initdb", "-D", data, "-U", "openm6", "--auth=trust", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "-D", data, "-o", options, "-w", "-l", str(folder / "log"), "start")
        run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "openm6", "catalogue")
        yield f"postgresql+psycopg://openm6@127.0.0.1:{port}/catalogue"
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 store with a bucket."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="models")
    yield "s3://models/openm6"
    server.stop()


def test_versions_numbers_and_files(postgres: str, bucket: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    drawing_session().save(model)
    catalogue = Catalogue(postgres, bucket)
    data = catalogue.add_data("goods", str(records(tmp_path / "goods.jsonl")))
    first = catalogue.add_model("goods", model, made_of=["data:goods"])
    assert first.files.startswith("s3://models/openm6/model") and first.made_of == ((DATA, "goods", data.number),)
    code = (
        "import sys; from pathlib import Path; from openm6.hub.catalogue import Catalogue\n"
        "for _ in range(3): Catalogue(*sys.argv[2:]).add_model('goods', Path(sys.argv[1]))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(model), postgres, bucket]) for _ in range(2)]
    assert [one.wait(180) for one in both] == [0, 0]
    assert [v.number for v in catalogue.versions(MODEL, "goods")] == [1, 2, 3, 4, 5, 6, 7]
    catalogue.promote(catalogue.named("goods@3"))
    again = Catalogue(postgres, bucket)
    fetched = again.fetch(again.named("goods@live"), tmp_path / "copy")
    for path in model.iterdir():
        assert (fetched / path.name).is_dir() == path.is_dir()
        assert path.is_dir() or (fetched / path.name).read_bytes() == path.read_bytes()
    assert [one.version.full_name for one in again.lineage(first).made_of] == ["goods@1"]
