"""Documents of the bundled tasks, made from pinned assets and shuffled, so that the first ones are a fair sample."""

import random
import re

from datasets import Dataset

from recon.data import assets, text

PER_SECTION = 100  # analogies
DISTRACTORS = 3
SENTENCES = 4  # at most (two at least) before the sentence whose last word is asked for
WORDS = range(30, 151)  # in a passage, without its last word
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_LAST_WORD = re.compile(r"(.*\s)([A-Za-z]{4,})[.!?]", re.DOTALL)


def analogies(**_) -> dict:
    """Analogies as a data set for lm-eval: multiple choice; rows "section", "a", "b", "c", "choices", "label"; sections in turn.

    The distractors are answers to other questions of the section; none is a, b, c, or another right answer for c.
    """
    sections: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in map(str.split, assets.fetch("analogy-questions").read_text(encoding="utf-8").splitlines()):
        if first == ":":
            questions = sections[rest[0]] = []
        else:
            questions.append((first, *rest))
    draw, chosen = random.Random(0), {}
    for section, questions in sections.items():
        every, chosen[section] = sorted({question[3] for question in questions}), []
        for a, b, c, d in draw.sample(questions, PER_SECTION):
            right = {answer for _, _, asked, answer in questions if asked == c}
            wrong = [word for word in every if word not in {a, b, c, *right}]
            draw.shuffle(choices := [d, *draw.sample(wrong, DISTRACTORS)])
            chosen[section].append({"section": section, "a": a, "b": b, "c": c, "choices": choices, "label": choices.index(d)})
    turns = [chosen[section][turn] for turn in range(PER_SECTION) for section in draw.sample(list(chosen), len(chosen))]
    return {"test": Dataset.from_list(turns)}


def last_word(**_) -> dict:
    """Passages as a data set for lm-eval: whole sentences; rows "text" (all but the last word) and "word".

    The last word, of four letters or more, occurs earlier in the passage. No two passages share a sentence.
    """
    rows = []
    for article in text.documents("wikipedia", "evaluation"):
        before: list[str] = []
        for sentence in _SENTENCE_END.split(article):
            sentence = " ".join(sentence.split())
            parts = _LAST_WORD.fullmatch(sentence)
            if parts and len(before) >= 2:
                passage = " ".join([*before[-SENTENCES:], parts[1].strip()])
                if len(passage.split()) in WORDS and parts[2] in re.findall("[A-Za-z]+", passage):
                    rows.append({"text": passage, "word": parts[2]})
                    before = []
                    continue
            before.append(sentence)
    random.Random(0).shuffle(rows)
    return {"test": Dataset.from_list(rows)}
