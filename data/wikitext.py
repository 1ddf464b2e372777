"""The embedded default text: 100-odd Wikipedia articles, cleaned to prose and cut into documents.

The articles are a fixture of the gensim package, so that every user gets the same text from the Python
package index alone. The cleaner keeps sentences and gives up the rest: templates, tables, references,
formulas, headings, lists of names and links, and every paragraph that is not whole without them. It is made
for this one file, and tests hold what it may leave behind; it is no general wiki parser.

License of the text: CC BY-SA 3.0, Wikipedia contributors.
"""

import bz2
import hashlib
import html
import json
import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from shards import lock_folder, write_atomically
from wheels import DOWNLOADS, Member, fetch

DUMP = Member(
    project="gensim",
    version="4.4.0",
    path="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    # One fixed platform, whatever this machine is: everyone fetches the same file.
    pip_args=(
        *("--platform", "manylinux_2_24_x86_64", "--platform", "manylinux_2_28_x86_64"),
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
    ),
)
DUMP_BYTES = 1_695_871
LICENSE = "CC BY-SA 3.0, Wikipedia contributors"
ORIGIN = "English Wikipedia, April and May 2016, 106 articles; a test file inside the wheel gensim==4.4.0"
CLEANER = 1  # raise it when the cleaned text changes: prepared folders are then redone
VAL_SHARE = 0.09  # of the text, by whole articles
MIN_ARTICLE_CHARS = 500  # less is a disambiguation page or a stub
MIN_PARAGRAPH_CHARS = 60
MEDIAN_DOC_CHARS = 650  # documents' target lengths are log-normal, as those of web pages
SIGMA_DOC_CHARS = 0.6
MAX_DOC_CHARS = 1_500

DROPPED_SECTIONS = frozenset(
    "see also|references|external links|notes|further reading|bibliography|sources|citations|footnotes|"
    "gallery|notes and references|works cited|publications|filmography|discography|selected works|works|"
    "awards|references and notes|general references|list of works|books|essays|primary sources|"
    "secondary sources|specific references|external sources|literature".split("|")
)
DROPPED_LINKS = re.compile(
    r"\s*:?\s*(file|image|media|category|wikipedia|portal|template|[a-z]{2,3}(-[a-z]+)*)\s*:", re.I
)
DROPPED_TAGS = (
    "ref|math|gallery|timeline|source|syntaxhighlight|code|pre|imagemap|score|chem|table|poem|hiero"
)
BARE_TEMPLATES = frozenset("quote|nowrap|nobr|blockquote|cquote|small|abbr|sic|nobold|lang-en".split("|"))
HOLE_TEMPLATES = frozenset("val|frac|sfrac|math|mvar|su|sub|sup|chem|formatnum|age|mono".split("|"))
SENTENCE_END = r"[.!?][\"')\u201d\u2019\]]*"


def articles(path: Path) -> Iterator[tuple[str, str]]:
    """(title, wiki text) of the dump's articles, redirects left out."""
    with bz2.open(path) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            space = page.tag.removesuffix("page")
            if page.findtext(f"{space}ns") == "0" and page.find(f"{space}redirect") is None:
                yield page.findtext(f"{space}title"), page.findtext(f"{space}revision/{space}text") or ""
            page.clear()


HOLE = "\ufffc"  # stands where something was left out that the sentence needs; its paragraph is dropped


