"""The queue and the store of a study: what is added, taken, given back, given up and kept, in a journal file and in a database."""

import dataclasses
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ablation import a_cell, postgres, result_of  # noqa: F401

from hybridzoo.eval.ablate import queue as queues
from hybridzoo.eval.ablate.journal import QueueError
from hybridzoo.eval.ablate.queue import Queue
from hybridzoo.eval.ablate.statistics import score
from hybridzoo.eval.ablate.store import Store, code_digest

CELLS = {f"key{i}": a_cell(rate=10.0 ** -(i + 1)) for i in range(5)}


def states(queue):
    return {key: entry.state for key, entry in queue.entries().items()}


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    return None if request.param == "journal" else f"sqlite:///{tmp_path}/queue.db"


def test_cells_are_taken_in_order_and_once(tmp_path, storage):
    mine, theirs = Queue(tmp_path, storage), Queue(tmp_path, storage)
    assert mine.add(CELLS) == 5 and mine.add(CELLS) == 0 and theirs.add(CELLS) == 0
    taken = [queue.take(CELLS) for queue in (mine, theirs, mine, theirs, mine)]
    assert [t.key for t in taken] == list(CELLS) and {t.attempt for t in taken} == {1}
    assert mine.take(CELLS) is None and theirs.take(CELLS) is None
    theirs.done(taken[1], 0.5)
    mine.interrupted(taken[0])
    assert states(mine) == {"key0": "none", "key1": "done", "key2": "running", "key3": "running", "key4": "running"}
    assert mine.take(CELLS) is None and theirs.add(CELLS) == 1
    assert mine.take(["key4"]) is None and mine.add({"key9": CELLS["key0"]}) == 1
    mine.interrupted(taken[2])
    mine.add(CELLS)
    again = mine.take([*CELLS, "key9"]), mine.take([*CELLS, "key9"]), mine.take([*CELLS, "key9"])
    assert [(t.key, t.attempt) for t in again] == [("key0", 1), ("key2", 1), ("key9", 1)]


def test_who_looks_for_no_such_cell_makes_no_trial(tmp_path):
    queue = Queue(tmp_path)
    assert queue.take(CELLS) is None and queue.entries() == {}
    queue.add(CELLS)
    assert queue.take(["another"]) is None and set(states(queue).values()) == {"waiting"} and len(states(queue)) == 5


def test_a_cell_that_was_added_twice_is_run_once(tmp_path):
    mine, theirs = Queue(tmp_path), Queue(tmp_path)
    for queue in (mine, theirs):  # as two that looked at the same moment
        queue._enqueue("key0", CELLS["key0"])
    taken = theirs.take(CELLS)
    assert taken.key == "key0" and mine.take(CELLS) is None
    theirs.done(taken, 1.0)
    assert mine.take([]) is None and mine.add({}) == 0


def test_where_locks_do_not_reach_the_storage_grants_a_cell_to_one(tmp_path, monkeypatch):
    class Open:
        def release(self):
            pass

    def unlocked(queue, key):
        queue._place(key).mkdir(parents=True, exist_ok=True)
        return Open()

    monkeypatch.setattr(Queue, "_lock", unlocked)
    mine, theirs = Queue(tmp_path), Queue(tmp_path)
    mine.add(CELLS)
    before = mine.entries()
    assert theirs.take(["key0"]).key == "key0"
    monkeypatch.setattr(mine, "entries", lambda: before)  # as one that looked a moment ago
    assert mine.take(["key0"]) is None and mine.take(["key0", "key1"]).key == "key1"


def test_an_error_is_tried_once_more_and_then_given_up_until_it_is_forgiven(tmp_path):
    queue = Queue(tmp_path)
    for attempt in (1, 2):
        assert queue.add({"key0": CELLS["key0"]}) == 1
        taken = queue.take(CELLS)
        assert taken.attempt == attempt
        queue.failed(taken, f"out of memory {attempt}")
    assert queue.add(CELLS) == 4
    entry = queue.entries()["key0"]
    assert (entry.state, entry.errors, entry.error, entry.deaths) == ("failed", 2, "out of memory 2", 0)
    queue.forgive()
    assert queue.add(CELLS) == 1 and states(queue)["key0"] == "waiting"


def test_a_result_that_was_removed_is_made_again_once_it_cannot_be_on_its_way(tmp_path, monkeypatch):
    queue = Queue(tmp_path)
    queue.add(CELLS)
    queue.done(queue.take(CELLS), 0.9)
    assert queue.add(CELLS) == 0
    monkeypatch.setattr(queues, "_SETTLED", 0.0)
    assert queue.add(CELLS) == 1 and states(queue)["key0"] == "waiting"


