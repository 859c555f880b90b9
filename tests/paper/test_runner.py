"""Running notebooks under a profile: what runs, what is refused, what is left behind."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from fixtures.processes import heed_interrupts
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from recon.errors import ReconError
from recon.paper import runner
from recon.paper.console import Console

OUTCOME = runner.Outcome("0-a", "A", "finished", 1.0)
PARAMETERS = 'profile: str = "quick"  # whose folders\nsize: int = 1  # how many'


def write_notebook(root: Path, name: str, *code: str, parameters: str | None = PARAMETERS, title: str = "") -> None:
    cells = [new_markdown_cell(f"# {title}")] if title else []
    if parameters is not None:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [new_code_cell(source) for source in code]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (root / "notebooks" / "profiles").mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=kernel), root / "notebooks" / f"{name}.ipynb")


def write_profile(root: Path, profile: str, values: object) -> None:
    (root / "notebooks" / "profiles" / f"{profile}.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A root with three notebooks, run once: one with a figure, one that fails, one after it."""
    root = tmp_path_factory.mktemp("root")
    draw = """
import sys, matplotlib.pyplot as plt, pandas as pd
from recon.paper import figures
fig, ax = plt.subplots()
ax.plot([1, 2])
folder = "../build/quick/figures"
figures.savefig(fig, "a-line", folder, pd.DataFrame({"y": [1, 2]}), [], caption="A <line> & more")
if size < 7:
    figures.savefig(fig, "b-line", folder)
print("size", size, profile, sys.executable)"""
    write_notebook(root, "0-draws", draw, title="Draws & saves")
    write_notebook(root, "1-fails", "raise KeyError('lost')", "print('never')")
    write_notebook(root, "2-ends", "print('size', size)", title="Ends")
    write_profile(root, "quick", {"0-draws": {"size": 7}, "1-fails": None})
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PYTHONPATH", str(runner.ROOT))  # so that a checkout that is not installed can be tested as well
        return root, runner.execute("quick", root=root, stdout=said), said.getvalue().splitlines()


def test_every_notebook_runs_with_its_parameters_though_one_fails(ran):
    root, outcomes, lines = ran
    assert [(o.name, o.title, o.status) for o in outcomes] == [
        ("0-draws", "Draws & saves", "finished"),
        ("1-fails", "1-fails", "failed"),
        ("2-ends", "Ends", "finished"),
    ]
    copies = root / "build/quick/notebooks"
    assert (copies / "2-ends.log").read_text() == "size 1\n"
    assert f"size 7 quick {sys.executable}" in (copies / "0-draws.ipynb").read_text()
    assert "size 1" in (copies / "2-ends.ipynb").read_text()


def test_the_console_shows_a_line_for_each_notebook_and_the_path_of_each_figure(ran):
    root, outcomes, lines = ran
    took = [runner.duration(outcome.seconds) for outcome in outcomes]
    assert lines == [
        "[1/3] 0-draws  build/quick/figures/a-line.png",
        f"[1/3] 0-draws  finished, {took[0]}",
        f"[2/3] 1-fails  failed, {took[1]}",
        f"[3/3] 2-ends  finished, {took[2]}",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_of_cells_that_moves_while_the_notebook_runs(tmp_path):
    copy, figures, screen = tmp_path / "copy.ipynb", tmp_path / "figures", Terminal()
    figures.mkdir()
    (figures / "old.png").touch()
    shown = Console("[1/1] 0-a", 2, copy, [figures / "old.png", figures / "new.png"], screen)
    shown.write("a study of 3 runs\n\n")
    status = {"papermill": {"status": "completed"}}
    copy.write_text(nbformat.writes(new_notebook(cells=[new_code_cell("1", metadata=status), new_code_cell("2")])))
    (figures / "new.png").touch()
    deadline = time.monotonic() + 60
    while "1/2 cells" not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "a study of 3 runs" in screen.getvalue() and f"[1/1] 0-a  {figures / 'new.png'}\n" in screen.getvalue()
    shown.end("finished")
    assert screen.getvalue().endswith("[1/1] 0-a  finished\n") and "old.png" not in screen.getvalue()
    assert screen.getvalue().count("\n") == 2  # the bar takes no line of its own once it is gone


def test_from_records_runs_only_what_can_do_without_computing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(runner.ROOT))
    write_notebook(tmp_path, "0-draws", "print('computes', compute)", parameters=PARAMETERS + "\ncompute: bool = True")
    write_notebook(tmp_path, "1-computes", "print('computes')")
    lacks = """from recon.paper import profiles
raise profiles.MissingRecords(profile, "2-lacks")
figures.savefig(
    fig, "some-line", "folder")"""
    write_notebook(tmp_path, "2-lacks", lacks, parameters=PARAMETERS + "\ncompute: bool = True")
    write_profile(tmp_path, "quick", {})
    outcomes = runner.execute("quick", root=tmp_path, compute=False)
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [("0-draws", "finished"), ("2-lacks", "missing")]
    assert "computes False" in (tmp_path / "build/quick/notebooks/0-draws.ipynb").read_text()
    # What has no records is named, with what makes them; that is no failure.
    how = "no records yet: run ./run_all.sh quick 2-lacks"
    assert outcomes[1].error == how and how in (tmp_path / "build/quick/html/index.html").read_text()
    assert f"- `some-line`: {how}" in (tmp_path / "build/quick/figures/README.md").read_text()
    assert not (tmp_path / "build/quick/notebooks/2-lacks.error.txt").exists()
    assert runner.execute("quick", ["2-lacks"], tmp_path)[0].status == "failed"  # its runs were asked for, and none has finished