def clean(wiki: str) -> list[str]:
    """Paragraphs of prose."""
    text = re.sub(r"<!--.*?-->", "", wiki, flags=re.S)
    text = re.sub(r"<ref[^<>]*/>", "", text, flags=re.I)
    text = re.sub(r"<ref\b.*?</ref\s*>", "", text, flags=re.I | re.S)
    text = re.sub(rf"<({DROPPED_TAGS})\b[^>]*/>", "", text, flags=re.I)
    text = re.sub(rf"<({DROPPED_TAGS})\b.*?</\1\s*>", HOLE, text, flags=re.I | re.S)
    text = re.sub(r"<sup>\s*([+\u2212\u2013-]?[\d.]+)\s*</sup>", r"^\1", text)  # 10^23, not 1023
    text = _innermost(r"\{\{([^{}]*)\}\}", _template, text)
    text = _innermost(r"\{\|(?:(?!\{\||\|\}).)*\|\}", lambda match: "\n", text)
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\]]*)\]", r"\1", text)
    text = _innermost(r"\[\[([^\[\]]*)\]\]", _link, text)
    text = re.sub(r"<br\s*/?>", " ", text, flags=re.I)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = html.unescape(text).replace("\u00a0", " ").replace("\u200e", "")
    text = re.sub(r"'{2,5}", "", text)
    return [paragraph for line in _kept_lines(text) if (paragraph := _tidy(line))]


def _innermost(pattern: str, replace, text: str) -> str:
    """Replace the matches that hold no other, until none is left: nested markup from the inside out."""
    while True:
        text, count = re.subn(pattern, replace, text, flags=re.S)
        if not count:
            return text


def _template(match: re.Match) -> str:
    """The prose that a template shows; most show none."""
    parts = [part.strip() for part in match[1].split("|")]
    name = parts[0].lower()
    plain = [part for part in parts[1:] if not re.match(r"[\w -]+=", part)]
    if name in ("convert", "cvt") and len(plain) >= 2:
        return _convert(plain)
    if name in ("lang", "transl", "nihongo") and len(plain) >= 2:
        return plain[-1] if name != "nihongo" else plain[0]
    if name in BARE_TEMPLATES:
        return plain[0] if plain else ""
    if name in ("as of", "circa", "c.", "floruit"):
        word = {"as of": "as of" if "lc=y" in parts else "As of", "floruit": "fl."}.get(name, "c.")
        return " ".join([word, *plain[:1]])
    if name in ("ndash", "spaced ndash", "snd", "mdash", "nbsp", "spaces", "'", "--"):
        return {"ndash": "\u2013", "mdash": "\u2014", "--": "\u2014", "'": "'"}.get(name, " ")
    if name in HOLE_TEMPLATES:
        return HOLE
    return "" if "\n" not in match[1] else "\n"


def _convert(plain: list[str]) -> str:
    """{{convert|100|km|mi}} shows `100 km`; a range has its word between two numbers."""
    joins = {"-": "\u2013", "to": " to ", "and": " and ", "by": " by ", "x": " by ", "\u2013": "\u2013"}
    if len(plain) >= 4 and plain[1] in joins:
        return f"{plain[0]}{joins[plain[1]]}{plain[2]} {plain[3]}"
    return f"{plain[0]} {plain[1]}"


def _link(match: re.Match) -> str:
    """[[target|words]] shows words; pictures and categories show nothing here."""
    target, _, words = match[1].partition("|")
    if DROPPED_LINKS.match(target):
        return ""
    return (words or target).rsplit("|", 1)[-1]


def _kept_lines(text: str) -> Iterator[str]:
    """Lines of prose: no headings, no dropped sections, and of lists only items that are sentences."""
    dropped_level = 0  # of the section being left out; 0 for none
    for line in text.split("\n"):
        line = line.strip()
        if heading := re.fullmatch(r"(={2,6})\s*(.*?)\s*=+", line):
            level = len(heading[1])
            if not dropped_level or level <= dropped_level:
                dropped_level = level if heading[2].lower() in DROPPED_SECTIONS else 0
            continue
        if dropped_level or not line:
            continue
        if line[0] in "*#:;":
            line = line.lstrip("*#:; ")
            if len(line) < 2 * MIN_PARAGRAPH_CHARS:
                continue
        yield line


