"""`recon bench`: where the time goes, beside the machine's own speed and a straightforward loop, all in one run."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.paper.bench import sections
from recon.paper.bench.spec import BenchSpec
from recon.paper.bench.subject import Subject
from recon.runtime.storage import check_writable, write_json
from recon.study.environment import environment


def bench(spec: BenchSpec, progress: bool = True, compute: bool = True) -> dict:
    """Measures the sections of `spec`, writing `spec.output` after each; returns everything in that file.

    compute: False measures nothing.

    Raises:
        ReconError: bad input, or the file holds measurements of another spec.
    """
    check_writable(spec.output.parent, "output")
    settings = {k: v for k, v in asdict(spec).items() if k not in ("output", "sections", "redo")}
    results = _read(spec.output, settings)
    missing = [section for section in spec.sections if compute and (spec.redo or section not in results["sections"])]
    subject = Subject(spec, progress) if missing else None
    for section in tqdm(missing, desc="bench", unit="section", disable=not progress):
        began = time.perf_counter()
        found = json.loads(json.dumps(getattr(sections, section)(subject)))  # as it will be read
        where = environment(subject.device, "auto")
        results["sections"][section] = {"results": found, "seconds": time.perf_counter() - began, "environment": where}
        write_json(spec.output, results)
    return results


def _read(path: Path, settings: dict) -> dict:
    if not path.exists():
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return {"key": key, "settings": settings, "sections": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        found = results["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReconError(f"output {str(path)!r} is not a file of measurements ({error}); name another") from error
    if other := [name for name in settings if found.get(name) != settings[name]]:
        name = other[0]
        raise ReconError(
            f"output {str(path)!r} holds measurements with {name} {found.get(name)!r}, not {settings[name]!r}; name another"
        )
    return results
