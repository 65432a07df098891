"""Public-domain English prose out of Debian's archive, cleaned and split into training and held-out text.

Packages (Debian 12 "bookworm", section main):

* ``bible-kjv-text`` 4.38 with the reader ``bible-kjv`` 4.38: the King James Version of the Bible.  The
  package's copyright file: "The copyright for the King James Version text of the Bible is expired since the
  translation was done in 1611".
* ``r-cran-janeaustenr`` 1.0.0-1: the six completed novels of Jane Austen (1775-1817) as distributed by
  Project Gutenberg.  The novels are in the public domain; the R package around them is under the MIT licence.

Only the texts are used.  Nothing needs root: the packages are downloaded and unpacked in a folder.
"""

from __future__ import annotations

import re
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr")

#: Whole books of the Bible that are held out (the reader's own abbreviations).
HELD_OUT_BOOKS = ("Ruth", "Est", "Eccl")
#: The last chapters of this novel are held out.
HELD_OUT_NOVEL = "Persuasion"
HELD_OUT_CHAPTERS = 4

_HEADING = re.compile(r"(?:CHAPTER|Chapter) (?:[IVXLC]+|\d+)\s*")
_VOLUME = re.compile(r"VOLUME [IVX]+\s*")
_END = re.compile(r"(?:FINIS|Finis|THE END|\*Vide .*|A NOTE ON THE TEXT)\s*")
_VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)")


@dataclass(frozen=True)
class Document:
    """A book: its name and its chapters, each a run of newline-separated paragraphs."""

    name: str
    chapters: tuple[str, ...]

    @property
    def text(self) -> str:
        """The book as one text, chapters separated by an empty line."""
        return "\n\n".join(self.chapters)


@dataclass(frozen=True)
class Split:
    """Documents to train on, and documents that training never sees."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def train_text(self) -> str:
        """All training documents as one text."""
        return "\n\n".join(document.text for document in self.train)

    @property
    def held_out_text(self) -> str:
        """All held-out documents as one text."""
        return "\n\n".join(document.text for document in self.held_out)


def _unpack(cache: Path) -> Path:
    """Download the packages into ``cache`` (once) and unpack them; returns the unpacked root."""
    root = cache / "root"
    if not (root / ".complete").exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=cache, check=True)
        for package in PACKAGES:
            archives = sorted(cache.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", str(archives[-1]), str(root)], check=True)
        (root / ".complete").touch()
    return root


def _bible(root: Path) -> list[Document]:
    """The books of the King James Version, one verse a line."""
    library = root / "usr" / "lib"
    reader = root / "usr" / "bin" / "bible"
    listing = subprocess.run(
        [str(reader), "-f", "-p", str(library), "gen1:1-rev22:21"],
        cwd=library,
        check=True,
        capture_output=True,
        encoding="ascii",
        stdin=subprocess.DEVNULL,
    ).stdout
    books: dict[str, dict[str, list[str]]] = {}
    for line in listing.splitlines():
        match = _VERSE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        book, chapter, verse = match.groups()
        books.setdefault(book, {}).setdefault(chapter, []).append(verse.strip())
    return [
        Document(name, tuple("\n".join(verses) for verses in chapters.values()))
        for name, chapters in books.items()
    ]


def _r_strings(blob: bytes) -> list[str]:
    """The strings of a serialised R character vector (XDR, version 3)."""
    position = 0

    def integer() -> int:
        nonlocal position
        value = int.from_bytes(blob[position : position + 4], "big", signed=True)
        position += 4
        return value

    def take(count: int) -> bytes:
        nonlocal position
        value = blob[position : position + count]
        position += count
        return value

    if take(2) != b"X\n" or integer() != 3:
        raise ValueError("not a version-3 XDR stream of R")
    take(8)  # The versions of R that wrote it and that can read it.
    take(integer())  # The native encoding's name.
    if integer() & 0xFF != 16:
        raise ValueError("not a character vector")
    strings = []
    for _ in range(integer()):
        integer()  # The element's flags.
        strings.append(take(integer()).decode("utf-8"))
    return strings


def _novels(root: Path) -> list[Document]:
    """Jane Austen's novels, one paragraph a line."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = []
    while data:
        # Each object lies behind four bytes that hold its size uncompressed, which zlib does not need.
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        title = lines[0].title()
        chapters: list[list[str]] = []
        for line in lines:
            if _END.fullmatch(line):
                if chapters:
                    break
            elif _HEADING.fullmatch(line):
                chapters.append([])
            elif chapters and not _VOLUME.fullmatch(line):
                chapters[-1].append(line)
        novels.append(Document(title, tuple(_paragraphs(chapter) for chapter in chapters)))
    return novels


def _paragraphs(lines: list[str]) -> str:
    """Rejoin hard-wrapped lines: one paragraph a line, single spaces, without emphasis marks."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip())
    return "\n".join(re.sub(r"\s+", " ", block.replace("_", "")).strip() for block in blocks if block.strip())


def load(cache: Path) -> Split:
    """Download (once), clean and split the corpus."""
    root = _unpack(cache)
    train: list[Document] = []
    held_out: list[Document] = []
    for document in _bible(root):
        (held_out if document.name in HELD_OUT_BOOKS else train).append(document)
    for document in _novels(root):
        if document.name == HELD_OUT_NOVEL:
            train.append(Document(document.name, document.chapters[:-HELD_OUT_CHAPTERS]))
            held_out.append(Document(document.name, document.chapters[-HELD_OUT_CHAPTERS:]))
        else:
            train.append(document)
    return Split(tuple(train), tuple(held_out))
