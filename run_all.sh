#!/usr/bin/env bash
# From a fresh checkout to every table and figure; see usage below. Works from any folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# Set-up byte-compiles nothing. Python does so at first import, and has to save it, or every process would compile again.
unset PYTHONDONTWRITEBYTECODE

usage() {
    cat <<'TEXT'
usage: ./run_all.sh [quick | laptop | paper] [NOTEBOOK ...] [--executor ray [--address ADDRESS]]
       ./run_all.sh figures [quick | laptop | paper]
       ./run_all.sh site
       ./run_all.sh test [PYTEST ARGUMENT ...]
       ./run_all.sh lint
       ./run_all.sh lab
       ./run_all.sh --help

  quick    every notebook on the bundled model, small: minutes on 2 cores (the default)
  laptop   every notebook on both bundled models and small ones trained here, mostly 3 to 5 seeds: days on 2 cores, resumable
  paper    the paper's models and data: needs GPUs and access to the Hugging Face Hub
  figures  draw all figures but notebook 0's and judge every claim from existing records (default: laptop's); computes no runs
  site     README, gallery, verdicts, executed notebooks and guides as one site in build/site, which opens from disk
  test     the tests; arguments go to pytest (-m slow runs the slow ones)
  lint     check the style of all code (ruff)
  lab      open the notebooks in JupyterLab

NOTEBOOK restricts a profile to the notebooks named, such as 1-granularity.
--executor ray computes their runs in parallel, on the cores and GPUs of this machine or of the Ray cluster at ADDRESS.
Each command installs what it needs when it first runs: into the active virtual or conda environment or, without one, into .venv.
TEXT
}

say() { printf '%s\n' "$*"; }
fail() {
    printf 'run_all.sh: %s\n' "$*" >&2
    exit 1
}

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Sets $bin, the folder of the environment's executables; makes .venv if no environment is active.
find_environment() {
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        bin=$VIRTUAL_ENV/bin
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
        bin=$CONDA_PREFIX/bin
    else
        bin=$PWD/.venv/bin
        # Makes .venv again if it has no working pip (interrupted, or its Python is gone). Only uv's environments need none.
        "$bin/python" -m pip --version >/dev/null 2>&1 || grep -qs '^uv = ' .venv/pyvenv.cfg || make_venv
    fi
    suits "$bin/python" || fail "Python >= 3.11 is needed; $bin/python is $("$bin/python" --version 2>&1 || true)"
}

make_venv() {
    local candidate
    for candidate in python3.11 python3.12 python3; do # 3.11 first: the pins were resolved on it
        if suits "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            say "Making a virtual environment in .venv with $("$candidate" --version)"
            "$candidate" -m venv --clear .venv
            return
        fi
    done
    fail "Python >= 3.11 with venv is needed and was not found (on Debian or Ubuntu: apt install python3-venv)"
}

# Runs a command and appends its output to the log. A terminal shows the latest line only.
logged() {
    local line
    "$@" 2>&1 </dev/null | while IFS= read -r line; do
        printf '%s\n' "$line" >>build/setup.log
        if [[ -t 1 ]]; then printf '\r\033[K  %.76s' "$line"; fi
    done
    local status=${PIPESTATUS[0]}
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
    return "$status"
}

# Installs with uv if it is there and pip has no settings, which uv would not read; otherwise, or if uv fails, with pip.
install() {
    if command -v uv >/dev/null && [[ -z $("$bin/python" -m pip config list) ]] &&
        logged uv pip install --python "$bin/python" "$@"; then return; fi
    # Without byte-compiling all that is installed: Python compiles what is imported, which takes less time.
    logged "$bin/python" -m pip install --disable-pip-version-check 'pip>=24.1' &&
        logged "$bin/python" -m pip install --disable-pip-version-check --no-compile "$@"
}

# Installs the package with the extras named, each once. An extra's stamp, written last, holds the pins, Python and folder used.
set_up() {
    find_environment
    local stamps want extra missing=()
    stamps=$(dirname "$bin")/.recon-setup
    want=$("$bin/python" -c '
import hashlib, pathlib, sys
files = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join(files)).hexdigest(), sys.version.split()[0], pathlib.Path.cwd())')
    for extra in "$@"; do
        if [[ ! -f $stamps-$extra || $(<"$stamps-$extra") != "$want" ]]; then missing+=("$extra"); fi
    done
    if ((${#missing[@]} == 0)); then return; fi
    mkdir -p build
    : >build/setup.log
    say "Installing into $(dirname "$bin") (once; a minute or several, log: build/setup.log)"
    if ! install -c constraints.txt -e ".[$(IFS=, && printf '%s' "${missing[*]}")]"; then
        tail -n 20 build/setup.log >&2
        fail "the set-up failed (log: build/setup.log); run the same command to try again"
    fi
    for extra in "${missing[@]}"; do printf '%s\n' "$want" >"$stamps-$extra"; done
}

word=${1:-quick}
shift || true
if [[ $word == --executor* || $word == --address* ]]; then # options without a profile: that is quick
    set -- "$word" "$@"
    word=quick
fi
case $word in
-h | --help | help) usage ;;
quick | laptop | paper)
    extras=(notebooks)
    if [[ $word != quick ]]; then extras+=(evaluation); fi
    if [[ $word != quick || " $* " =~ [\ =]ray\  || ${RECON_EXECUTOR:-} == ray ]]; then extras+=(ray); fi
    set_up "${extras[@]}"
    "$bin/recon" assets
    JUPYTER_PREFER_ENV_PATH=1 exec "$bin/python" -m companion.run "$word" "$@"
    ;;
figures)
    set_up notebooks
    JUPYTER_PREFER_ENV_PATH=1 exec "$bin/python" -m companion.run "${1:-laptop}" --from-records
    ;;
site)
    set_up notebooks site
    exec "$bin/python" -m companion.site
    ;;
test)
    set_up notebooks site test evaluation ray
    "$bin/recon" assets
    if (($# == 0)); then # all fast tests run in parallel, by file; chosen ones in one process, as their output is read
        set -- --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
    fi
    exec "$bin/python" -m pytest "$@"
    ;;
lint)
    set_up test
    "$bin/python" -m ruff check . && exec "$bin/python" -m ruff format --check .
    ;;
lab)
    set_up notebooks lab
    JUPYTER_PREFER_ENV_PATH=1 exec "$bin/python" -m jupyter lab notebooks/ "$@"
    ;;
*)
    printf 'run_all.sh: unknown word %q; known: quick, laptop, paper, figures, site, test, lint, lab, --help\n' "$word" >&2
    exit 2
    ;;
esac
