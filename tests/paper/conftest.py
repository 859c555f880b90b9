"""What tests of figures share."""

import matplotlib
import matplotlib.pyplot as plt
import pytest

from recon.paper import figures


@pytest.fixture
def style():
    """The look of all figures, for one test; figures that it leaves open are closed."""
    with matplotlib.rc_context():
        figures.style()
        yield
    plt.close("all")
