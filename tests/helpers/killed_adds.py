"""Add files to a knowledge base and be killed, over and over: run by test_knowledge_kills.py in a process of its own.

    python -m tests.helpers.killed_adds FOLDER KILLS SEED

Every file has two versions, and every round writes the other one and adds all of them, killed with SIGKILL at an
instant uniform in time, until KILLS have been killed. After each kill every file of the base is whole: all passages of
one version, none of another, and each with its row in the index; what was in the base before is still there in one
version; and a search finds a word of it. Then one undisturbed round, whose base must equal one that was never killed.
Prints one JSON line: kills, how many left a journal that had to be rolled back, how many came between two commits, how
many before the index was finished.

The processes are forked from this one, which has imported numpy and uses one thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

from deepseek import KnowledgeBase
from deepseek.route import knowledge

FILES, PASSAGES = 12, 40


def text(file: int, version: int) -> str:
    return "".join(f"# Part {part}\n\nversion{version} file{file} part{part} {'word ' * (part % 7)}\n\n"
                   for part in range(PASSAGES + version))


def write(folder: Path, version: int) -> list[Path]:
    files = [folder / f"{i}.md" for i in range(FILES)]
    for i, file in enumerate(files):
        file.write_text(text(i, version), encoding="utf-8")
    return files


def fork(path: Path, files: list[Path]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            knowledge._COMMIT = 0.01  # several transactions a round
            KnowledgeBase(path).add(files)
            status = 0
        finally:
            os._exit(status)
    return pid


def contents(path: Path) -> dict[int, int]:
    """File -> its version. Fails where a file is in parts."""
    database = sqlite3.connect(path)
    rows = database.execute(
        "SELECT path, group_concat(text, '\n'), count(*), count(rows.passage), min(length(terms) > 0) FROM files "
        "JOIN passages ON file = files.id LEFT JOIN rows ON passage = passages.id GROUP BY path").fetchall()
    assert len(rows) == database.execute("SELECT count(*) FROM files").fetchone()[0], "a file without passages"
    assert not database.execute("SELECT * FROM rows WHERE passage NOT IN (SELECT id FROM passages)").fetchall()
    assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    found = {}
    for file, said, passages, indexed, terms in rows:
        number = int(Path(file).stem)
        version = 1 if "version1" in said else 0
        assert (passages, indexed, terms) == (PASSAGES + version,) * 2 + (1,), f"{file}: {passages} passages"
        assert f"version{1 - version}" not in said, f"{file}: two versions"
        found[number] = version
    database.close()
    return found


def main() -> None:
    folder, wanted, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    files = write(folder, 0)
    began = time.perf_counter()
    _, status = os.waitpid(fork(folder / "calm.knowledge", files), 0)
    assert status == 0
    alone = time.perf_counter() - began

    path, journal = folder / "killed.knowledge", folder / "killed.knowledge-journal"
    kills = journals = parts = unfinished = version = 0
    before: dict[int, int] = {}
    while kills < wanted:
        version = 1 - version
        pid = fork(path, write(folder, version))
        time.sleep(draw.uniform(0, alone))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0, "an add failed"
            before = contents(path)
            continue
        kills += 1
        if not path.exists() or not path.stat().st_size:
            assert not before, "the base is gone"
            continue
        journals += journal.exists()
        KnowledgeBase(path).files()  # opens it: SQLite rolls back
        after = contents(path)
        assert before.keys() <= after.keys(), "a file is lost"
        parts += len({*after.values()}) == 2 or 0 < len(after) < FILES
        if after:
            database = sqlite3.connect(path)
            unfinished += database.execute("SELECT count(*) FROM rows WHERE vector IS NULL").fetchone()[0] > 0
            database.close()
            file, now = draw.choice([*after.items()])
            got = KnowledgeBase(path).search(f"version{now} file{file} part3", 1)
            assert got and f"version{now} file{file} part3 " in got[0].text
        before = after
    KnowledgeBase(path).add(write(folder, 0))
    assert contents(path) == contents(folder / "calm.knowledge") == dict.fromkeys(range(FILES), 0)
    calm, killed = (KnowledgeBase(folder / f"{name}.knowledge") for name in ("calm", "killed"))
    for query in ("version0 file3 part7", "word part9", "file11"):
        one, other = (sorted((p.file, p.start, p.text, round(p.bm25, 3)) for p in base.search(query, 1000, mode="bm25"))
                      for base in (calm, killed))
        assert one == other and one, query
    print(json.dumps({"kills": kills, "journals": journals, "parts": parts, "unfinished": unfinished}))


if __name__ == "__main__":
    main()
