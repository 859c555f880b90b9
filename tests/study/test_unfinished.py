"""What was begun and abandoned in the cache is listed, and deleted when nobody is at work on it."""

import os

import pytest

import recon
from recon.cli import main
from recon.errors import ReconError
from recon.runtime.journal import Journal
from recon.study import unfinished


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """Leaves a run of so many bytes that was begun so many seconds ago."""
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))

    def begin(key: str, size: int = 0, age: float = 0, **options):
        folder = unfinished.folder_of(key)
        (folder / "masks").mkdir(parents=True)
        Journal(folder / unfinished.JOURNAL, {"spec": recon.RunSpec.of(**options).decisive()}).add(
            {"phase": "opened", "found": {}}
        )
        (folder / "masks" / "00000.safetensors").write_bytes(b"x" * size)
        journal = folder / unfinished.JOURNAL
        os.utime(journal, (journal.stat().st_atime, journal.stat().st_mtime - age))
        return folder

    return begin


def test_runs_are_listed_with_what_they_are(begin, capsys):
    assert unfinished.unfinished() == []
    begin("aaa", 5 * 2**20, 7200, samples=8, evaluation_texts=("news", "code"))
    folder = begin("bbb", model="some/model", retrain_checkpointing=True)
    first, second = unfinished.unfinished()
    assert (first.key, second.key) == ("bbb", "aaa") and not first.in_use
    assert 5 * 2**20 < second.size < 6 * 2**20 and second.age == pytest.approx(7200, abs=60)
    assert second.options == "--model smollm2-135m --samples 8 --evaluation-texts news code"
    assert first.options == "--model some/model --retrain-checkpointing"
    with unfinished.locked("bbb"):
        main(["unfinished"])
    (folder / unfinished.JOURNAL).write_text("{")
    main(["unfinished"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["bbb", "0.00", "GiB", "at", "work"]
    assert lines[1].split()[:6] == ["aaa", "0.00", "GiB", "2.0", "h", "ago"] and lines[1].endswith(second.options)
    assert "its journal is damaged" in lines[2]


def test_they_are_deleted_when_nobody_is_at_work_on_them(begin, capsys):
    folders = {key: begin(key, 10) for key in ("aaa", "bbb", "ccc")}
    with pytest.raises(ReconError, match=r"there is no unfinished run '\.\.'; there are: (aaa|bbb|ccc), "):
        unfinished.discard("..")
    main(["unfinished", "--delete", "aaa"])
    assert not folders["aaa"].exists() and folders["bbb"].exists()
    with unfinished.locked("bbb"):
        with pytest.raises(ReconError, match="unfinished run bbb is in use by process"):
            unfinished.discard("bbb")
        main(["unfinished", "--delete", "all"])
    assert folders["bbb"].exists() and not folders["ccc"].exists()
    said = capsys.readouterr().out
    assert "ccc: deleted" in said and "at work" in said
    main(["unfinished", "--delete", "all"])
    main(["unfinished"])
    assert capsys.readouterr().out.endswith("bbb: deleted\nthere are none\n")
    assert not list(unfinished.folder_of("").iterdir())  # no locks either