def _tidy(line: str) -> str:
    """One paragraph with the scars of what was taken out closed, or "" if it is not whole prose."""
    line = re.sub(r"\s+", " ", line).strip()
    line = re.sub(r"\((?:[\s,;:/-]|or|and|IPA|pronounced)*\)|\[[\s,;]*\]", "", line)
    line = re.sub(r"\(\s*[,;:]\s*", "(", line)
    line = re.sub(r"\s*[,;:]\s*\)", ")", line)
    line = re.sub(r"\s+([,.;:!?)])", r"\1", line)
    line = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", line)
    line = re.sub(r"\(\s+", "(", line)
    line = re.sub(r" {2,}", " ", line).strip()
    first = line.lstrip("\"'([\u201c\u2018 ")[:1]
    is_sentence = re.search(SENTENCE_END + "$", line) and (first.isupper() or first.isdigit())
    has_debris = re.search(
        r"[{}|<>\ufffc\u2191\\]|\[\[|\]\]|==|https?:|www\.|__[A-Z]+__|\bthumb\b|Talk:", line
    )
    has_gap = re.search(r"\b(is|of|the|a|an|by|to|in|about|than)[,.;)]|\$ ", line)  # a word went missing
    return line if is_sentence and not has_debris and not has_gap and len(line) >= MIN_PARAGRAPH_CHARS else ""


def documents(title: str, paragraphs: list[str]) -> list[str]:
    """Whole paragraphs put together to log-normal lengths; too long a one is cut at sentence ends."""
    quantile = statistics.NormalDist(math.log(MEDIAN_DOC_CHARS), SIGMA_DOC_CHARS).inv_cdf
    pieces: list[str] = []
    for paragraph in paragraphs:
        while len(paragraph) > MAX_DOC_CHARS:
            ends = [match.end() for match in re.finditer(SENTENCE_END + r" (?=[A-Z\"'(])", paragraph)]
            space = paragraph.rfind(" ", 0, MAX_DOC_CHARS)  # a sentence that long is cut between words
            cut = max((end for end in ends if end <= MAX_DOC_CHARS), default=max(space, 0)) or MAX_DOC_CHARS
            pieces.append(paragraph[:cut].rstrip())
            paragraph = paragraph[cut:].lstrip()
        pieces.append(paragraph)
    made: list[str] = []
    document, target = "", 0.0
    for piece in pieces:
        joined = f"{document}\n\n{piece}" if document else piece
        if document and (len(document) >= target or len(joined) > MAX_DOC_CHARS):
            made.append(document)
            document = ""
        if not document:
            # The title and the number of the document are the seed: no generator, no state.
            word = hashlib.blake2b(f"{title}:{len(made)}".encode(), digest_size=8).digest()
            target = min(math.exp(quantile((int.from_bytes(word) + 0.5) / 2**64)), MAX_DOC_CHARS)
            joined = piece
        document = joined
    return [*made, document] if document else made


def build(downloads: Path | None = None) -> tuple[Path, Path]:
    """Fetch, clean, cut, split by article. Returns the files of the training and validation documents.

    Documents are in the order of a hash of their text, so that neighbours are of different articles.
    """
    downloads = downloads or DOWNLOADS
    (dump,) = fetch((DUMP,), downloads)
    kept = {}
    for title, wiki in articles(dump):
        paragraphs = clean(wiki)
        if sum(map(len, paragraphs)) >= MIN_ARTICLE_CHARS:
            kept[title] = paragraphs
    sides: dict[str, list[str]] = {"val": [], "train": []}
    total = sum(len(p) for paragraphs in kept.values() for p in paragraphs)
    num_val = 0
    for title in sorted(kept, key=lambda title: hashlib.blake2b(title.encode()).digest()):
        size = sum(map(len, kept[title]))
        # An article goes to validation if it brings the share no further above than it was below.
        is_val = num_val + size / 2 <= VAL_SHARE * total
        num_val += size if is_val else 0
        sides["val" if is_val else "train"] += documents(title, kept[title])
    paths = []
    for side in ("train", "val"):
        rows = sorted(set(sides[side]), key=lambda text: hashlib.blake2b(text.encode()).digest())
        path = downloads / f"enwiki_{side}.jsonl"
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
        with lock_folder(downloads):
            write_atomically(path, "".join(lines).encode())
        paths.append(path)
    return paths[0], paths[1]
