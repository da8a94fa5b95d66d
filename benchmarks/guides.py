"""Tables in documents that are copies of results: a script writes them, a test sees that they are current.

A copy stands between "<!-- KIND: NAME -->" and "<!-- end -->", such as "<!-- plan: decoder_1b -->".
"""

import pathlib
import re
from collections.abc import Callable

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


def with_tables(text: str, kind: str, table: Callable[[str], str]) -> str:
    """A document with every copy of a kind made anew.

    Args:
      text: the document.
      kind: which copies.
      table: NAME -> the Markdown to put there.
    """
    copies = re.compile(rf"(<!-- {kind}: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return copies.sub(lambda found: f"{found[1]}\n{table(found[2]).strip()}\n\n{found[3]}", text)


def fill(document: str, kind: str, table: Callable[[str], str]) -> None:
    """Rewrites docs/<document> `with_tables`."""
    path = DOCS / document
    path.write_text(with_tables(path.read_text(), kind, table))
