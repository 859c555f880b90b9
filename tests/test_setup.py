"""Setting up: the environment files agree with one another, and run_all.sh does what it says, once."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along there

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.10.0", "3.11.0", "3.12.0", "3.13.0")
RANGES = {"torch", "pip"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert requirements
    found = {canonical(requirement.name): requirement for requirement in requirements}
    assert len(found) == len(requirements)
    return found


def declared() -> list[Requirement]:
    optional = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for texts in (PROJECT["dependencies"], *optional) for text in texts]


def conda() -> tuple[list[str], list[str]]:
    """The lines of environment.yml outside and inside its pip section."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [section] = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    return [entry for entry in dependencies if isinstance(entry, str)], section


def test_everything_is_pinned_save_what_depends_on_the_machine():
    for name, requirement in constraints().items():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == ({">=", "<"} if name == "torch" else {">="} if name == "pip" else {"=="}), requirement
        assert "+" not in str(requirement.specifier), requirement
        assert not re.match(r"nvidia-|cuda-|triton|recon$", name), requirement


def test_every_dependency_is_constrained_within_what_pyproject_allows():
    known = constraints()
    for wanted in declared():
        constraint = known[canonical(wanted.name)]
        if canonical(wanted.name) not in RANGES:
            [pin] = constraint.specifier
            assert wanted.specifier.contains(pin.version), (wanted, constraint)
        else:
            assert set(wanted.specifier) == set(constraint.specifier), (wanted, constraint)


def test_pins_carry_a_marker_where_an_older_python_lacks_them():
    compared = 0
    for name, requirement in constraints().items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        [*specifiers] = requirement.specifier
        if specifiers[0].operator != "==" or installed.version != specifiers[0].version:
            continue
        compared += 1
        supported = SpecifierSet(installed.metadata.get("Requires-Python") or "")
        for python in PYTHONS:
            there = default_environment() | {"python_version": python.rpartition(".")[0], "python_full_version": python}
            applies = requirement.marker is None or requirement.marker.evaluate(there)
            assert not applies or supported.contains(python), f"{requirement} on Python {python}: needs {supported}"
    assert compared > 50


def test_conda_installs_what_pip_installs():
    outside, section = conda()
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
    here, log, tools = tmp_path / "a checkout", tmp_path / "log", tmp_path / "tools"
    (tmp_path / "env" / "bin").mkdir(parents=True)
    here.mkdir()
    tools.mkdir()
    for name in ("run_all.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, here)

    def program(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def call(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "CONDA"))}
        kept |= {"VIRTUAL_ENV": str(tmp_path / "env"), "PATH": f"{tools}:/usr/bin:/bin"} | variables
        command = ["bash", str(here / "run_all.sh"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=kept, stdin=subprocess.DEVNULL)
        return done, log.read_text().splitlines()

    program(
        tmp_path / "env" / "bin" / "python",
        f'[[ $1 == -c ]] && exec {sys.executable} "$@"\necho "python $*" >>"{log}"\n'
        f'if [[ -f "{tmp_path}/offline" && $* == *install* ]]; then echo no network; exit 1; fi\n'
        f'if [[ -f "{tmp_path}/settings" && $* == *config* ]]; then echo global.index-url; fi',
    )
    program(tmp_path / "env" / "bin" / "recon", f'echo "recon $*" >>"{log}"')
    call.here, call.offline, call.settings = here, tmp_path / "offline", tmp_path / "settings"
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


@pytest.mark.parametrize(
    "words, variables, extras",
    [
        (["paper"], {}, "notebooks,evaluation,ray"),
        (["--executor", "ray", "--address", "10.0.0.1:6379"], {}, "notebooks,ray"),
        (["quick", "0-quickstart", "--executor=ray"], {}, "notebooks,ray"),
        (["quick", "--executor", "serial"], {}, "notebooks"),
        ([], {"RECON_EXECUTOR": "ray"}, "notebooks,ray"),
    ],
)
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
    checkout.settings.touch()
    assert checkout("lab")[1][:3] == [asked, *install("lab")]  # such as an index of their own


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
    assert done.returncode == 1 and "Python >= 3.10 is needed" in done.stderr and "Python 3.8.18" in done.stderr


@pytest.fixture
def fresh(tmp_path):
    """A copy of what is installed, and the Python of a new environment."""
    for name in ("recon", "notebooks/companion"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "checkout")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    return tmp_path / "checkout", tmp_path / "venv" / "bin" / "python"


@pytest.mark.slow
def test_the_pip_section_installs_in_a_fresh_environment(fresh):
    here, python = fresh
    # conda writes the section to a file beside environment.yml and gives that to pip.
    (here / "pip.txt").write_text("\n".join(conda()[1]) + "\n")
    subprocess.run([python, "-m", "pip", "install", "-q", "pip>=24.1"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-U", "-r", "pip.txt"], cwd=here, check=True)
    code = "import companion.run, companion.site, recon, recon.cli, lm_eval.models.huggingface; print(recon.__file__)"
    done = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == str(here / "recon" / "__init__.py"), done.stderr
    subprocess.run([python, "-m", "pip", "check"], check=True)


PLAIN = """
import copy, torch, transformers
import recon
from recon.config import ReconstructionConfig

config = transformers.LlamaConfig(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
dense = transformers.AutoModelForCausalLM.from_config(config).eval()
samples = torch.randint(99, (4, 16))
pruned = copy.deepcopy(dense)
masks = recon.prune(pruned, samples).masks
reports = recon.reconstruct(pruned, dense, samples, ReconstructionConfig(granularity="block"), masks=masks)
assert len(reports) == 2 and all(not (m.weight[~masks[n]] != 0).any() for n, m in recon.decompose(pruned).matrices().items())
"""


@pytest.mark.slow
def test_a_plain_install_works_and_says_before_any_work_what_needs_an_extra(fresh):
    here, python = fresh
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "."], cwd=here, check=True)
    for extra in ("lm_eval", "ray", "matplotlib", "jupyterlab"):
        assert subprocess.run([python, "-c", f"import {extra}"], capture_output=True).returncode, f"{extra} comes along"
    subprocess.run([python, "-c", PLAIN], cwd="/", check=True)
    for words in (["--help"], ["run", "--help"], ["criteria"], ["models"]):
        subprocess.run([python.with_name("recon"), *words], cwd="/", check=True, capture_output=True)
    for words, extra in ((["--tasks", "analogies"], "evaluation"), (["--executor", "ray", "--propagation", "dense"], "ray")):
        done = subprocess.run([python.with_name("recon"), "run", "--model", "no/such", *words], capture_output=True, text=True)
        assert done.returncode == 2 and f"recon[{extra}]" in done.stderr, done.stderr
