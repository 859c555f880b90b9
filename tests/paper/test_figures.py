"""Figures: what is written, that it does not change by itself, and the page that shows them."""

import json

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from recon.errors import ReconError
from recon.paper import figures

DATA = pd.DataFrame({"granularity": ["matrix", "block"], "perplexity": [32.8123456789, 30.6]})
RECORDS = [{"key": "b2", "perplexity": 30.6}, {"key": "a1"}, {"key": "b2"}]


@pytest.fixture
def fig():
    with matplotlib.rc_context():
        figures.style()
        fig, ax = plt.subplots()
        ax.plot(DATA["granularity"], DATA["perplexity"])
        yield fig
        plt.close(fig)


def test_savefig_writes_the_figure_its_data_and_where_it_came_from(fig, tmp_path):
    png = figures.savefig(fig, "size-1.5", tmp_path / "new", DATA, RECORDS, caption="Perplexity [lower is better]")
    assert png == tmp_path / "new" / "size-1.5.png"
    endings = ("csv", "json", "pdf", "png")
    assert sorted(path.name for path in png.parent.iterdir()) == [f"size-1.5.{ending}" for ending in endings]
    assert png.read_bytes().startswith(b"\x89PNG")
    pdf = png.with_name("size-1.5.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # a TrueType font, embedded
    assert png.with_name("size-1.5.csv").read_text() == "granularity,perplexity\nmatrix,32.8123\nblock,30.6\n"
    provenance = json.loads(png.with_name("size-1.5.json").read_text())
    assert provenance["name"] == "size-1.5"
    assert provenance["caption"] == "Perplexity [lower is better]"
    assert provenance["records"] == ["a1", "b2"]
    assert provenance["packages"]["matplotlib"] == matplotlib.__version__
    assert {"git_commit", "git_dirty"} <= set(provenance)


def test_provenance_names_the_commits_of_the_records(fig, tmp_path):
    records = [{"key": str(i), "environment": {"git_commit": commit}} for i, commit in enumerate(("f1", None, "e2", "f1"))]
    figures.savefig(fig, "line", tmp_path, DATA, [*records, {"key": "old"}])
    assert json.loads((tmp_path / "line.json").read_text())["record_commits"] == ["e2", "f1"]


def test_saving_again_changes_nothing(fig, tmp_path):
    first = figures.savefig(fig, "same", tmp_path, DATA, RECORDS, "caption")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert figures.savefig(fig, "same", tmp_path, DATA, RECORDS, "caption") == first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(fig, tmp_path, monkeypatch):
    figures.savefig(fig, "kept", tmp_path, DATA, RECORDS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(DATA.__class__, "to_csv", full_disk)
    with pytest.raises(OSError, match="no space left"):
        figures.savefig(fig, "kept", tmp_path, DATA, RECORDS, "new caption")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["../escape", "Upper", "a b", "", ".hidden", "a/b"])
def test_names_that_do_not_suit_a_file_are_refused(fig, tmp_path, name):
    with pytest.raises(ReconError, match="figure name .* allowed: lower-case"):
        figures.savefig(fig, name, tmp_path, DATA, RECORDS)
    assert not list(tmp_path.iterdir())


def test_empty_data_and_records_without_key_are_refused(fig, tmp_path):
    with pytest.raises(ReconError, match="'empty' has no data"):
        figures.savefig(fig, "empty", tmp_path, DATA.head(0), RECORDS)
    with pytest.raises(ReconError, match=r"records \[1\] have no 'key'"):
        figures.savefig(fig, "keyless", tmp_path, DATA, [{"key": "a"}, {}])


def test_style_tells_lines_apart_without_colour():
    with matplotlib.rc_context():
        figures.style()
        cycle = list(plt.rcParams["axes.prop_cycle"])
        assert len({(entry["linestyle"], entry["marker"]) for entry in cycle}) == len(cycle) == 18
        assert len({entry["color"] for entry in cycle}) == 9
        assert plt.rcParams["pdf.fonttype"] == 42


def test_lower_is_better_is_said_once_and_on_the_right_axis(fig):
    ax = fig.axes[0]
    ax.set_ylabel("perplexity")
    figures.lower_is_better(ax)
    figures.lower_is_better(ax)
    assert ax.get_ylabel() == "perplexity\n(lower is better \N{DOWNWARDS ARROW})"
    assert ax.get_xlabel() == ""
    figures.lower_is_better(ax, "x")
    assert ax.get_xlabel() == "(lower is better \N{LEFTWARDS ARROW})"
    with pytest.raises(ReconError, match="unknown axis 'z'; allowed: x, y"):
        figures.lower_is_better(ax, "z")


@pytest.mark.parametrize(("low", "high", "shown"), [(33, 41, "35"), (50, 12000, "1000"), (0.2, 0.9, "0.5")])
def test_log_scale_has_a_few_plain_numbers(low, high, shown):
    fig, ax = plt.subplots()
    ax.plot([low, high])
    figures.log_scale(ax)
    fig.canvas.draw()
    bottom, top = ax.get_ylim()
    labels = [label.get_text() for label, at in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True) if bottom <= at <= top]
    assert shown in labels and 2 <= len(labels) <= 12 and not any("e" in label for label in labels[:-1])
    plt.close(fig)


