"""Data sets in .zip files, and from Kaggle."""

import hashlib
import multiprocessing
import stat
import struct
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from plates import archives
from plates.archives import download
from plates.config import UserError
from plates.dataset import load_dataset, load_test_split

LITTER = ("__MACOSX/outer/train/dirty/._0.png", "outer/.DS_Store", "outer/train/dirty/notes.txt", "outer/film.mp4")


def pack(folder: Path, archive: Path, wrapper: str = "outer/") -> Path:
    """As a desktop packs a folder, litter included."""
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(folder.rglob("*.*")):
            packed.write(file, wrapper + file.relative_to(folder).as_posix())
        for name in LITTER:
            packed.writestr(name, "no image")
    return archive


def test_an_archive_is_the_folder_in_it(folder, tmp_path):
    packed, one = load_dataset(str(pack(folder, tmp_path / "photos.ZIP")), 0), load_dataset(str(folder), 0)
    assert (packed.classes, packed.train, packed.val, packed.test) == (one.classes, one.train, one.val, one.test)
    for sample in (*one.train, *one.test):
        assert packed.source.read_bytes(sample.path) == (folder / sample.path).read_bytes()
    assert packed.left_out == "not looked at: 2 files of other kinds (.txt 1, .mp4 1), 2 hidden files"
    assert one.left_out == ""


def test_what_is_wrong_in_an_archive_is_told_of_the_archive(folder, tmp_path):
    (folder / "train" / "dirty").rename(tmp_path / "elsewhere")
    archive = pack(folder, tmp_path / "photos.zip")
    with pytest.raises(UserError, match=f"--data {archive}: in .*/outer: train/ holds 1 class folders"):
        load_dataset(str(archive), 0)


def test_an_archive_is_unpacked_once(folder, tmp_path, own_cache):
    archive = pack(folder, tmp_path / "photos.zip")
    first = load_dataset(str(archive), 0)
    unpacked = own_cache / "archives" / hashlib.sha256(archive.read_bytes()).hexdigest()
    (unpacked / "outer" / "test" / "3.jpg").unlink()
    again = load_dataset(str(archive.rename(tmp_path / "other.zip")), 0)
    assert len(again.test) == 6
    assert again.left_out == first.left_out


def test_an_unpacking_that_was_cut_off_is_begun_again(folder, tmp_path, own_cache):
    archive = pack(folder, tmp_path / "photos.zip")
    begun = own_cache / "archives" / hashlib.sha256(archive.read_bytes()).hexdigest() / "outer" / "test" / "0.jpg"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"half")
    (begun.parent / ".1.jpg.begun").mkdir()
    assert load_dataset(str(archive), 0).left_out.endswith("2 hidden files")
    assert begun.read_bytes() == (folder / "test" / "0.jpg").read_bytes()


def test_processes_at_once_all_end_right(folder, tmp_path):
    archive, fork = pack(folder, tmp_path / "photos.zip"), multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(3), fork.Queue()

    def unpack_beside() -> None:
        barrier.wait()
        dataset = load_dataset(str(archive), 0)
        paths = [sample.path for sample in (*dataset.train, *dataset.val, *dataset.test)]
        results.put((dataset.left_out, {path: dataset.source.read_bytes(path) for path in paths}))

    processes = [fork.Process(target=unpack_beside) for _ in range(3)]
    for process in processes:
        process.start()
    expected = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.*")}
    for _ in processes:
        left_out, images = results.get(timeout=30)
        assert left_out == "not looked at: 2 files of other kinds (.txt 1, .mp4 1), 2 hidden files"
        assert images == expected


def test_the_archive_in_an_archive_is_the_data(folder, tmp_path):
    inner = pack(folder, tmp_path / "plates.zip")
    with zipfile.ZipFile(tmp_path / "competition.zip", "w") as packed:
        packed.write(inner, "plates.zip")
        packed.writestr("sample_submission.csv", "id,label\n0,dirty\n")
    assert len(load_dataset(str(tmp_path / "competition.zip"), 0).train) == 13
    (tmp_path / "download").mkdir()
    inner.rename(tmp_path / "download" / "plates.zip")
    assert len(load_test_split(str(tmp_path / "download"), 0).test) == 7


def test_a_table_in_an_archive_names_its_images(folder, tmp_path):
    (folder / "train").rename(folder / "images")
    (folder / "test").rename(tmp_path / "elsewhere")
    rows = [f"images/{file.parent.name}/{file.name},{file.parent.name}" for file in folder.rglob("*/*.*")]
    (folder / "labels.csv").write_text("\n".join(["path,label", *rows]))
    dataset = load_dataset(str(pack(folder, tmp_path / "a.zip")), 0)
    assert (len(dataset.train), len(dataset.val)) == (13, 4)
    assert dataset.source.read_bytes("images/dirty/1.png") == (folder / "images" / "dirty" / "1.png").read_bytes()


