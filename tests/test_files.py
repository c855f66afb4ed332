"""Whole or not at all, whatever goes wrong: full disks, killed writers, hostile files, two processes."""

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import files
from lorakit.errors import FileError, RunError
from lorakit.files import JsonLines, atomic_folder, folders, parse_json, read_safetensors, read_safetensors_header

FOLDER_OF_OLD = {"a.txt": b"old a", "sub/b.txt": b"old b"}
FOLDER_OF_NEW = {"a.txt": b"new a", "sub/c.txt": b"new c"}


def content(folder):
    """{relative path: bytes} of a folder, manifest aside."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop(files.MANIFEST, None)
    return found


def fill(folder, entries):
    for name, data in entries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def python(program, *arguments, **options):
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


# ---------------------------------------------------------------- files


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "x" / "y" / "file"
    for data in (b"one", b"", b"\x00\xff" * 1000):
        files.write_bytes(path, data)
        assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path):
    """The limit on the size of files makes the write itself fail, after its first 1,000 bytes, on any machine."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = """
import resource, signal, sys
from lorakit import files
from lorakit.errors import FileError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_bytes(sys.argv[1], b"n" * 5000)
except FileError as error:
    print(error)
"""
    result = python(program, path)
    assert result.stdout == f"{path}: could not be written: File too large. The old file, if any, is untouched.\n"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def full_disk(tmp_path):
    """A real disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_what_was_there(full_disk):
    files.write_bytes(full_disk / "file", b"old")
    with pytest.raises(FileError, match="file: could not be written: No space left on device"):
        files.write_bytes(full_disk / "file", b"n" * 100_000)
    assert (full_disk / "file").read_bytes() == b"old"

    with atomic_folder(full_disk / "run", manifest={"step": 1}) as building:
        fill(building, FOLDER_OF_OLD)
    with pytest.raises(FileError, match="No space left on device"), atomic_folder(full_disk / "run", {}) as building:
        fill(building, FOLDER_OF_NEW | {"big": b"n" * 100_000})
    assert files.verify_folder(full_disk / "run")["step"] == 1
    assert sorted(p.name for p in full_disk.iterdir()) == ["file", "run"]

    log = JsonLines(full_disk / "log.jsonl")
    log.append({"step": 1})
    with pytest.raises(FileError, match="No space left on device"):
        log.append({"text": "n" * 100_000})
    log.append({"step": 2})
    assert log.rows() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("where", ["file/below", "file/below/it"])
def test_a_path_below_a_file_is_one_clear_error(tmp_path, where):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match=f"{where}: could not be written"):
        files.write_bytes(tmp_path / where, b"x")


def test_json_is_written_as_it_is_read(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": "caf\u00e9 \u2028 \U0001f600"}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    assert list(files.read_json(tmp_path / "x.json")) == ["b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert files.read_json(tmp_path / "x.json") == value


# ---------------------------------------------------------------- folders


def test_a_folder_is_made_replaced_and_verified(tmp_path):
    target = tmp_path / "runs" / "best"
    for step, entries in enumerate([FOLDER_OF_OLD, FOLDER_OF_NEW]):
        with atomic_folder(target, manifest={"step": step}) as building:
            fill(building, entries)
            assert not target.exists() or content(target) == FOLDER_OF_OLD
        assert content(target) == entries
        assert files.verify_folder(target)["step"] == step
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("raised", [ValueError("mine"), KeyboardInterrupt(), FileError("said already")])
def test_what_is_raised_while_building_passes_through_and_leaves_the_old_folder(tmp_path, raised):
    target = tmp_path / "best"
    fill(target, FOLDER_OF_OLD)

    def build():
        with atomic_folder(target) as building:
            fill(building, FOLDER_OF_NEW)
            raise raised

    with pytest.raises(type(raised)) as caught:
        build()
    assert caught.value is raised
    assert content(target) == FOLDER_OF_OLD
    assert list(tmp_path.iterdir()) == [target]


def test_a_free_folder_is_the_first_of_its_kind_with_nothing_in_it(tmp_path):
    with files.locked_folder(tmp_path / "demo"):
        assert files.free_folder(tmp_path / "demo") == tmp_path / "demo-2"  # somebody is there
    assert files.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "rows.jsonl").write_bytes(b"")
    (tmp_path / "demo-2").write_bytes(b"")
    assert files.free_folder(tmp_path / "demo") == tmp_path / "demo-3"
    fill(tmp_path / "data-1", FOLDER_OF_OLD)
    assert files.free_folder(tmp_path / "data-1") == tmp_path / "data-2"


