"""What a search found, as text, JSON, a figure and a web page."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from utils.figures import save

THUMB = 240  # pixels, longest side of a picture in the page
MOST = 20  # queries, and results of each, that fit on a figure


@dataclass(frozen=True)
class Hit:
    """One image that was found.

    Attributes:
        rank: from 1.
        path: relative to the index's root.
        distance: between query and stored code.
        image: the picture, or None if it cannot be read any more.
    """

    rank: int
    path: str
    distance: float
    image: Image.Image | None = None


@dataclass(frozen=True)
class Answer:
    """A query and what it found, nearest first."""

    query: str
    image: Image.Image | None
    hits: list[Hit]


def printable(path: str) -> str:
    """A path on one line of clean text: control characters and undecodable bytes are escaped."""
    clean = path.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in clean)


def as_table(answer: Answer) -> str:
    """Rank, distance and path, a line each."""
    lines = [f"{printable(answer.query)}:", f"{'rank':>6}  {'distance':>10}  path"]
    lines += [f"{hit.rank:6d}  {hit.distance:10.4f}  {printable(hit.path)}" for hit in answer.hits]
    return "\n".join(lines)


def as_json(answers: Sequence[Answer]) -> list[dict]:
    """A list with an object for each query."""
    return [
        {
            "query": answer.query,
            "results": [
                {"rank": hit.rank, "path": hit.path, "distance": hit.distance}
                for hit in answer.hits
            ],
        }
        for answer in answers
    ]


def draw(answers: Sequence[Answer], path: Path, title: str) -> None:
    """Each row a query and its results, with rank and distance.

    Args:
        answers: with their pictures; of more than 20, and of more than 20 results, the first are
            drawn.
        path: an image file; its ending says of which kind (.png, .svg, .pdf, .jpg).
        title: above the figure.
    """
    answers = answers[:MOST]
    columns = 1 + min(MOST, max(len(answer.hits) for answer in answers))
    rows = len(answers)
    cell, head = 1.15, 0.35  # inches: a picture with its caption, the title
    width, height = cell * columns, 1.2 * cell * rows + head
    figure = plt.figure(figsize=(width, height))
    for row, answer in enumerate(answers):
        cells = [(answer.image, "query")]
        cells += [(hit.image, f"{hit.rank}   {hit.distance:.3g}") for hit in answer.hits]
        for column, (image, caption) in enumerate(cells[:columns]):
            left, bottom = cell * column + 0.05, height - head - 1.2 * cell * (row + 1) + 0.05
            place = (left / width, bottom / height, 1.05 / width, 1.05 / height)
            _show(figure.add_axes(place), image, caption)
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / height, va="top")
    save(figure, path)


def _show(axis: plt.Axes, image: Image.Image | None, caption: str) -> None:
    axis.axis("off")
    axis.set_title(caption, fontsize=8, pad=2)
    if image is None:
        axis.text(0.5, 0.5, "cannot\nbe read", ha="center", va="center", fontsize=8)
        return
    axis.imshow(image, interpolation="nearest" if max(image.size) <= 64 else "antialiased")


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: .75rem; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; overflow-wrap: anywhere; }
section { border-top: 1px solid #8888; padding-top: .5rem; margin-top: 1.5rem; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem;
  list-style: none; margin: 0; padding: 0; }
figure { margin: 0; } .query { max-width: 15rem; margin-bottom: .75rem; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882;
  border-radius: .25rem; }
img.small { image-rendering: pixelated; } .query img { outline: 3px solid #0072b2; }
.gone { aspect-ratio: 1; display: grid; place-items: center; border: 1px dashed #888; }
figcaption { font-size: .875rem; overflow-wrap: anywhere; }
"""


def as_page(answers: Sequence[Answer], title: str, note: str) -> str:
    """One HTML page that needs no other file: pictures stand in it, reduced to THUMB pixels."""
    sections = []
    for answer in answers:
        items = "\n".join(
            f"<li><figure>{_picture(hit.image, hit.path)}<figcaption><b>{hit.rank}</b> &middot; "
            f"distance {hit.distance:.4g}<br>{_text(hit.path)}</figcaption></figure></li>"
            for hit in answer.hits
        )
        sections.append(
            f"<section>\n<h2>{_text(answer.query)}</h2>\n<figure class='query'>"
            f"{_picture(answer.image, answer.query)}<figcaption>query</figcaption></figure>\n"
            f"<ol>\n{items}\n</ol>\n</section>"
        )
    body = "\n".join(sections)
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n<p>{_text(note)}</p>\n{body}\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    return html.escape(printable(value))


def _picture(image: Image.Image | None, path: str) -> str:
    if image is None:
        return "<div class='gone'>cannot be read</div>"
    kind, size = ("PNG", "small") if max(image.size) <= 64 else ("JPEG", "large")
    thumb = image.copy()
    thumb.thumbnail((THUMB, THUMB))
    content = io.BytesIO()
    thumb.save(content, kind)
    data = base64.b64encode(content.getvalue()).decode()
    return f"<img class='{size}' alt='{_text(path)}' src='data:image/{kind.lower()};base64,{data}'>"
