import http.server
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from moezoo.errors import UserError
from moezoo.zoo.base import ZooModel
from moezoo.zoo.transfer import Remote, sha256_of
from moezoo.zoo.weights import Places, download, find, load, load_folder, verify
from torch import nn

NAME = "ranking/blob"
FILES = ("config.json", "README.md", "model.safetensors")


class Blob(ZooModel):
    def __init__(self, floats=1_000_000):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(floats))


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of server.root, with Range; server.faults may cut, stall or withhold ranges."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        server, asked = self.server, self.headers.get("Range")
        if body:
            server.requests.append((self.path.rpartition("/")[2], asked))
        server.hold(self.path)
        file = server.root / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data, start = file.read_bytes(), 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            cut = server.cuts.pop(0) if file.name == "model.safetensors" and server.cuts else None
            self.wfile.write(data[start:][:cut])
            self.wfile.flush()
            if cut is not None:
                server.before_cut()
                self.close_connection = True

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.requests, self.cuts, self.ranges = root, [], [], True
        self.before_cut = lambda: None
        self.hold = lambda path: None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self, file):
        return [wanted for name, wanted in self.requests if name == file]


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blob") / "weights"
    Blob().save_pretrained(folder, recipe=NAME, version="1")
    return folder


def _put(root: Path, folder: Path, version="1", spoil=None) -> dict:
    """A store as `publish` leaves it, for a class outside the zoo; `spoil` changes the manifest."""
    target = root / NAME / version
    target.mkdir(parents=True)
    files = {}
    for file in FILES:
        data = (folder / file).read_bytes()
        (target / file).write_bytes(data)
        files[file] = {"sha256": sha256_of(folder / file), "bytes": len(data)}
    manifest = {"format": 1, "recipe": NAME, "version": version, "files": files} | (spoil or {})
    (target / "manifest.json").write_text(json.dumps(manifest))
    (root / NAME / "latest.json").write_text(json.dumps({"format": 1, "version": version}))
    return manifest


@pytest.fixture
def server(tmp_path):
    (tmp_path / "store").mkdir()
    server = Server(tmp_path / "store")
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def places(tmp_path, server):
    return Places(tmp_path / "shipped", tmp_path / "cache", server.url)


def _offline(places):
    return Places(places.shipped, places.cache, None)


def _same(folder, blob):
    return all((folder / file).read_bytes() == (blob / file).read_bytes() for file in FILES)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _final_folders(places):
    return [path.name for path in (places.cache / NAME).glob("[!.]*")]


def test_download_then_cache(server, places, blob):
    _put(server.root, blob)
    folder = find(NAME, places=places)
    assert folder == places.cache / NAME / "1"
    assert _same(folder, blob)
    assert torch.equal(Blob.from_pretrained(folder).weight, Blob.from_pretrained(blob).weight)
    before = list(server.requests)
    assert find(NAME, places=places) == folder  # from the cache
    assert download(NAME, "1", places=places) == folder
    assert server.requests == before
    assert find(NAME, places=_offline(places)) == folder
    assert find(NAME, "1", places=Places(places.shipped, places.cache, "http://127.0.0.1:9/")) == folder


def test_a_file_url_is_a_store_too(server, places, blob):
    _put(server.root, blob)
    folder = find(NAME, places=Places(places.shipped, places.cache, server.root.as_uri()))
    assert _same(folder, blob)
    assert server.requests == []


def test_shipped_weights_come_first(server, places, blob):
    _put(server.root, blob, version="2")
    (places.shipped / "ranking").mkdir(parents=True)
    Blob(3).save_pretrained(places.shipped / NAME, recipe=NAME, version="1")
    assert find(NAME, places=places) == places.shipped / NAME == find(NAME, "1", places=places)
    assert server.requests == []
    assert find(NAME, "2", places=places) == places.cache / NAME / "2"
    damaged = {"sha256": "0" * 64, "bytes": 1, "version": "1"}
    with pytest.raises(UserError, match="reinstall moezoo"):
        find(NAME, expected=damaged, places=places)


def test_the_newest_version_is_taken_by_number(server, places, blob):
    for version in ("2", "10"):
        _put(server.root, blob, version=version)
        download(NAME, version, places=places)
    assert find(NAME, places=_offline(places)).name == "10"


def test_resume_asks_for_the_remainder_only(server, places, blob):
    _put(server.root, blob)
    server.cuts = [2_500_000]
    part = places.cache / NAME / ".1.partial" / "model.safetensors.part"
    server.before_cut = lambda: _wait(lambda: _size(part) == 2_500_000)
    assert _same(find(NAME, places=places), blob)
    assert server.asked("model.safetensors") == [None, "bytes=2500000-"]


def test_resume_where_the_server_knows_no_ranges(server, places, blob):
    _put(server.root, blob)
    server.cuts, server.ranges = [2_500_000], False
    assert _same(find(NAME, places=places), blob)
    assert len(server.asked("model.safetensors")) == 2