def test_linux_exchanges_folders_in_one_step(tmp_path):
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    first, second = tmp_path / "first", tmp_path / "second"
    fill(first, FOLDER_OF_OLD)
    fill(second, FOLDER_OF_NEW)
    assert folders._exchange(first, second)
    assert (content(first), content(second)) == (FOLDER_OF_NEW, FOLDER_OF_OLD)
    with pytest.raises(FileNotFoundError):
        folders._exchange(first, tmp_path / "none")


# Run the writer again and again, killed one step later each time: at the n-th event Python reports (open, rename, mkdir
# remove and ctypes calls are among them) or fsync. Print what a reader finds then, until a writer lives to its end.
KILLED_WRITERS = """
import json, os, shutil, signal, sys
from pathlib import Path
from lorakit import files
from lorakit.errors import FileError
from lorakit.files import folders

kind, exchange, root = sys.argv[1], sys.argv[2] == "exchange", Path(sys.argv[3])
target = root / "target"
if not exchange:
    folders._exchange = lambda first, second: False
steps = {"fsync": os.fsync}

def old():
    shutil.rmtree(root)
    root.mkdir()
    if kind == "file":
        target.write_bytes(b"old")
    else:
        with files.atomic_folder(target, manifest={"which": "old"}) as building:
            (building / "a").write_bytes(b"old")

def write_new():
    if kind == "file":
        files.write_bytes(target, b"new")
    else:
        with files.atomic_folder(target, manifest={"which": "new"}) as building:
            (building / "a").write_bytes(b"new")
            (building / "b").write_bytes(b"new")

def read():
    if kind == "file":
        return target.read_bytes().decode()
    which = files.verify_folder(target)["which"]
    assert {p.read_bytes().decode() for p in target.iterdir() if p.name != files.MANIFEST} == {which}
    return which

found, count = [], 0
while True:
    old()
    child = os.fork()
    if child == 0:
        left = count
        def step(*_):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(step)
        def fsync(handle):
            step()
            steps["fsync"](handle)
        os.fsync = fsync
        write_new()
        os._exit(0)
    died = os.waitpid(child, 0)[1] != 0
    try:
        before = read()
    except (FileError, FileNotFoundError):
        before = "nothing"
    files.remove_leftovers(root)
    found.append([before, read(), sorted(p.name for p in root.iterdir())])
    if not died:
        break
    count += 1
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills real processes it forked")
@pytest.mark.parametrize(("kind", "way"), [("file", "exchange"), ("folder", "exchange"), ("folder", "two steps")])
def test_a_writer_killed_at_any_step_leaves_old_or_new(tmp_path, kind, way):
    (tmp_path / "root").mkdir()
    result = python(KILLED_WRITERS, kind, way, tmp_path / "root")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) > 5
    before, after = [row[0] for row in found], [row[1] for row in found]
    assert after == sorted(after, key=["old", "new"].index)  # old until the new is in place, then new for good
    assert (after[0], after[-1]) == ("old", "new")
    assert all(row[2] == ["target"] for row in found)  # nothing lies about
    if way == "exchange":
        assert before == after  # a reader never sees anything else, without any recovery
    else:
        assert "nothing" in before  # the window is real, and remove_leftovers closes it


def test_the_next_writer_puts_back_what_was_moved_aside(tmp_path):
    fill(tmp_path / ".previous-best", FOLDER_OF_OLD)
    with atomic_folder(tmp_path / "best") as building:
        assert content(tmp_path / "best") == FOLDER_OF_OLD
        fill(building, FOLDER_OF_NEW)
    assert content(tmp_path / "best") == FOLDER_OF_NEW
    assert list(tmp_path.iterdir()) == [tmp_path / "best"]


def test_an_interrupt_between_the_two_renames_is_undone(tmp_path, monkeypatch):
    target = tmp_path / "best"
    fill(target, FOLDER_OF_OLD)
    rename = Path.rename

    def interrupted(self, to):
        if self.name.startswith(".tmp-"):
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as building:
        fill(building, FOLDER_OF_NEW)
    assert content(target) == FOLDER_OF_OLD
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.txt").unlink(), "a.txt: missing"),
        (lambda f: (f / "a.txt").write_bytes(b"old"), "a.txt: 3 bytes instead of 5"),
        (lambda f: (f / "sub/b.txt").write_bytes(b"olD b"), "sub/b.txt: content differs"),
        (lambda f: (f / files.MANIFEST).unlink(), r"manifest\.json: could not be read: No such file"),
        (lambda f: (f / files.MANIFEST).write_text("[]"), "not a manifest"),
        (
            lambda f: (f / files.MANIFEST).write_text('{"files": {"a.txt": {"bytes": 5}}}'),
            "its entry in manifest.json is damaged",
        ),
        (lambda f: (f / files.MANIFEST).write_text('{"files": {"a.t'), "not JSON"),
    ],
)
def test_a_damaged_folder_does_not_verify(tmp_path, damage, message):
    with atomic_folder(tmp_path / "best", manifest={}) as building:
        fill(building, FOLDER_OF_OLD)
    damage(tmp_path / "best")
    with pytest.raises(FileError, match=message):
        files.verify_folder(tmp_path / "best")


# ---------------------------------------------------------------- lines


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.rows() == []
    log.append({"step": 1, "text": "a\u2028b\n"})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"step": 2, "lo')
    assert log.rows() == [{"step": 1, "text": "a\u2028b\n"}]
    log.append({"step": 2})
    assert log.path.read_bytes() == whole + b'{"step": 2}\n'


def test_only_the_torn_line_of_a_file_goes(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.path.write_bytes(b'{"st')
    log.append({"step": 1})
    assert log.path.read_bytes() == b'{"step": 1}\n'


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.path.write_bytes(b'{"step": 1}\n{"step": NaN}\n{"step": 3}\n')
    with pytest.raises(FileError, match=r"log\.jsonl:2: not JSON: NaN is not JSON"):
        log.rows()
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"loss": float("inf")})


def test_keep_rewrites(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(4):
        log.append({"step": step})
    log.keep(log.rows()[:2])
    assert log.rows() == [{"step": 0}, {"step": 1}]


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a":\r\n 1}\r\n', {"a": 1}),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
        (b"1e308", 1e308),
    ],
)
def test_json_as_the_standard_has_it(text, value):
    assert parse_json(text, "x") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' given twice"),
        (b'[{"x": {"a": 1, "a": 1}}]', "key 'a' given twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"1e999", "number 1e999 is too large"),
        (b'{"a": "\\ud83d"}', "lone surrogate"),
        (b'{"\\ude00": 1}', "lone surrogate"),
        (b'{"a": "\xe9"}', "not UTF-8: byte 0xe9 at offset 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b'{"a": 1} x', "Extra data at line 1, column 10"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"9" * 10_000, "not JSON"),
        (b'"a\x00b"', "not JSON"),
    ],
)
def test_json_that_python_would_take_or_choke_on(text, message):
    with pytest.raises(FileError, match=message) as caught:
        parse_json(text, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileError, match=r"none\.json: could not be read: No such file"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(FileError, match="could not be read"):
        files.read_json(tmp_path)


# ---------------------------------------------------------------- safetensors

GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [3, 1], "data_offsets": [8, 11]},
}
TWICE = b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "a": {"dtype": "U8", "shape": [8]}}'


def tensor_file(path, header=None, data=b"\x00" * 11, length=None):
    text = header if isinstance(header, bytes) else json.dumps(GOOD if header is None else header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_a_sound_header_is_read(tmp_path):
    path = tensor_file(tmp_path / "x.safetensors", {**GOOD, "__metadata__": {"k": "v"}})
    assert read_safetensors_header(path) == ({"a": ("F32", (2,)), "b": ("U8", (3, 1))}, {"k": "v"})
    assert read_safetensors(path)[0]["b"].shape == (3, 1)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (TWICE, "'a' given twice"),
        ({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [7, 10]}}, "overlaps or has holes at byte 8"),
        ({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [9, 12]}}, "overlaps or has holes at byte 8"),
        ({"a": GOOD["a"], "b": {**GOOD["a"]}}, "overlaps or has holes"),
        ({"a": GOOD["a"]}, "holds 11 bytes of tensors, its header says 8"),
        ({"a": {**GOOD["a"], "shape": [3]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "shape": [-2]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "shape": [2.0]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "shape": [True, 2]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "shape": "2"}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "dtype": "F33"}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "dtype": ["F32"]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "data_offsets": [8, 0]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "data_offsets": [0]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {"dtype": "F32", "shape": [2]}, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": 1, "b": GOOD["b"]}, "'a' has a bad header entry"),
        ({"a": {**GOOD["a"], "shape": [2**62, 2**62]}}, "'a' has a bad header entry"),
        ({**GOOD, "__metadata__": {"k": 1}}, "__metadata__ must hold strings"),
        ({**GOOD, "__metadata__": None}, "__metadata__ must hold strings"),
        ([1], "header is not an object"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused(tmp_path, header, message):
    with pytest.raises(FileError, match=message):
        read_safetensors_header(tensor_file(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("length", [2**63, 2**40, 64 * 1024 * 1024 + 1, 10_000])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, length):
    with pytest.raises(FileError, match=f"header of {length:,} bytes in a file of"):
        read_safetensors_header(tensor_file(tmp_path / "x.safetensors", length=length))


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    save_file({"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FileError, match="cut"):
            read_safetensors(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole + b"\x00")
    with pytest.raises(FileError, match="cut short or damaged"):
        read_safetensors(tmp_path / "cut")


def test_tensors_come_back_bit_for_bit_and_equal_content_gives_equal_bytes(tmp_path):
    big = torch.randn(8, 6)
    tensors = {
        "z": big.t(),
        "part": big[2:4],
        "same": big,
        "bf16": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    metadata = dict.fromkeys("qwertyuiop", "v")
    files.write_safetensors(tmp_path / "one", tensors, metadata)
    files.write_safetensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, found_metadata = read_safetensors(tmp_path / "one")
    assert found_metadata == metadata
    assert found.keys() == tensors.keys() == load_file(tmp_path / "one").keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())


def test_tensors_lie_where_the_library_puts_them(tmp_path):
    mixed = {
        "b": torch.arange(3),
        "a": torch.ones(5, dtype=torch.uint8),
        "c": torch.randn(2, 3).half(),
        "": torch.ones(()),
    }
    for tensors in (mixed, {}):
        files.write_safetensors(tmp_path / "ours", tensors, {"k": "v"})
        save_file(tensors, tmp_path / "theirs", {"k": "v"})
        ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
        assert len(ours) == len(theirs)
        (length,) = struct.unpack("<Q", ours[:8])
        assert ours[8 + length :] == theirs[8 + length :]
        assert json.loads(ours[8 : 8 + length]) == json.loads(theirs[8 : 8 + length])


def test_a_file_of_tensors_is_written_without_a_copy_of_them(tmp_path):
    script = f"""
