"""Prose from the bundled MediaWiki dump: the sentences of articles, without tables, boxes, references and markup."""

import bz2
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import iterparse

import mwparserfromhell
from mwparserfromhell import nodes

# The article ends at the first of these level-2 sections; the rest is references and links.
_APPARATUS = re.compile(
    r"^==\s*(see also|(?:foot)?notes|references|selected bibliography|external links)\s*==\s*$", re.IGNORECASE | re.MULTILINE
)
_DROPPED_LINKS = re.compile(r"\s*:?\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)
_HOLE = "\ufffc"  # marks a line to leave out: something removed was part of its sentence (a formula), or it is a list item
# Templates that are part of a sentence -> the text they become, made of their values; all others (such as boxes) are dropped.
_TEMPLATES = dict.fromkeys("nowrap vanchor sc small angbr ipa vr nihongo quote".split(), "{0}")
_TEMPLATES |= {"lang": "{last}", "transl": "{last}", "circa": "c. {0}", "as of": "As of {0}"}
_TEMPLATES |= {"'s": "'s", "nbsp": " ", "spaces": " ", "ndash": "–", "spaced ndash": " – ", "snd": " – "}
_TEMPLATES |= dict.fromkeys(("val", "frac", "chem", "inflation"), _HOLE)
_TAGS = {"ref": "", "table": "", "br": " ", "hr": " "} | dict.fromkeys(("math", "li", "dd", "dt"), _HOLE)


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wikitext of the articles (namespace 0, no redirects) of a MediaWiki XML dump, streamed."""
    with bz2.open(dump) as file:
        for _, element in iterparse(file):
            if element.tag.endswith("}page"):
                if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                    yield element.findtext("{*}title"), element.findtext("{*}revision/{*}text") or ""
                element.clear()


def prose(source: str) -> str:
    """Plain text of an article's wikitext: its paragraphs of whole sentences without formulas, separated by blank lines."""
    article = mwparserfromhell.parse(_APPARATUS.split(source, maxsplit=1)[0])
    lines = map(_tidy, _plain(article).splitlines())
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
            content = _TAGS[name] if name in _TAGS else _plain(node.contents)
            return f"\n{content}\n" if name == "blockquote" else content
    return ""  # comments, arguments


def _plain_template(template: nodes.Template) -> str:
    name = str(template.name).strip().lower()
    values = [_plain(parameter.value).strip() for parameter in template.params if not parameter.showkey]
    if name in ("convert", "cvt"):  # {{convert|5|km|mi}}, {{convert|5|to|9|km}}
        return " ".join(values[: 4 if values[1] in ("to", "-", "–", "by", "x", "and") else 2])
    added = _TEMPLATES.get(name, "{0}" if name.startswith("lang-") else "")
    if name == "as of" and template.has("lc"):
        added = added.lower()
    if "{" not in added:
        return added
    return added.format(*values, last=values[-1]) if values else ""


def _tidy(line: str) -> str:
    """One paragraph without the traces of what was removed, such as double spaces and empty parentheses."""
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r"\((?:[\s,;:]|\bor\b)*", "(", line)
    line = re.sub(r"[\s,;:]*\)", ")", line)
    line = re.sub(r"\s*(?:\(\)|\[\])", "", line)
    return re.sub(r"\s+([,.;:!?])", r"\1", line).strip()


def _is_prose(line: str) -> bool:
    """Whether `line` is long enough, ends as a sentence does and has no left-over markup."""
    markup = re.search(_HOLE + r"|\{\{|\}\}|\[\[|\]\]|[|<>]|''", line)
    return len(line) >= 60 and not markup and bool(re.search(r"[.!?][\"'”’)\]]*$", line))