def test_progress_resets_the_patience(server, places, blob):
    _put(server.root, blob)
    server.cuts = [500_000] * 7  # more cuts than attempts without progress
    remote = Remote(server.url, pause=0.001)
    target = places.cache.with_name("target")
    part = target.with_name("target.part")
    server.before_cut = lambda: _wait(lambda: _size(part) == 500_000 * (7 - len(server.cuts)))
    size, sha256 = (blob / FILES[2]).stat().st_size, sha256_of(blob / FILES[2])
    remote.fetch(f"{NAME}/1/model.safetensors", target, size=size, sha256=sha256)
    assert sha256_of(target) == sha256
    assert len(server.asked("model.safetensors")) == 8


def test_a_connection_that_keeps_breaking_is_one_line_and_leaves_the_part(server, places, blob, tmp_path):
    _put(server.root, blob)
    server.cuts = [1_000_000] + [0] * 50
    size, sha256 = (blob / FILES[2]).stat().st_size, sha256_of(blob / FILES[2])
    target = tmp_path / "target"
    with pytest.raises(UserError, match=r"broke off after .* run again to go on") as caught:
        Remote(server.url, pause=0.001).fetch(f"{NAME}/1/model.safetensors", target, size=size, sha256=sha256)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert 0 < target.with_name("target.part").stat().st_size <= 1_000_000


def test_a_stale_part_is_thrown_away(server, places, blob):
    _put(server.root, blob)
    partial_folder = places.cache / NAME / ".1.partial"
    partial_folder.mkdir(parents=True)
    (partial_folder / "model.safetensors.part").write_bytes(b"of another edition" * 1000)
    assert _same(find(NAME, places=places), blob)
    assert server.asked("model.safetensors") == ["bytes=18000-", None]


def test_a_corrupted_file_is_removed_and_named(server, places, blob):
    manifest = _put(server.root, blob)
    path = server.root / NAME / "1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        find(NAME, places=places)
    expected = manifest["files"]["model.safetensors"]["sha256"]
    for part in (f"{server.url}/{NAME}/1/model.safetensors", expected, sha256_of(path)):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _final_folders(places) == []
    assert not list(places.cache.rglob("model.safetensors*"))


@pytest.mark.parametrize("change", [-7, 7])
def test_a_wrong_size_is_removed_and_named(server, places, blob, change):
    _put(server.root, blob)
    path = server.root / NAME / "1" / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:change] if change < 0 else path.read_bytes() + b"x" * change)
    with pytest.raises(UserError, match=f"model.safetensors: expected {size} bytes, got"):
        find(NAME, places=places)
    assert _final_folders(places) == []
    assert not list(places.cache.rglob("model.safetensors*"))


def test_the_pin_overrules_the_manifest(server, places, blob):
    entry = _put(server.root, blob)["files"]["model.safetensors"]
    pin = {**entry, "version": "1"}
    with pytest.raises(UserError, match=f"{entry['sha256']}.* expects {'0' * 64}"):
        find(NAME, expected={**pin, "sha256": "0" * 64}, places=places)
    assert server.asked("model.safetensors") == []
    assert _same(find(NAME, expected=pin, places=places), blob)
    assert server.asked("latest.json") == []  # the pin names the version
    with pytest.raises(UserError, match="version 2 asked for, but the expected weights are version 1"):
        find(NAME, "2", expected=pin, places=places)


def test_a_damaged_cache_is_fetched_again_or_reported(server, places, blob):
    _put(server.root, blob)
    weights = find(NAME, places=places) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[5000] ^= 255
    weights.write_bytes(data)
    for check in (find, verify):
        with pytest.raises(UserError, match=r"model\.safetensors: sha256 is .*, expected"):
            check(NAME, places=_offline(places))
    assert _same(find(NAME, places=places), blob)


_FIND = """
import sys
from pathlib import Path
from moezoo.zoo.weights import Places, find
print(find("ranking/blob", places=Places(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
"""


