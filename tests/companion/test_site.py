"""The site: every page is there, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from companion.publish import notebooks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_opens_from_disk():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])}
    subprocess.run([sys.executable, "-m", "companion.site"], cwd=ROOT, env=environment, check=True)
    site = ROOT / "build" / "site"
    pages = ["index", "ARTIFACT", "figures/README", "figures/claims", "guides/README"]
    for page in pages + [f"notebooks/{path.stem}" for path in notebooks()]:
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        sources = re.findall(r'<(?:img|script|link)[^>]* (?:src|href)="([^"]+)"', text)
        assert sources and not [source for source in sources if source.startswith(("http", "//"))]
        places = [(site / page).parent / source.partition("?")[0] for source in sources if not source.startswith("data:")]
        assert [place for place in places if not place.exists()] == []
