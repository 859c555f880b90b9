#!/usr/bin/env bash
# From a fresh checkout to every table and figure; see usage below. Works from any folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# Set-up leaves compiling what is installed to its first use; without that, every notebook and test process would compile it anew.
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
  figures  draw all figures but notebook 0's and judge every claim from the records that are there (laptop's, unless said); runs nothing
  site     README, gallery, verdicts, executed notebooks and guides as one site in build/site, which opens from disk
  test     the tests; arguments go to pytest (-m slow runs the slow ones)
  lint     check the style of all code (ruff)
  lab      open the notebooks in JupyterLab

NOTEBOOK restricts a profile to the notebooks named, such as 1-granularity.
--executor ray computes their runs side by side, on the cores and GPUs of this machine or of the cluster at ADDRESS.
What each of these needs is installed when it is first used, into the active virtual or conda environment; where there is none, into .venv.
TEXT
}

say() { printf '%s\n' "$*"; }
fail() {
    printf 'run_all.sh: %s\n' "$*" >&2
    exit 1
}

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Sets $bin, the folder of the environment's executables; makes .venv where no environment is active.
find_environment() {
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        bin=$VIRTUAL_ENV/bin
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
        bin=$CONDA_PREFIX/bin
    else
        bin=$PWD/.venv/bin
        # A .venv that was interrupted half way, or whose Python has gone, is made anew; uv's are whole without pip.
        "$bin/python" -m pip --version >/dev/null 2>&1 || grep -qs '^uv = ' .venv/pyvenv.cfg || make_venv
    fi
    suits "$bin/python" || fail "Python >= 3.11 is needed; $bin/python is $("$bin/python" --version 2>&1 || true)"
}

make_venv() {
    local candidate
    for candidate in python3.11 python3.12 python3; do # the pins were resolved on 3.11
        if suits "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            say "Making a virtual environment in .venv with $("$candidate" --version)"
            "$candidate" -m venv --clear .venv
            return
        fi
    done
    fail "Python >= 3.11 with venv is needed and was not found (on Debian or Ubuntu: apt install python3-venv)"
}

# Runs a command whose output goes to the log; on a terminal its latest line is shown, overwriting itself.
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

# By uv where it is there and would find what pip finds: it does not read pip's settings.
install() {
    if command -v uv >/dev/null && [[ -z $("$bin/python" -m pip config list) ]] &&
        logged uv pip install --python "$bin/python" "$@"; then return; fi
    # Byte-compiling all that is installed takes longer than what is used of it, which Python compiles when it is imported.
    logged "$bin/python" -m pip install --disable-pip-version-check 'pip>=24.1' &&
        logged "$bin/python" -m pip install --disable-pip-version-check --no-compile "$@"
}

# Installs the package with the extras named, each once: its stamp, written last, says what the environment was set up for.
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
if [[ $word == --executor* || $word == --address* ]]; then # options of the default
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
    if (($# == 0)); then # all of the fast ones, a file to a core; what is chosen by hand runs in one process, as its output is read
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