def _process(places):
    command = [sys.executable, "-c", _FIND, str(places.shipped), str(places.cache), places.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_two_processes_at_once_download_once(server, places, blob):
    _put(server.root, blob)
    both = threading.Event()

    def hold(path):  # the first waits in mid-download until the second has asked for the version
        if len(server.asked("latest.json")) == 2:
            both.set()
        if path.endswith("model.safetensors"):
            both.wait(60)
            time.sleep(0.2)

    server.hold = hold
    processes = [_process(places) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(places.cache / NAME / "1")}
    assert both.is_set()
    assert Counter(name for name, _ in server.requests)["model.safetensors"] == 1
    assert _same(places.cache / NAME / "1", blob)


def test_a_killed_download_leaves_no_half_folder_and_is_resumed(server, places, blob):
    _put(server.root, blob)
    server.cuts = [2_000_000]
    killed = threading.Event()
    server.before_cut = lambda: killed.wait(60)  # the server stalls after the first 2 MB
    process = _process(places)
    part = places.cache / NAME / ".1.partial" / "model.safetensors.part"
    try:
        _wait(lambda: _size(part) == 2_000_000)
    finally:
        process.kill()
        process.communicate()
        killed.set()
    assert _final_folders(places) == []
    with pytest.raises(UserError, match="no weights for ranking/blob"):
        find(NAME, places=_offline(places))
    assert _same(find(NAME, places=places), blob)
    assert server.asked("model.safetensors") == [None, "bytes=2000000-"]
    assert not part.parent.exists()


@pytest.mark.parametrize(
    "name", ["../blob", "ranking/..", "ranking/../../etc", "ranking\\blob/x", "blob", "ranking/.hidden", "a/b/c", ""]
)
def test_names_that_climb_are_refused(places, name):
    with pytest.raises(UserError):
        load(name, places=places)
    with pytest.raises(UserError, match="neither a weights folder nor a name"):
        find(name, places=places)
    assert not places.cache.exists()


@pytest.mark.parametrize("version", ["..", "../2", "1/2", "/1", "", ".1"])
def test_versions_that_climb_are_refused(server, places, blob, version):
    with pytest.raises(UserError, match="version"):
        find(NAME, version, places=places)
    _put(server.root, blob)
    (server.root / NAME / "latest.json").write_text(json.dumps({"format": 1, "version": version}))
    with pytest.raises(UserError, match=r"latest\.json: version"):
        find(NAME, places=places)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "ranking/other"}, "is of ranking/other 1, not ranking/blob 1"),
        ({"version": "3"}, "is of ranking/blob 3"),
        ({"format": 9}, "expected format 1"),
        ({"files": []}, "expected format 1 with files"),
        ({"files": {"../../evil": {"sha256": "0" * 64, "bytes": 1}}}, "missing or foreign"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(server, places, blob, changes, message):
    _put(server.root, blob, spoil=changes)
    with pytest.raises(UserError, match=message):
        find(NAME, places=places)
    assert not list(places.cache.rglob("evil*"))


def test_a_foreign_file_beside_the_three_is_refused(server, places, blob):
    files = _put(server.root, blob)["files"]
    for extra in ("../evil", "pytorch_model.bin", "/tmp/evil"):
        _put(server.root, blob, version=f"9{len(extra)}", spoil={"files": {**files, extra: files["README.md"]}})
        with pytest.raises(UserError, match="missing or foreign"):
            find(NAME, f"9{len(extra)}", places=places)


@pytest.mark.parametrize("entry", [{"sha256": "A" * 64, "bytes": 1}, {"sha256": "0" * 64, "bytes": True}, 3, {}])
def test_malformed_checksums_are_refused(server, places, blob, entry):
    files = _put(server.root, blob)["files"]
    _put(server.root, blob, version="2", spoil={"files": {**files, "README.md": entry}})
    with pytest.raises(UserError, match=r"README\.md: (sha256|bytes)"):
        find(NAME, "2", places=places)


def test_a_config_the_zoo_refuses_never_reaches_the_cache(server, places, blob, tmp_path):
    folder = tmp_path / "spoilt"
    Blob(2).save_pretrained(folder, recipe=NAME)
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": "evil.py"}
    (folder / "config.json").write_text(json.dumps(config))
    _put(server.root, folder)
    with pytest.raises(UserError, match="unknown key 'auto_map'"):
        find(NAME, places=places)
    assert _final_folders(places) == []


def test_without_a_store_the_message_says_what_to_set(places):
    with pytest.raises(UserError, match="set MOEZOO_WEIGHTS") as caught:
        find(NAME, places=_offline(places))
    assert "\n" not in str(caught.value)


def test_a_misspelt_name_gets_a_suggestion(server, places, blob):
    _put(server.root, blob)
    find(NAME, places=places)
    for where in (places, _offline(places)):
        with pytest.raises(UserError, match="did you mean 'ranking/blob'"):
            find("ranking/bolb", places=where)
        with pytest.raises(UserError, match="did you mean 'control/mentor'"):
            load("control/mentro", known=["control/mentor"], places=where)


def test_an_unknown_protocol_is_a_users_mistake(places):
    with pytest.raises(UserError, match="expected a URL"):
        find(NAME, places=Places(places.shipped, places.cache, "gopher9://x"))


def test_passwords_are_not_shown():
    remote = Remote("http://user:secret@127.0.0.1:9/x", pause=0.001)
    with pytest.raises(UserError) as caught:
        remote.read_json("a/b/latest.json")
    assert "secret" not in str(caught.value)
    assert "***@127.0.0.1:9/x/a/b/latest.json" in str(caught.value)


def test_load_takes_a_folder_only_with_its_class_in_the_zoo(blob, tmp_path):
    with pytest.raises(UserError, match=r"class_path .* refused"):
        load_folder(blob)
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nothing")
