"""Pieces of an HTML page: everything that is shown goes through `text`."""

import base64
import html
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path


def text(value: object) -> str:
    """Anything as text of the page."""
    return html.escape(str(value))


def section(heading: str, *parts: str) -> str:
    """A heading over its parts; nothing at all if every part is empty."""
    return f"<h2>{text(heading)}</h2>\n" + "\n".join(parts) if any(parts) else ""


def bullets(lines: Iterable[str]) -> str:
    """A list of notes."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def table(
    headers: Sequence[str],
    lines: Iterable[Sequence],
    kind: str = "numbers",
    strong: Collection[tuple[int, int]] = (),
) -> str:
    """A table; kind "numbers" aligns all columns but the first to the right.

    `strong` lists the (line, column) of cells in bold, from 0.
    """
    head = "".join(f"<th>{text(header)}</th>" for header in headers)
    body = ""
    for i, line in enumerate(lines):
        cells = [text(cell) for cell in line]
        cells = [f"<b>{c}</b>" if (i, j) in strong else c for j, c in enumerate(cells)]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(path: Path, caption: str) -> str:
    """A PNG within the page at its width in print (200 dots an inch), a little enlarged."""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big")  # of the PNG's header
    data = base64.b64encode(content).decode()
    image = f'<img alt="{text(caption)}" width="{0.64 * width:.0f}" '
    image += f'src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"
