"""Where the notebooks of each profile write figures and records. Notebooks import this, and not what runs them."""

from pathlib import Path

from recon.errors import ReconError

ROOT = Path(__file__).resolve().parents[2]
PROFILES = {  # where their notebooks write figures and records
    "quick": ("build/quick/figures", "build/quick/records"),
    "laptop": ("figures", "results/laptop"),
    "paper": ("figures/paper", "results/paper"),
}


class MissingRecords(ReconError):
    """Raised by a notebook that has no finished run to draw from."""

    def __init__(self, profile: str, notebook: str):
        super().__init__(f"no records yet: run ./run_all.sh {profile} {notebook}")


def folders(profile: str, output: Path | str = "", root: Path | str = ROOT) -> tuple[Path, Path]:
    """Where a notebook writes: (figures, records), those of `profile`, or folders inside `output` (relative to `root`).

    Raises:
        ReconError: `profile` is unknown, or `output` lies inside the folders of another profile.
    """
    if profile not in PROFILES:
        raise ReconError(f"unknown profile {profile!r}; allowed: {', '.join(PROFILES)}")
    root = Path(root)
    if not output:
        figure_folder, record_folder = PROFILES[profile]
        return root / figure_folder, root / record_folder
    owners = {(root / folder).resolve(): name for name, both in PROFILES.items() for folder in both}
    chosen = (root / output).resolve()
    for path in (chosen / "figures", chosen / "records"):
        # figures/paper lies inside figures: the innermost folder decides.
        owner = next((owners[parent] for parent in (path, *path.parents) if parent in owners), profile)
        if owner != profile:
            raise ReconError(f"output folder {str(output)!r} belongs to profile {owner!r}, not {profile!r}; give another")
    return chosen / "figures", chosen / "records"
