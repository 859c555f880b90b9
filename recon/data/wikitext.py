"""Prose out of the bundled MediaWiki dump: the sentences of articles, without tables, boxes, references and markup."""

import bz2
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import iterparse

import mwparserfromhell
from mwparserfromhell import nodes

# The first of these level-2 sections and everything after it is apparatus, not article.
_APPARATUS = re.compile(
    r"^==\s*(see also|(?:foot)?notes|references|selected bibliography|external links)\s*==\s*$", re.IGNORECASE | re.MULTILINE
)
_DROPPED_LINKS = re.compile(r"\s*:?\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)
# Templates that are part of a sentence, by what they add to it; all others are references, boxes and notices.
_FIRST = set("nowrap vanchor sc small angbr ipa vr nihongo quote".split())
_LAST = {"lang", "transl"}
_FIXED = {"'s": "'s", "nbsp": " ", "spaces": " ", "ndash": "–", "spaced ndash": " – ", "snd": " – "}
_HOLE = "\ufffc"  # marks a line that is left out: its sentence needs what was removed (a formula), or it is a list item
_HOLES = {"val", "frac", "chem", "inflation"}


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wikitext of the articles (namespace 0, no redirects) of a MediaWiki XML dump, streamed."""
    with bz2.open(dump) as file:
        for _, element in iterparse(file):
            if element.tag.endswith("}page"):
                if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                    yield element.findtext("{*}title"), element.findtext("{*}revision/{*}text") or ""
                element.clear()


def prose(source: str) -> str:
    """Plain text of an article's wikitext: its paragraphs of whole sentences, parted by blank lines.

    Tables, files, categories, references, templates, lists, headings, paragraphs with formulas and the closing
    sections (see also, references, ...) are left out.
    """
    article = mwparserfromhell.parse(_APPARATUS.split(source, maxsplit=1)[0])
    lines = (_tidy(line) for line in _plain(article).splitlines())
    return "\n\n".join(line for line in lines if _is_prose(line))


def _plain(code) -> str:
    """The text of parsed wikitext, with a line break where a paragraph ends."""
    return "".join(map(_plain_node, code.nodes)) if code else ""


def _plain_node(node) -> str:
    match node:
        case nodes.Text():
            return str(node)
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Wikilink():
            return "" if _DROPPED_LINKS.match(str(node.title)) else _plain(node.text or node.title)
        case nodes.ExternalLink():
            return _plain(node.title)
        case nodes.Heading():
            return "\n"
        case nodes.Template():
            return _plain_template(node)
        case nodes.Tag():
            name = str(node.tag).strip().lower()
            fixed = {"ref": "", "table": "", "br": " ", "hr": " "} | dict.fromkeys(("math", "li", "dd", "dt"), _HOLE)
            content = fixed[name] if name in fixed else _plain(node.contents)
            return f"\n{content}\n" if name == "blockquote" else content
    return ""  # comments, arguments


def _plain_template(template: nodes.Template) -> str:
    name = str(template.name).strip().lower().replace("_", " ")
    values = [_plain(parameter.value).strip() for parameter in template.params if not parameter.showkey]
    if name in _FIXED or name in _HOLES:
        return _FIXED.get(name, _HOLE)
    if name in ("convert", "cvt"):  # {{convert|5|km|mi}}, {{convert|5|to|9|km}}
        return " ".join(values[: 4 if values[1] in ("to", "-", "–", "by", "x", "and") else 2])
    if values and (name in _FIRST or name.startswith("lang-")):
        return values[0]
    if name in _LAST:
        return values[-1]
    if name == "as of":
        return f"{'as' if template.has('lc') else 'As'} of {values[0]}"
    return f"c. {values[0]}" if name in ("circa", "c.") and values else ""


def _tidy(line: str) -> str:
    """One paragraph with the traces of what was removed smoothed over: double spaces, empty parentheses."""
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r"\((?:[\s,;:]|\bor\b)*", "(", line)
    line = re.sub(r"[\s,;:]*\)", ")", line)
    line = re.sub(r"\s*(?:\(\)|\[\])", "", line)
    return re.sub(r"\s+([,.;:!?])", r"\1", line).strip()


def _is_prose(line: str) -> bool:
    """Whole sentences without left-over markup."""
    markup = re.search(_HOLE + r"|\{\{|\}\}|\[\[|\]\]|[|<>]|''", line)
    return len(line) >= 60 and not markup and bool(re.search(r"[.!?][\"'”’)\]]*$", line))
