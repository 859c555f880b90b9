"""Setting up: the environment files agree with one another, and run_all.sh does what it says, once."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11.0", "3.12.0", "3.13.0")


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_everything_is_pinned_within_what_pyproject_allows_save_what_depends_on_the_machine():
    known = constraints()
    for name, requirement in known.items():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {"torch": {">=", "<"}, "pip": {">="}}.get(name, {"=="}), requirement
        assert "+" not in str(requirement.specifier) and not re.match(r"nvidia-|cuda-|triton|recon$", name), requirement
    for text in itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        wanted = Requirement(text)
        constraint = known[canonicalize_name(wanted.name)]
        if canonicalize_name(wanted.name) in ("torch", "pip"):
            assert set(wanted.specifier) == set(constraint.specifier), (wanted, constraint)
        else:
            assert wanted.specifier.contains([*constraint.specifier][0].version), (wanted, constraint)


def test_pins_carry_a_marker_if_an_older_python_lacks_them():
    for name, requirement in constraints().items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed = metadata.distribution(name)
            if str(requirement.specifier) == f"=={installed.version}":
                supported = SpecifierSet(installed.metadata.get("Requires-Python") or "")
                for python in PYTHONS:
                    there = default_environment() | {"python_version": python.rpartition(".")[0], "python_full_version": python}
                    applies = requirement.marker is None or requirement.marker.evaluate(there)
                    assert not applies or supported.contains(python), f"{requirement} on Python {python}: needs {supported}"


def test_conda_installs_what_pip_installs():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [section] = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    outside = [entry for entry in dependencies if isinstance(entry, str)]
    assert [re.match(r"[a-z]+", line)[0] for line in outside] == ["python", "pip"]
    allowed = SpecifierSet(outside[0].removeprefix("python"))
    assert allowed.contains("3.11.7")
    assert all(python in SpecifierSet(PROJECT["requires-python"]) for python in allowed.filter(PYTHONS))
    assert Requirement(outside[1]).specifier == constraints()["pip"].specifier
    assert section[0] == "-c constraints.txt"
    [extras] = [re.fullmatch(r"-e \.\[([\w,]+)\]", line)[1] for line in section[1:]]
    assert set(extras.split(",")) == set(PROJECT["optional-dependencies"])


def test_docker_and_binder_draw_the_figures():
    docker = (ROOT / "Dockerfile").read_text()
    assert '\nCMD ["./run_all.sh", "figures"]' in docker
    assert SpecifierSet(PROJECT["requires-python"]).contains(re.search(r"^FROM python:([\d.]+)", docker, re.MULTILINE)[1])
    assert ".git" not in (ROOT / ".dockerignore").read_text().split()  # figures name the commit
    assert os.access(ROOT / "postBuild", os.X_OK) and (ROOT / "postBuild").read_text().endswith("exec ./run_all.sh figures\n")


@pytest.fixture
def checkout(tmp_path):
    """A folder with run_all.sh, and an environment whose Python and recon only write down how they are called."""
    here, log, tools, env = (tmp_path / name for name in ("a checkout", "log", "tools", "env/bin"))
    for folder in (here, tools, env):
        folder.mkdir(parents=True)
    for name in ("run_all.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, here)

    def program(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def call(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "CONDA"))}
        kept |= {"VIRTUAL_ENV": str(env.parent), "PATH": f"{tools}:/usr/bin:/bin"} | variables
        command = ["bash", str(here / "run_all.sh"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=kept, stdin=subprocess.DEVNULL)
        return done, log.read_text().splitlines()

    offline = f'if [[ -f "{tmp_path}/offline" && $* == *install* ]]; then echo no network; exit 1; fi'
    program(env / "python", f'[[ $1 == -c ]] && exec {sys.executable} "$@"\necho "python $*" >>"{log}"\n{offline}')
    program(env / "recon", f'echo "recon $*" >>"{log}"')
    call.here, call.offline = here, tmp_path / "offline"
    call.add_uv = lambda status: program(tools / "uv", f'echo "uv $*" >>"{log}"\nexit {status}')
    call.program = program
    return call


def install(extras: str) -> list[str]:
    """The calls that install these extras."""
    pip = "python -m pip install --disable-pip-version-check"
    return [f"{pip} pip>=24.1", f"{pip} --no-compile -c constraints.txt -e .[{extras}]"]


def test_the_active_environment_is_set_up_once(checkout):
    done, calls = checkout()
    assert done.returncode == 0, done.stderr
    assert calls == [*install("notebooks"), "recon assets", "python -m companion.run quick"]
    done, calls = checkout("quick", "1-granularity")
    assert calls == ["recon assets", "python -m companion.run quick 1-granularity"] and done.stdout == ""
    with (checkout.here / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert checkout()[1][:2] == install("notebooks") and not (checkout.here / ".venv").exists()


def test_what_a_word_needs_is_installed_when_it_is_first_used(checkout):
    assert checkout("test", "-m", "slow", "-k", "a b")[1] == [
        *install("notebooks,site,test,evaluation,ray"), "recon assets", "python -m pytest -m slow -k a b",
    ]  # fmt: skip
    assert checkout("site")[1] == ["python -m companion.site"]
    assert checkout("lint")[1] == ["python -m ruff check .", "python -m ruff format --check ."]
    assert checkout("figures")[1] == ["python -m companion.run laptop --from-records"]
    assert checkout("laptop")[1] == ["recon assets", "python -m companion.run laptop"]
    assert checkout("lab")[1] == [*install("lab"), "python -m jupyter lab notebooks/"]
    assert checkout("lab")[1] == ["python -m jupyter lab notebooks/"]


@pytest.mark.parametrize("words, variables, extras", [
    (["paper"], {}, "notebooks,evaluation,ray"),
    (["--executor", "ray", "--address", "10.0.0.1:6379"], {}, "notebooks,ray"),
    (["quick", "0-quickstart", "--executor=ray"], {}, "notebooks,ray"),
    ([], {"RECON_EXECUTOR": "ray"}, "notebooks,ray"),
])  # fmt: skip
def test_profiles_install_the_evaluation_and_ray_for_runs_that_use_them(checkout, words, variables, extras):
    profile = words if words and not words[0].startswith("-") else ["quick", *words]
    assert checkout(*words, **variables)[1] == [*install(extras), "recon assets", f"python -m companion.run {' '.join(profile)}"]


def test_uv_installs_if_it_is_there_and_pip_if_it_fails(checkout):
    python = checkout.here.parent / "env" / "bin" / "python"
    asked, theirs = "python -m pip config list", f"uv pip install --python {python} -c constraints.txt -e .[notebooks]"
    checkout.add_uv(1)
    assert checkout("figures")[1][:4] == [asked, theirs, *install("notebooks")]
    checkout.add_uv(0)
    assert checkout("lint")[1][:2] == [asked, theirs.replace("notebooks", "test")]


def test_a_set_up_that_failed_is_done_again(checkout):
    checkout.offline.touch()
    done, calls = checkout()
    assert done.returncode == 1 and calls == install("notebooks")[:1]
    assert "no network" in done.stderr and "run the same command to try again" in done.stderr
    checkout.offline.unlink()
    assert checkout()[1][:2] == install("notebooks")


def test_help_and_unknown_words_set_nothing_up(checkout):
    for word, status in {"--help": 0, "-h": 0, "help": 0, "fast": 2}.items():
        done, calls = checkout(word)
        assert done.returncode == status and calls == []
        said = done.stderr if status else done.stdout
        assert all(name in said for name in ("quick", "laptop", "paper", "figures", "site", "test", "lint", "lab"))
    assert sorted(path.name for path in checkout.here.iterdir()) == ["constraints.txt", "pyproject.toml", "run_all.sh"]


def test_an_old_python_is_refused(checkout, tmp_path):
    (tmp_path / "old" / "bin").mkdir(parents=True)
    checkout.program(tmp_path / "old" / "bin" / "python", "[[ $1 == --version ]] && echo Python 3.8.18\nexit 1")
    done, _ = checkout("quick", VIRTUAL_ENV=str(tmp_path / "old"))
    assert done.returncode == 1 and "Python >= 3.11 is needed" in done.stderr and "Python 3.8.18" in done.stderr


PLAIN = """
import copy, recon, torch, transformers
config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
dense = transformers.AutoModelForCausalLM.from_config(config).eval()
pruned = copy.deepcopy(dense)
assert len(recon.reconstruct(pruned, dense, torch.randint(99, (4, 16)), pruning=recon.PruningConfig())) == 4
assert all((m.weight == 0).float().mean() >= 0.5 for m in recon.decompose(pruned).matrices().values())
"""


@pytest.mark.slow
def test_a_plain_install_works_and_says_before_any_work_what_needs_an_extra(tmp_path):
    for name in ("recon", "notebooks/companion"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python, recon = (tmp_path / "venv" / "bin" / name for name in ("python", "recon"))
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "."], cwd=tmp_path, check=True)
    for extra in ("lm_eval", "ray", "matplotlib", "jupyterlab"):
        assert subprocess.run([python, "-c", f"import {extra}"], capture_output=True).returncode, f"{extra} comes along"
    subprocess.run([python, "-c", PLAIN], cwd="/", check=True)
    for words in (["run", "--help"], ["criteria"], ["models"]):
        subprocess.run([recon, *words], cwd="/", check=True, capture_output=True)
    for words, extra in ((["--tasks", "analogies"], "evaluation"), (["--executor", "ray", "--propagation", "dense"], "ray")):
        done = subprocess.run([recon, "run", "--model", "no/such", *words], capture_output=True, text=True)
        assert done.returncode == 2 and f".[{extra}]" in done.stderr, done.stderr