def link(archive: zipfile.ZipFile) -> None:
    member = zipfile.ZipInfo("train/dirty/a.jpg")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(member, "/etc/passwd")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda archive: archive.writestr("train/../../a.jpg", "x"), r"'train/../../a.jpg' lies outside"),
        (lambda archive: archive.writestr("/tmp/a.jpg", "x"), "lies outside"),
        (lambda archive: archive.writestr("train\\..\\..\\a.jpg", "x"), "lies outside"),
        (link, "'train/dirty/a.jpg' is a link"),
        (
            lambda archive: archive.writestr("a.bmp", bytes(3 << 20), zipfile.ZIP_DEFLATED),
            "more than 1 MiB or 5",
        ),
        (lambda archive: [archive.writestr(f"{n}.txt", "") for n in range(6)], "more than 1 MiB or 5"),
        (lambda archive: archive.writestr("notes.txt", "x"), "holds no images"),
    ],
)
def test_what_no_data_set_holds_is_not_unpacked(write, message, tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(archives, "MIN_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        write(archive)
    with pytest.raises(UserError, match=message) as raised:
        load_dataset(str(tmp_path / "a.zip"), 0)
    assert str(raised.value).startswith(f"--data {tmp_path}")
    assert "\n" not in str(raised.value)
    left = [file for file in own_cache.rglob("*") if file.is_file() and file.suffix not in (".json", ".lock")]
    assert not left
    assert not list(tmp_path.parent.glob("a.jpg"))


def test_a_member_that_is_more_than_its_header_says_unpacks_to_no_more(tmp_path, own_cache):
    """A bomb that lies: 64 MiB of which the archive's directory tells 10 bytes."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/dirty/a.bmp", bytes(64 << 20))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 10)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="is damaged, or no"):
        load_dataset(str(tmp_path / "a.zip"), 0)
    assert sum(file.stat().st_size for file in own_cache.rglob("*") if file.is_file()) <= 10


@pytest.mark.parametrize("spoil", ["half", "flipped", "no archive", "encrypted"])
def test_a_damaged_archive_is_one_line_and_never_finished(spoil, folder, tmp_path, own_cache):
    archive = pack(folder, tmp_path / "photos.zip")
    data = bytearray(archive.read_bytes())
    if spoil == "half":
        data = data[: len(data) // 2]
    elif spoil == "flipped":
        data[200] ^= 255
    elif spoil == "encrypted":
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(b"no archive" if spoil == "no archive" else data)
    with pytest.raises(UserError, match="is encrypted" if spoil == "encrypted" else "is damaged, or no") as raised:
        load_dataset(str(archive), 0)
    assert "\n" not in str(raised.value)
    assert not list(own_cache.rglob("*.json"))


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Path:
    """A home without credentials, and a Kaggle on this machine that nobody answers for yet; its cache."""
    pytest.importorskip("kagglehub")
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")  # http://localhost:7777
    return tmp_path / "downloads"


class Answers(ThreadingHTTPServer):
    """A Kaggle that answers everything with one status and body."""

    status, body = 200, b""


class Answer(BaseHTTPRequestHandler):
    server: Answers

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)


@pytest.fixture
def server(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "token")
    try:
        server = Answers(("localhost", 7777), Answer)
    except OSError as error:
        pytest.skip(f"kagglehub's test address is taken ({error})")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_kaggle_gives_is_a_data_set(folder, tmp_path, server):
    """A competition whose files are an archive in the archive that Kaggle makes of them."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        packed.write(pack(folder, tmp_path / "plates.zip"), "plates.zip")
    server.body = (tmp_path / "all.zip").read_bytes()
    assert len(load_dataset("kaggle:platesv2", 0).train) == 13


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        ("kaggle:platesv2", 401, "does not know the token .* make a token at https://www.kaggle.com/settings/api"),
        ("kaggle:platesv2", 403, "accept the rules at https://www.kaggle.com/c/platesv2/rules"),
        ("kaggle:someone/plates", 403, "see https://www.kaggle.com/datasets/someone/plates"),
        ("kaggle:platesv2", 404, "none of that name; see https://www.kaggle.com/c/platesv2"),
        ("kaggle:platesv2", 500, "HTTPError"),
        ("kaggle:platesv2", 200, "cannot be had from Kaggle"),  # an empty answer is no archive
    ],
)
def test_what_kaggle_refuses_is_one_line_with_what_to_do(data, status, message, server):
    server.status = status
    with pytest.raises(UserError, match=f"--data {data}: .*{message}") as raised:
        download(data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", ["kaggle:platesv2", "kaggle:someone/plates"])
def test_kaggle_without_account_or_network_is_one_line(data, kaggle, monkeypatch):
    with pytest.raises(UserError, match="needs a Kaggle account; make a token" if "/" not in data else "reached"):
        load_dataset(data, 0)
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("KAGGLE_KEY", "key")
    with pytest.raises(UserError, match="Kaggle cannot be reached"):
        load_dataset(data, 0)
    monkeypatch.delenv("KAGGLE_USERNAME")
    (kaggle.parent / "home").mkdir(exist_ok=True)
    (kaggle.parent / "home" / "kaggle.json").write_text("{")
    with pytest.raises(UserError, match="Invalid Kaggle credentials file"):
        load_dataset(data, 0)


def test_kaggle_without_kagglehub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UserError, match=r"--data kaggle:platesv2: needs kagglehub: pip install kagglehub"):
        load_dataset("kaggle:platesv2", 0)