def test_a_cell_that_only_draws_and_hangs_is_executed_once_more(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LONGEST", 3)
    hangs_once = "import pathlib, time\nif not (there := pathlib.Path('there')).exists():\n    there.touch()\n    time.sleep(60)"
    write_notebook(tmp_path, "once", hangs_once, parameters=PARAMETERS + "\ncompute: bool = True")
    write_notebook(tmp_path, "twice", "import time\ntime.sleep(60)", parameters=PARAMETERS + "\ncompute: bool = True")
    write_profile(tmp_path, "quick", {"once": {}, "twice": {}})
    outcomes = {each.name: each for each in runner.execute("quick", root=tmp_path, compute=False)}
    assert outcomes["once"].status == "finished"
    assert outcomes["twice"].status == "failed" and "Timeout" in outcomes["twice"].error


def test_notebooks_inherit_the_executor_and_the_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connected = []
    context = SimpleNamespace(gcs_address="127.0.0.1:4321")
    fake = SimpleNamespace(shutdown=lambda: connected.append("shut down"), get_runtime_context=lambda: context)
    monkeypatch.setattr("recon.study.workers.connect", lambda address: connected.append(address) or fake)
    seen = []

    def run(path, *others):
        seen.append((os.environ.get("RECON_EXECUTOR"), os.environ.get("RAY_ADDRESS")))
        return OUTCOME

    monkeypatch.setattr(runner, "_run", run)
    write_notebook(tmp_path, "0-a", "1")
    write_profile(tmp_path, "quick", {})
    monkeypatch.setenv("RECON_EXECUTOR", "serial")
    for options in ({}, {"executor": "ray"}, {"executor": "ray", "address": "10.0.0.1:6379"}):
        runner.execute("quick", root=tmp_path, **options)
    assert seen == [("serial", None), ("ray", "127.0.0.1:4321"), ("ray", "10.0.0.1:6379")]
    assert connected == [None, "shut down", "10.0.0.1:6379", "shut down"]
    assert os.environ["RECON_EXECUTOR"] == "serial" and "RAY_ADDRESS" not in os.environ
    with pytest.raises(ReconError, match="the executor is serial; choose executor ray"):
        runner.execute("quick", root=tmp_path, address="10.0.0.1:6379")
    runner.execute("quick", root=tmp_path, executor="ray", compute=False)
    assert len(connected) == 4  # nothing is computed


def test_options_may_stand_before_the_names_of_notebooks(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(runner, "execute", lambda *words, **options: given.append((words, options)) or [OUTCOME])
    assert runner.main(["quick", "--executor", "ray", "--address", "here:1", "0-a", "1-b"]) == 0
    [(words, options)] = given
    assert words == ("quick", ["0-a", "1-b"]) and (options["executor"], options["address"]) == ("ray", "here:1")


def test_a_failure_says_where_its_traceback_is(ran):
    root, outcomes, _ = ran
    assert outcomes[1].error == "KeyError: 'lost'"
    text = runner.summary("quick", outcomes, root)
    assert "2 of 3 notebooks finished" in text
    assert "KeyError: 'lost'" in text
    problem = root / "build/quick/notebooks/1-fails.error.txt"
    assert str(problem) in text
    assert "raise KeyError('lost')" in problem.read_text()
    assert "\x1b" not in problem.read_text()
    assert "KeyError" in (root / "build/quick/html/1-fails.html").read_text()
    for place in (root / "build/quick/figures", root / "build/quick/html/index.html", root / "build/quick/notebooks"):
        assert f"{place}\n" in text + "\n"


def test_the_index_links_what_is_there_and_needs_nothing_else(ran):
    root, outcomes, _ = ran
    html = root / "build/quick/html"
    index = (html / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', index)
    assert links[:3] == ["0-draws.html", "1-fails.html", "2-ends.html"]
    assert [link for link in links if not (html / link).is_file()] == []
    assert len(links) == 6  # three notebooks; the figure, its PDF and its data
    assert "http" not in index
    assert "Draws &amp; saves" in index
    assert "A &lt;line&gt; &amp; more" in index
    assert 'src="data:image/png;base64,' in index
    assert '<html lang="en">' in index
    assert index.count('class="failed"') == 1
    page = (root / "build/quick/figures/README.md").read_text()
    assert "## a-line" in page
    assert "- `b-line`: no records yet: run ./run_all.sh laptop 0-draws" in page  # its notebook finished without it


def test_one_notebook_alone_leaves_the_others_in_the_index(ran):
    root, _, _ = ran
    outcomes = runner.execute("quick", ["2-ends.ipynb"], root)
    assert [o.name for o in outcomes] == ["2-ends"]
    index = (root / "build/quick/html/index.html").read_text()
    assert all(f'href="{name}.html"' in index for name in ("0-draws", "1-fails", "2-ends"))


def refused(root: Path, profile: str = "quick", notebooks: list[str] | None = None) -> str:
    with pytest.raises(ReconError) as caught:
        runner.execute(profile, notebooks, root)
    assert not (root / "build").exists()
    return str(caught.value)


def test_unknown_things_are_refused_before_anything_runs(tmp_path):
    assert "no notebooks" in refused(tmp_path)
    write_notebook(tmp_path, "0-a", "1 / 0")
    assert "profile 'quick' has no file" in refused(tmp_path)
    assert "unknown profile 'fast'; allowed: quick, laptop, paper" in refused(tmp_path, "fast")
    write_profile(tmp_path, "quick", {"0-a": {"sizes": 3}})
    message = refused(tmp_path)
    assert "notebook '0-a' has no parameter 'sizes', which profile 'quick' sets; known: profile, size" in message
    write_profile(tmp_path, "quick", {"0-b": {}})
    assert "unknown notebook '0-b'; known: 0-a" in refused(tmp_path)
    write_profile(tmp_path, "quick", {"0-a": 3})
    assert "must map each notebook's name to a mapping" in refused(tmp_path)
    (tmp_path / "notebooks/profiles/quick.yaml").write_text("a: [")
    assert "is not YAML" in refused(tmp_path)
    write_profile(tmp_path, "quick", {})
    assert "unknown notebook '1-z'; known: 0-a" in refused(tmp_path, notebooks=["1-z"])


def test_a_notebook_must_have_one_parameters_cell_with_profile(tmp_path):
    write_notebook(tmp_path, "0-a", "1", parameters=None)
    write_profile(tmp_path, "quick", {})
    assert "'0-a' has 0 cells tagged 'parameters'" in refused(tmp_path)
    write_notebook(tmp_path, "0-a", "1", parameters="size: int = 1  # how many")
    assert "has no parameter 'profile'" in refused(tmp_path)


def test_each_profile_has_folders_of_its_own(tmp_path):
    owned = {profile: runner.folders(profile, root=tmp_path) for profile in runner.PROFILES}
    assert len({folder for both in owned.values() for folder in both}) == 6
    assert owned["laptop"] == (tmp_path / "figures", tmp_path / "results/laptop")
    for profile, both in owned.items():
        for folder in both:
            within = folder / "deep/er"
            assert runner.folders(profile, within, tmp_path) == (within / "figures", within / "records")
            for other in set(owned) - {profile}:
                with pytest.raises(ReconError, match=f"belongs to profile '{profile}', not '{other}'"):
                    runner.folders(other, within, tmp_path)
    for output in (".", "build/quick/../../figures"):
        with pytest.raises(ReconError, match="belongs to profile 'laptop'"):
            runner.folders("quick", output, tmp_path)
    assert runner.folders("quick", "mine", tmp_path) == (tmp_path / "mine/figures", tmp_path / "mine/records")


def test_the_exit_status_tells_mistakes_from_failures(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        runner.main(["fast"])
    assert caught.value.code == 2
    assert "quick" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        runner.main(["quick", "no-such-notebook"])
    assert caught.value.code == 2
    assert "unknown notebook 'no-such-notebook'" in capsys.readouterr().err
    for status, code in (("finished", 0), ("failed", 1), ("stopped", 130)):
        outcomes = [OUTCOME, runner.Outcome("1-b", "B", status, 1.0)]
        monkeypatch.setattr(runner, "execute", lambda *given, outcomes=outcomes, **options: outcomes)
        assert runner.main(["quick"]) == code
        assert "Profile quick" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_finished(tmp_path):
    write_notebook(tmp_path, "0-a", "print('done')")
    write_notebook(tmp_path, "1-b", "open('started', 'w').close()", "import time; time.sleep(120)")
    write_notebook(tmp_path, "2-c", "print('never')")
    write_profile(tmp_path, "quick", {})
    code = "import sys; from recon.paper import runner; print([o.status for o in runner.execute('quick', root=sys.argv[1])])"
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=runner.ROOT,
        env=os.environ,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "notebooks/started").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert output.strip() == "['finished', 'stopped']"
    index = (tmp_path / "build/quick/html/index.html").read_text()
    assert index.count('class="finished"') == index.count('class="stopped"') == 1


def test_pages_leave_out_the_source_of_plumbing_but_not_what_it_prints(tmp_path):
    output = nbformat.v4.new_output("stream", text="printed 42\n")
    cells = [new_code_cell("print(6 * 7)", outputs=[output], metadata={"tags": ["hide-input"]}), new_code_cell("taught = 1")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    text = re.sub(r"<[^>]+>", "", runner._render(tmp_path / "a.ipynb"))
    assert "printed 42" in text and "taught = 1" in text and "6 * 7" not in text