import resource, torch
from lorakit.files import write_safetensors
tensors = {{str(i): torch.ones(2_500_000) for i in range(20)}}
write_safetensors({str(tmp_path / "first")!r}, {{"0": tensors["0"]}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors({str(tmp_path / "all")!r}, tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    taken = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(taken) * 1024 < 100_000_000  # of 200 MB


# ---------------------------------------------------------------- locks

HOLDER = """
import sys
from lorakit.files import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"` until its stdin is closed or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path, holder):
    with (
        pytest.raises(RunError, match=rf"run is in use by process {holder.pid}\. Wait"),
        files.locked_folder(tmp_path / "run"),
    ):
        pytest.fail("two processes hold one folder")
    holder.stdin.close()
    holder.wait(timeout=30)
    with files.locked_folder(tmp_path / "run"):
        pass


def test_a_lock_goes_with_its_process(tmp_path, holder):
    holder.kill()
    holder.wait(timeout=30)
    with files.locked_folder(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock-owner").read_text() == f"process {os.getpid()}"


def test_a_second_thread_is_refused_too(tmp_path):
    refused = []

    def try_it():
        try:
            with files.locked_folder(tmp_path / "run"):
                pass
        except RunError as error:
            refused.append(str(error))

    with files.locked_folder(tmp_path / "run"):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert f"in use by process {os.getpid()}" in refused[0]


def test_a_folder_that_cannot_be_made_cannot_be_locked(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match="cannot be locked"), files.locked_folder(tmp_path / "file"):
        pass


# ---------------------------------------------------------------- the cache folder


def test_the_cache_folder_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.delenv("LORAKIT_CACHE")
    assert files.cache_folder().name == "lorakit"


def test_room_is_made_by_what_was_longest_unused(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "a").chmod(0o400)
    files.mark_used(tmp_path / "d")
    files.mark_used(tmp_path / "gone")
    files.make_room(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    files.make_room(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
    files.make_room(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