def forked_holder(folder):
    """A process that takes a cell and then does nothing; forked, so that nothing is imported again."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        taken = Queue(folder).take(["key0"])
        os.write(write, taken.key.encode())
        signal.pause()
    assert os.read(read, 9) == b"key0"
    return pid


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_the_cell_of_a_killed_process_is_given_back_at_once_and_not_before(tmp_path):
    queue = Queue(tmp_path)
    queue.add(CELLS)
    pid = forked_holder(tmp_path)
    assert queue.bury() == [] and states(queue)["key0"] == "running"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert queue.bury() == ["key0"] and queue.bury() == []
    entry = queue.entries()["key0"]
    assert (entry.state, entry.errors, entry.deaths) == ("none", 0, 1)
    assert queue.add(CELLS) == 1 and queue.take(["key0"]).attempt == 1


def test_a_process_of_another_host_is_dead_when_its_heart_stands_still(tmp_path, monkeypatch):
    here, there = Queue(tmp_path), Queue(tmp_path)
    here.add(CELLS)
    monkeypatch.setattr(queues, "_host", lambda: "another")
    taken = there.take(["key0"])
    taken.lock.release()  # where locks do not reach other hosts
    monkeypatch.undo()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert here.bury() == []
    now += queues.STALE - 1
    there.beat(taken, 7, 2.5)
    assert here.bury() == [] and here.entries()["key0"].pulse["step"] == 7
    now += queues.STALE - 1
    assert here.bury() == []
    now += 2
    assert here.bury() == ["key0"]
    there.beat(taken)
    assert taken.lost
    there.done(taken, 1.0)
    assert states(here)["key0"] == "none"


def test_a_cell_that_kills_its_process_every_time_is_given_up(tmp_path):
    queue = Queue(tmp_path)
    for _ in range(queues.DEATHS):
        assert queue.add({"key0": CELLS["key0"]}) == 1
        queue.take(CELLS).lock.release()
        assert queue.bury() == ["key0"]
    assert queue.add({"key0": CELLS["key0"]}) == 0
    assert "died 8 times" in queue.entries()["key0"].error and states(queue)["key0"] == "failed"


def test_queues_of_two_folders_do_not_meet_in_one_database(tmp_path):
    url = f"sqlite:///{tmp_path}/queue.db"
    one, other = Queue(tmp_path / "one", url), Queue(tmp_path / "other", url)
    one.add(CELLS)
    assert other.entries() == {} and len(Queue(tmp_path / "one", url).entries()) == 5


def test_many_that_open_and_add_at_once_add_nothing_twice_that_is_run_twice(tmp_path):
    url = f"sqlite:///{tmp_path}/queue.db"

    def work(_):
        queue, done = Queue(tmp_path, url), []
        queue.add(CELLS)
        while (taken := queue.take(set(CELLS) - set(done))) is not None:
            done.append(taken.key)
            (tmp_path / f"{taken.key}.{taken.trial_id}").touch()
            queue.done(taken, 1.0)
        return done

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert {f.suffix[1:] and f.stem for f in tmp_path.glob("key*")} == set(CELLS)


# the journal


def test_half_a_record_of_a_killed_writer_is_taken_away(tmp_path):
    queue = Queue(tmp_path)
    queue.add(CELLS)
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":6,"wor')
    again = Queue(tmp_path)
    assert set(states(again).values()) == {"waiting"}
    assert again.take(CELLS).key == "key0" and states(queue)["key0"] == "running"
    assert journal.read_bytes().startswith(whole + b'{"op_code"')
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.mark.parametrize("damage", [b"\x00\x00\x00\n", b"[1]\n", b'{"op":1}\n', b"half a line\n"])
def test_a_damaged_journal_says_where_and_what_to_do(tmp_path, damage):
    Queue(tmp_path).add(CELLS)
    journal = tmp_path / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], damage, *lines[2:]]))
    with pytest.raises(QueueError, match=r"journal.log: line [34] .*damaged.*Move the file away"):
        Queue(tmp_path)
    journal.unlink()
    assert Queue(tmp_path).add(CELLS) == 5


def test_a_full_disk_is_one_error_and_leaves_whole_records(tmp_path, monkeypatch):
    queue = Queue(tmp_path)
    queue.add(CELLS)
    before, write = (tmp_path / "journal.log").read_bytes(), os.pwrite

    def full(file, content, place):
        if len(content) > 20:
            return write(file, content[:20], place)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        QueueError, match=r"journal.log: the study's queue cannot be written \(No space left.*Make room"
    ):
        queue.add({"key9": CELLS["key0"]})
    monkeypatch.undo()
    assert (tmp_path / "journal.log").read_bytes() == before
    assert queue.add({"key9": CELLS["key0"]}) == 1


def test_a_folder_that_takes_nothing_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QueueError, match=r"file/study: cannot be used \(Not a directory\).*--folder"):
        Queue(tmp_path / "file" / "study")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:secret@localhost:1/studies", r"postgresql://me:\*\*\*@localhost:1/studies: cannot be used \((?s:.*)refused"),
        ("my.db", "is no URL of a database"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
        ("oracle://me:secret@host/x", "needs a driver"),
        ("nonsense://host", "cannot be used"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_reached_is_one_error_without_its_password(tmp_path, url, says):
    with pytest.raises(QueueError, match=says) as error:
        Queue(tmp_path, url)
    assert "secret" not in str(error.value)


# PostgreSQL


def test_a_real_server_grants_every_cell_once(tmp_path, postgres):  # noqa: F811
    cells = {f"key{i}": a_cell(seed=i) for i in range(8)}

    def work(_):
        queue, done = Queue(tmp_path, postgres), []
        queue.add(cells)
        while (taken := queue.take(set(cells) - set(done))) is not None:
            done.append(taken.key)
            queue.beat(taken, 3, 1.5)
            queue.done(taken, 0.5)
        return done

    with ThreadPoolExecutor(3) as pool:
        lists = list(pool.map(work, range(3)))
    queue = Queue(tmp_path, postgres)
    entries = queue.entries()
    assert {entry.done is not None for entry in entries.values()} == {True} and set(entries) == set(cells)
    assert {key for many in lists for key in many} == set(cells)


# the store


def test_a_result_is_kept_and_found_by_what_decides_about_it(tmp_path):
    store, cell = Store(tmp_path, "code"), a_cell()
    assert store.get(cell) is None and store.results([cell]) == []
    kept = store.put(cell, result_of(0.75, test=0.5), "cpu")
    found = Store(tmp_path, "code").get(cell)
    assert found == kept and score(found, "valid") == 0.75 and score(found, "test") == 0.5
    content = json.loads(kept.path.read_text())
    assert (
        content["cell"] == json.loads(json.dumps(cell.plain()))
        and content["code"] == "code"
        and content["versions"]["torch"]
    )
    assert kept.path == tmp_path / "cells" / cell.key("code") / "result.json"
    # another study's name for the same model, and another model
    renamed = dataclasses.replace(cell, point=dataclasses.replace(cell.point, name="other"))
    assert store.get(renamed).cell.point.name == "other" and len(store.results([cell, renamed])) == 1
    assert store.get(a_cell(seed=9)) is None


def test_results_of_other_code_are_not_mixed_in_but_counted(tmp_path):
    old, new, cell = Store(tmp_path, "old"), Store(tmp_path, "new"), a_cell()
    old.put(cell, result_of(0.1), "cpu")
    assert new.get(cell) is None and new.stale([cell]) == 1 and old.stale([cell]) == 0
    new.put(cell, result_of(0.9), "cpu")
    assert score(new.get(cell), "test") == 0.9 and score(old.get(cell), "test") == 0.1 and new.stale([]) == 2


def test_numbers_that_are_not_finite_are_kept_as_such(tmp_path):
    store, cell = Store(tmp_path, "code"), a_cell()
    store.put(cell, result_of(float("nan")), "cpu")
    assert str(score(Store(tmp_path, "code").get(cell), "valid")) == "nan"


@pytest.mark.parametrize("content", ["", "{}", '{"result": {"metric": "accuracy", "valid": {}, "test": {}}}', "[1]"])
def test_a_damaged_result_is_one_error(tmp_path, content):
    store, cell = Store(tmp_path, "code"), a_cell()
    path = store.put(cell, result_of(0.1), "cpu").path
    path.write_text(content)
    with pytest.raises(ValueError, match=r"result.json: is no result of a cell .*Remove it"):
        Store(tmp_path, "code").get(cell)


def test_what_train_cell_forgets_is_not_kept(tmp_path):
    store = Store(tmp_path, "code")
    with pytest.raises(ValueError, match='has no "metric"'):
        store.put(a_cell(), {"metric": "accuracy", "valid": {"accuracy": 1.0}}, "cpu")
    assert store.stale([]) == 0


def test_the_digest_is_of_what_decides_about_numbers(monkeypatch, tmp_path):
    from hybridzoo.eval.ablate import store as stores

    root = tmp_path / "copy"
    for place in ("kernels", "layers", "zoo", "eval"):
        shutil.copytree(stores.ROOT / place, root / place, ignore=shutil.ignore_patterns("__pycache__", "results"))
    monkeypatch.setattr(stores, "ROOT", root)
    digest = code_digest.__wrapped__

    def digest_with(change):
        file, content = root / change, (root / change).read_text()
        file.write_text(content + "\n")
        found = digest()
        file.write_text(content)
        return found

    same = digest()
    assert same == code_digest()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert same == digest()
    for decides in ("layers/mamba.py", "kernels/gpu/common.cuh", "zoo/train/optimisers.py", "eval/tasks/generators.py"):
        assert digest_with(decides) != same
    for says in ("zoo/report/__init__.py", "eval/ablate/queue.py", "zoo/terminal.py"):
        assert digest_with(says) == same
