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
    assert re.search(r'^CMD \["./run_all.sh", "figures"\]$', docker, re.MULTILINE)
    base = re.search(r"^FROM python:([\d.]+)", docker, re.MULTILINE)[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(base)
    assert ".git" not in (ROOT / ".dockerignore").read_text().split()  # figures name the commit
    after = subprocess.run(["bash", "-n", str(ROOT / "postBuild")], capture_output=True, text=True)
    assert after.returncode == 0, after.stderr
    assert os.access(ROOT / "postBuild", os.X_OK) and (ROOT / "postBuild").read_text().endswith("exec ./run_all.sh figures\n")


def run(*words: str, script: Path = ROOT / "run_all.sh", **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "CONDA"))}
    command, environment = ["bash", str(script), *words], kept | environment
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, stdin=subprocess.DEVNULL)


@pytest.fixture
def checkout(tmp_path):
    """A folder with run_all.sh, and an environment whose Python and recon only write down how they are called."""
    here, environment = tmp_path / "a checkout", tmp_path / "an environment"
    (environment / "bin").mkdir(parents=True)
    here.mkdir()
    for name in ("run_all.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, here)
    log = tmp_path / "log"
    python = environment / "bin" / "python"
    python.write_text(
        f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\necho "python $*" >>"{log}"\n'
        f'if [[ -f "{tmp_path}/offline" && $* == *install* ]]; then echo no network; exit 1; fi\n'
        f'if [[ -f "{tmp_path}/settings" && $* == *config* ]]; then echo global.index-url; fi\n'
    )
    recon = environment / "bin" / "recon"
    recon.write_text(f'#!/bin/bash\necho "recon $*" >>"{log}"\n')
    python.chmod(0o755)
    recon.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()

    def call(*words: str, **variables: str):
        log.write_text("")
        path = f"{tools}:/usr/bin:/bin"
        done = run(*words, script=here / "run_all.sh", VIRTUAL_ENV=str(environment), PATH=path, **variables)
        return done, log.read_text().splitlines()

    def add_uv(status: int):
        (tools / "uv").write_text(f'#!/bin/bash\necho "uv $*" >>"{log}"\nexit {status}\n')
        (tools / "uv").chmod(0o755)

    call.here, call.offline, call.add_uv, call.python, call.settings = (
        here,
        tmp_path / "offline",
        add_uv,
        python,
        tmp_path / "settings",
    )
    return call


def install(extras: str) -> list[str]:
    """The calls that install these extras."""
    pip = "python -m pip install --disable-pip-version-check"
    return [f"{pip} pip>=24.1", f"{pip} --no-compile -c constraints.txt -e .[{extras}]"]


def test_the_active_environment_is_set_up_once(checkout):
    done, calls = checkout()
    assert done.returncode == 0, done.stderr
    assert calls == [*install("notebooks"), "recon assets", "python -m recon.paper.runner quick"]
    done, calls = checkout("quick", "1-granularity")
    assert calls == ["recon assets", "python -m recon.paper.runner quick 1-granularity"]
    assert done.stdout == ""
    with (checkout.here / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert checkout()[1][:2] == install("notebooks")
    assert not (checkout.here / ".venv").exists()


def test_what_a_word_needs_is_installed_when_it_is_first_used(checkout):
    assert checkout("test", "-m", "slow", "-k", "a b")[1] == [
        *install("notebooks,site,test,evaluation,ray"), "recon assets", "python -m pytest -m slow -k a b",
    ]  # fmt: skip
    assert checkout("site")[1] == ["python -m recon.paper.site"]
    assert checkout("lint")[1] == ["python -m ruff check .", "python -m ruff format --check ."]
    assert checkout("figures")[1] == ["python -m recon.paper.runner laptop --from-records"]
    assert checkout("laptop")[1] == ["recon assets", "python -m recon.paper.runner laptop"]
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
def test_profiles_install_the_evaluation_and_ray_where_they_use_them(checkout, words, variables, extras):
    _, calls = checkout(*words, **variables)
    profile = words if words and not words[0].startswith("-") else ["quick", *words]
    assert calls == [*install(extras), "recon assets", f"python -m recon.paper.runner {' '.join(profile)}"]


def test_uv_installs_where_it_is_there_and_pip_where_it_fails(checkout):
    asked, theirs = "python -m pip config list", f"uv pip install --python {checkout.python} -c constraints.txt -e .[notebooks]"
    checkout.add_uv(1)
    assert checkout("figures")[1][:4] == [asked, theirs, *install("notebooks")]
    checkout.add_uv(0)
    assert checkout("lint")[1][:2] == [asked, theirs.replace("notebooks", "test")]
    checkout.settings.touch()
    assert checkout("lab")[1][:3] == [asked, *install("lab")]  # such as an index of their own


def test_a_set_up_that_failed_is_done_again(checkout):
    checkout.offline.touch()
    done, calls = checkout()
    assert done.returncode == 1
    assert "no network" in done.stderr
    assert "run the same command to try again" in done.stderr
    assert calls == install("notebooks")[:1]
    checkout.offline.unlink()
    assert checkout()[1][:2] == install("notebooks")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_sets_nothing_up(checkout, word):
    done, calls = checkout(word)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("quick", "laptop", "paper", "figures", "site", "test", "lab", ".venv"))
    assert calls == []
    assert sorted(path.name for path in checkout.here.iterdir()) == ["constraints.txt", "pyproject.toml", "run_all.sh"]


def test_an_unknown_word_is_refused_with_the_known_ones(checkout):
    done, calls = checkout("fast")
    assert done.returncode == 2
    assert "unknown word fast; known: quick, laptop, paper, figures, site, test, lint, lab, --help" in done.stderr
    assert calls == []


def test_an_old_python_is_refused(checkout, tmp_path):
    old = tmp_path / "old" / "bin"
    old.mkdir(parents=True)
    (old / "python").write_text("#!/bin/bash\n[[ $1 == --version ]] && echo Python 3.8.18\nexit 1\n")
    (old / "python").chmod(0o755)
    done = run("quick", script=checkout.here / "run_all.sh", VIRTUAL_ENV=str(old.parent))
    assert done.returncode == 1
    assert "Python >= 3.10 is needed" in done.stderr and "Python 3.8.18" in done.stderr


@pytest.mark.slow
def test_the_pip_section_installs_in_a_fresh_environment(tmp_path):
    here = tmp_path / "checkout"
    here.mkdir()
    shutil.copytree(ROOT / "recon", here / "recon", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, here)
    # conda writes the section to a file beside environment.yml and gives that to pip.
    (here / "pip.txt").write_text("\n".join(conda()[1]) + "\n")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "pip>=24.1"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-U", "-r", "pip.txt"], cwd=here, check=True)
    code = "import recon, recon.paper.runner, recon.paper.figures, recon.cli, lm_eval.models.huggingface; print(recon.__file__)"
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
def test_a_plain_install_works_and_says_before_any_work_what_needs_an_extra(tmp_path):
    here, venv = tmp_path / "checkout", tmp_path / "venv"
    here.mkdir()
    shutil.copytree(ROOT / "recon", here / "recon", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, here)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python, recon = venv / "bin" / "python", venv / "bin" / "recon"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "."], cwd=here, check=True)
    for extra in ("lm_eval", "ray", "matplotlib", "jupyterlab"):
        assert subprocess.run([python, "-c", f"import {extra}"], capture_output=True).returncode, (
            f"{extra} comes without its extra"
        )
    subprocess.run([python, "-c", PLAIN], cwd="/", check=True)
    for words in (["--help"], ["run", "--help"], ["criteria"], ["models"]):
        subprocess.run([recon, *words], cwd="/", check=True, capture_output=True)
    for words, extra in ((["--tasks", "analogies"], "evaluation"), (["--executor", "ray", "--propagation", "dense"], "ray")):
        done = subprocess.run([recon, "run", "--model", "no/such", *words], cwd="/", capture_output=True, text=True)
        assert done.returncode == 2 and f"recon[{extra}]" in done.stderr, done.stderr
