"""Keeps the lines of docstrings apart where a line begins an argument or a remark: `lengths: (B,) int`, `Returns ...`.

Docstrings are written to be read in an editor. As Markdown, such lines would run together into one paragraph.
"""

import re

import griffe

BEGINS = re.compile(r"(?:[a-z_]\w*(?:, [a-z_]\w*)*: |Returns |Raises |Precision: |Deterministic|Backends: |-> )")


def spaced(text: str) -> str:
    """The text with a hard break before each line that begins something; indented blocks stay as they are."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if i and BEGINS.match(line) and lines[i - 1].strip() and not lines[i - 1].startswith(" "):
            lines[i - 1] = lines[i - 1].rstrip() + "  "
    return "\n".join(lines)


class KeepLines(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = spaced(obj.docstring.value)