def test_numbers_beside_marks_have_three_digits():
    values = [0.2, 0.6549, 9.9999, 38, 99.96, 213.7, 12345]
    assert [figures.number(value) for value in values] == ["0.200", "0.655", "10.0", "38.0", "100", "214", "12345"]


def test_captions_under_figures_are_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *objects: shown.extend(objects))
    monkeypatch.setattr(plt, "show", lambda: shown.append("figure"))
    figures.show(figures.sentence("perplexity < 40."))
    figures.show()
    assert shown[::2] == ["figure", "figure"] and "Perplexity &lt; 40." in shown[1].data


def test_styles_stay_with_their_names():
    found = figures.styles(["b", "a", "b"])
    assert list(found) == ["b", "a"] and found["a"] != found["b"]


GROUPS = {
    "granularities": "matrix, matrix exact, half-block, half-block from exact, block, 2-blocks, 4-blocks, 8-blocks, quarter, model",
    "criteria": "magnitude, wanda, sparsegpt, ria, flap, random",
    "methods": "reconstruction, masklora, full, lora, scalelora, norms, reconstruction+masklora, masklora+distilled, dense+masklora",
    "propagations": "dense propagation, sparse propagation, mixed propagation",
    "losses": "whitened, mse, cosine, relative",
    "states": "dense, pruned, reconstructed",
    "models": "smollm2-135m, gemma3-270m",
}
LONG = {
    "reconstruction+masklora": "reconstruction, then masklora",
    "masklora+distilled": "masklora, distilled",
    "dense+masklora": "dense, masklora",
}


def grey(colour):
    """Lightness as a print in grey shows it."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("group", GROUPS)
def test_looks_of_a_group_differ_without_colour(group):
    names = [LONG.get(name, name) for name in GROUPS[group].split(", ")]
    shown = [figures.look(name) for name in names]
    assert len({(str(entry["marker"]), str(entry["linestyle"])) for entry in shown}) == len(names)
    assert max(grey(entry["color"]) for entry in shown) < 0.8  # visible on white


def test_granularities_are_a_ramp_and_the_exact_ones_keep_their_colour():
    sizes = ["matrix", "half-block", "block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model"]
    shades = [grey(figures.look(size)["color"]) for size in sizes]
    assert shades == sorted(shades) and len(set(shades)) == len(shades)
    exact, plain = figures.look("half-block from exact"), figures.look("half-block")
    assert exact["color"] == plain["color"] and exact["marker"] != plain["marker"]


def test_main_methods_are_coloured_and_the_rest_is_grey():
    def coloured(name):
        return len({round(part, 2) for part in matplotlib.colors.to_rgb(figures.look(name)["color"])}) > 1

    main = ["reconstruction", "masklora", "full"]
    rest = ["lora", "scalelora", "norms", "masklora, distilled", "reconstruction, then masklora", "dense, masklora"]
    assert [coloured(name) for name in main + rest] == [True] * 3 + [False] * len(rest)


def test_a_look_cannot_be_changed_and_an_unknown_name_keeps_its_own():
    figures.look("block")["color"] = "red"
    assert figures.look("block")["color"] != "red"
    assert figures.look("another/model-7b") == figures.look("another/model-7b")


def test_the_finding_is_the_title_and_part_of_the_alternative_text(fig, tmp_path):
    figures.savefig(fig, "same", tmp_path, DATA, RECORDS, "caption")
    plain = (tmp_path / "same.png").read_bytes()
    figures.savefig(fig, "same", tmp_path, DATA, RECORDS, "caption", finding="Blocks win.", drawn="Two points.")
    provenance = json.loads((tmp_path / "same.json").read_text())
    assert (provenance["finding"], provenance["alt"], provenance["caption"]) == (
        "Blocks win.",
        "Blocks win. Two points.",
        "caption",
    )
    assert fig.get_suptitle() == "Blocks win."
    first = (tmp_path / "same.png").read_bytes()
    assert first != plain
    figures.savefig(fig, "same", tmp_path, DATA, RECORDS, "caption", finding="Blocks win.", drawn="Two points.")
    assert (tmp_path / "same.png").read_bytes() == first


def test_a_long_finding_is_no_wider_than_the_figure_and_above_the_axes(fig, tmp_path):
    figures.title(fig, "Windows of half a block and more are as good as one another within the margin on every model here. " * 2)
    fig.canvas.draw()
    box, top = fig._suptitle.get_window_extent(), max(ax.get_window_extent().y1 for ax in fig.axes)
    assert box.x1 <= fig.bbox.x1 and box.y0 >= top
    assert "\n" in fig.get_suptitle()


def test_the_title_is_above_axes_that_are_laid_out_when_they_are_drawn():
    fig, axes = plt.subplots(3, 1, figsize=(4, 3), layout="constrained")
    for ax in axes:
        ax.set_yticks([0, 1], ["a label that is wider than the axes were", "another"])
    figures.title(fig, "A finding")
    fig.draw_without_rendering()
    lowest = fig._suptitle.get_window_extent().y0
    assert all(ax.get_tightbbox().y1 < lowest for ax in axes)
    plt.close(fig)


def test_reference_lines_name_their_level(fig):
    ax = fig.axes[0]
    figures.reference(ax, 31.234, "pruned")
    assert ax.lines[-1].get_linestyle() == "--" and list(ax.lines[-1].get_ydata()) == [31.234, 31.234]
    assert [text.get_text() for text in ax.texts] == ["pruned 31.2"]
