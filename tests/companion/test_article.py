"""The article: no number is typed, every link leads somewhere, what is not there is said."""

import re

import pandas as pd
import pytest
from fixtures.made_up import everything

from companion import article, frame, judge
from companion.publish import ROOT

SAID = re.compile(r"\{\{.*?\}\}|\]\(.*?\)")  # what records give, and addresses


def test_no_number_is_typed():
    text = SAID.sub("", article.TEMPLATE.read_text(encoding="utf-8"))
    known = text.replace("3BASiL", "")  # a name
    assert not re.findall(r".{0,20}\d.{0,20}", known)
    assert not re.findall(r"\b(?:one|two|three|four|five|ten|hundred)\b (?:of|per cent|times)", known)


def test_open_questions_are_told_as_their_notebook_has_them_without_a_number(tmp_path):
    told = article.opened(tmp_path)
    words = re.sub(r"^\*[A-Z].*not drawn yet.*$", "", told, flags=re.MULTILINE)
    assert told.count("### ") == told.count("**Hypothesis.**") > told.count("**Learnt.**") > 4
    assert not re.findall(r".{0,20}\d.{0,20}", words)


@pytest.fixture(scope="module")
def verdicts():
    return judge.worded(judge.judge(frame.table(everything())))


def test_answers_say_the_verdict_of_each_model_and_link_to_its_row(verdicts):
    said, page = article.answers(verdicts, ("2.block", "8")), judge.page(verdicts)
    mine = verdicts[verdicts["claim"] == "2.block"]
    assert all(judge.effect_words(row) in said and row["verdict"] in said for _, row in mine.iterrows())
    headings = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in re.findall(r"^## (.*)$", page, re.M)}
    assert set(re.findall(r"claims\.md#([\w-]+)", said)) <= headings


def test_figures_that_are_not_drawn_are_named_with_their_command(verdicts, tmp_path):
    said = article.article(verdicts, pd.DataFrame({"model": ["m"], "dense": ["float32"]}), tmp_path, "counted")
    assert "`./run_all.sh laptop 1-granularity` draws it" in said and "m (float32)" in said and "{{" not in said


def test_links_of_the_committed_article_lead_somewhere():
    page = ROOT / "figures" / "article.md"
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    assert links and all((page.parent / link).exists() for link in links)
