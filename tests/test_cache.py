"""The disk cache of machine code gives back what was put in or nothing, and a place where it cannot be is a warning and no more."""

import errno
import hashlib
import os
import stat
import time
import warnings

import pytest

from hybridzoo.kernels.gpu import cache
from hybridzoo.zoo import doctor

KEY, OTHER = (hashlib.sha256(name).hexdigest() for name in (b"one", b"other"))
BODY = b"_symbol\n\x7fELF" + bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_said", set())
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def warned(*keys):
    """The warnings of keeping an entry under each key."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for key in keys or (KEY, OTHER):
            cache.keep(key, BODY)
    return [str(w.message) for w in said]


def test_what_is_kept_is_read_and_the_folder_is_its_owners(folder):
    assert cache.read(KEY) is None and not folder.exists()
    assert warned(KEY) == []
    assert cache.read(KEY) == BODY and cache.read(OTHER) is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda whole: b"",
        "half": lambda whole: whole[: len(whole) // 2],
        "longer": lambda whole: whole + b"\0",
        "flipped": lambda whole: bytes(b ^ (i == len(whole) // 2) for i, b in enumerate(whole)),
        "header cut": lambda whole: whole.partition(b"\n")[2],
        "planted": lambda whole: b"evil\n\x7fELFplanted",
        "another body": lambda whole: whole.partition(b"\n")[0] + b"\n_symbol\n\x7fELF",
        "another key": lambda whole: whole.replace(KEY.encode(), OTHER.encode()),
        "of another entry": lambda whole: cache._header(OTHER, BODY) + b"\n" + BODY,
    }.items(),
    ids=lambda d: d[0],
)
def test_a_damaged_entry_is_as_good_as_none_and_is_replaced(folder, damage):
    cache.keep(KEY, BODY)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage[1](whole))
    assert entry.read_bytes() != whole and cache.read(KEY) is None
    assert warned(KEY) == [] and cache.read(KEY) == BODY and list(folder.iterdir()) == [entry]


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_is_not_read(folder, kind):
    cache.keep(KEY, BODY)
    (entry,) = folder.iterdir()
    entry.unlink()
    {"folder": entry.mkdir, "pipe": lambda: os.mkfifo(entry), "loop": lambda: entry.symlink_to(entry)}[kind]()
    assert cache.read(KEY) is None
    said = warned(KEY)
    assert (len(said), cache.read(KEY)) == ((1, None) if kind == "folder" else (0, BODY))
    assert list(folder.iterdir()) == [entry]


class Full:
    def __init__(self, file, mode):
        self.file = open(file, mode)

    def __enter__(self):
        return self

    def write(self, content):
        self.file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __exit__(self, *error):
        self.file.close()


def test_a_full_disk_leaves_nothing_behind_and_is_said_once(folder, monkeypatch):
    monkeypatch.setattr(cache, "open", Full, raising=False)
    (said,) = warned()
    assert said.endswith(f"every process compiles them anew: {folder}: No space left on device.")
    assert list(folder.iterdir()) == [] and cache.read(KEY) is None


def test_a_rename_that_fails_leaves_nothing_behind(folder, monkeypatch):
    def fail(*paths):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache.os, "replace", fail)
    assert len(warned()) == 1 and list(folder.iterdir()) == []


def test_parts_of_killed_processes_are_swept_and_fresh_ones_are_not(folder):
    cache.keep(KEY, BODY)
    old, fresh, others = (folder / name for name in (cache._PART + "a", cache._PART + "b", "tmp12345678"))
    for file in (old, fresh, others):
        file.write_bytes(b"half")
    for file in (old, others):
        os.utime(file, (time.time() - 2 * cache._STALE_SECONDS,) * 2)
    cache.keep(OTHER, BODY)
    assert sorted(folder.iterdir()) == sorted([fresh, others, cache._file(folder, KEY), cache._file(folder, OTHER)])


def nowhere(monkeypatch, tmp_path):
    monkeypatch.delenv("HYBRIDZOO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}["nobody"])


def a_file_as_home(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("")
    monkeypatch.delenv("HYBRIDZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def below_a_device(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDZOO_CACHE", "/dev/null/cache")


def a_file(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")


def everybodys(monkeypatch, tmp_path):
    cache.keep(KEY, BODY)
    (tmp_path / "cache").chmod(0o777)


def anothers(monkeypatch, tmp_path):
    cache.keep(KEY, BODY)
    os.chown(tmp_path / "cache", 4321, -1)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (nowhere, "there is no home folder. Set HYBRIDZOO_CACHE"),
        (a_file_as_home, "Not a directory"),
        (below_a_device, "/dev/null/cache: Not a directory"),
        (a_file, "is not a folder"),
        (everybodys, "everybody may write to it. Run chmod o-w"),
        pytest.param(
            anothers,
            "belongs to another user (4321",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away"),
        ),
    ],
)
def test_a_place_that_will_not_do_is_said_once_and_nothing_is_read_there(where, reason, monkeypatch, tmp_path):
    where(monkeypatch, tmp_path)
    assert cache.read(KEY) is None
    (said,) = warned()
    assert said.startswith("hybridzoo: compiled CUDA kernels are not kept on disk") and reason in said
    assert doctor._cache(*cache.place()).startswith("none, every process compiles anew: ")


def test_a_folder_of_root_serves_everybody(folder, monkeypatch):
    # an image with the kernels in it
    cache.keep(KEY, BODY)
    monkeypatch.setattr(cache.os, "geteuid", lambda: 4321)
    assert (cache.read(KEY) == BODY) == (folder.stat().st_uid == 0)


def test_relative_and_missing_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HYBRIDZOO_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.place() == (tmp_path / ".cache" / "hybridzoo", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.place() == (tmp_path / "xdg" / "hybridzoo", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDZOO_CACHE", "here")
    assert warned(KEY) == [] and (tmp_path / "here").is_dir() and "1 kernels" in doctor._cache(*cache.place())


def test_the_machine_is_described_without_a_home(monkeypatch, tmp_path):
    nowhere(monkeypatch, tmp_path)
    monkeypatch.delenv("HF_HOME", raising=False)
    assert "not there yet" in doctor.examine("cpu")["system"]["hub cache"]


def test_what_others_left_under_the_name_of_a_part_does_not_count_against_an_entry(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    (tmp_path / ".hybridzoo-folder").mkdir()
    os.utime(tmp_path / ".hybridzoo-folder", (0, 0))
    (tmp_path / ".hybridzoo-loop").symlink_to(tmp_path / ".hybridzoo-loop")
    cache.keep("ab" * 32, b"code")
    assert cache.read("ab" * 32) == b"code"
    assert not recwarn.list
