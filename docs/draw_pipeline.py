"""Draws docs/pipeline.svg, the picture of README.md: what a run does and writes, and how a row is packed.

    python -m docs.draw_pipeline

The pairs of the drawn row are those of ROW. It is readable on a light and on a dark page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

OUT = Path(__file__).with_name("pipeline.svg")
WIDTH, HEIGHT = 880, 358
STYLE = """
    text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
    .title { font-weight: 600 } .small { font-size: 12px; fill: #57606a } .outside { fill: #6e7781 }
    .file { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #0550ae }
    .middle { text-anchor: middle } .end { text-anchor: end }
    .box { fill: #f6f8fa; stroke: #8c959f } .line { stroke: #8c959f; fill: none } .head { fill: #8c959f }
    .chosen { fill: #aceebb; stroke: #2da44e } .prompt { fill: #b6e3ff; stroke: #218bff }
    .rejected { fill: #ffcecb; stroke: #fa4549 } .padding { fill: none; stroke: #8c959f; stroke-dasharray: 3 3 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .small, .outside { fill: #9198a1 } .file { fill: #79c0ff }
      .box { fill: #161b22; stroke: #6e7681 } .line { stroke: #6e7681 } .head { fill: #6e7681 }
      .chosen { fill: #033a16 } .prompt { fill: #0c2d6b } .rejected { fill: #67060c }
    }"""
# Left edge of each column of boxes, and their width.
COLUMNS, BOX = (8, 186, 364, 542, 720), 152
# Tokens of chosen answer, prompt and rejected answer of the pairs in the row.
ROW, POSITIONS = ((17, 33, 12), (10, 21, 20), (6, 9, 8)), 144


def text(x: float, y: float, words: str, style: str) -> str:
    """Returns a line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, style: str, radius: int = 6) -> str:
    """Returns a box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" class="{style}"/>'


def stage(column: int, y: float, height: float, title: str, *lines: str) -> str:
    """Returns a box of the pipeline with its words."""
    middle = COLUMNS[column] + BOX / 2
    top = y + (height - 18 * len(lines)) / 2 + 4
    words = [text(middle, top, title, "title middle")]
    words += [text(middle, top + 18 * (i + 1), line, "small middle") for i, line in enumerate(lines)]
    return "".join([rectangle(COLUMNS[column], y, BOX, height, "box"), *words])


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """Returns an arrow, with a bend in its middle where the ends differ in height."""
    half = (x0 + x1) / 2
    path = f"M{x0:g} {y0:g} H{half:g} V{y1:g} H{x1:g}" if x0 != x1 else f"M{x0:g} {y0:g} V{y1:g}"
    return f'<path d="{path}" class="line" marker-end="url(#head)"/>'


def pipeline() -> str:
    """Returns the stages, the arrows between them, and the files that they write."""
    stages = [
        stage(0, 10, 62, "Preferences", "JSONL, Parquet, Hub"),
        stage(0, 88, 62, "Model", "folder or Hub id"),
        stage(1, 10, 62, "Token ids", "template, truncation"),
        stage(1, 88, 62, "Parameters", "of any family"),
        stage(2, 40, 80, "Reference pass", "every pair once,", "before training"),
        stage(3, 40, 80, "Updates", "policy against", "stored reference"),
        stage(4, 40, 80, "Export", "Hugging Face model,", "or adapters"),
    ]
    arrows = [arrow(COLUMNS[0] + BOX, y, COLUMNS[1] - 5, y) for y in (41, 119)]
    arrows += [arrow(COLUMNS[1] + BOX, y, COLUMNS[2] - 5, target) for y, target in ((41, 68), (119, 92))]
    arrows += [arrow(COLUMNS[i] + BOX, 80, COLUMNS[i + 1] - 5, 80) for i in (2, 3)]
    written = {2: ("reference/",), 3: ("metrics.jsonl", "eval.jsonl", "checkpoints/"), 4: ("export/",)}
    files = [text(COLUMNS[1] + BOX, 163, "written to the working folder:", "small outside end")]
    for column, names in written.items():
        middle = COLUMNS[column] + BOX / 2
        arrows.append(arrow(middle, 120, middle, 141))
        files += [text(middle, 163 + 17 * i, name, "file middle") for i, name in enumerate(names)]
    return "\n  ".join([*stages, *arrows, *files])


def row() -> str:
    """Returns a packed row: pairs of a chosen answer, a prompt and a rejected answer, and padding at the end."""
    left, top, height = COLUMNS[0], 248, 34
    scale = (COLUMNS[-1] + BOX - left) / POSITIONS
    title = "One row of tokens holds several pairs. Both answers of a pair stand around one copy of the prompt."
    parts, x = [text(left, 232, title, "title outside")], float(left)
    for number, tokens in enumerate(ROW, 1):
        start = x
        for count, kind in zip(tokens, ("chosen", "prompt", "rejected"), strict=True):
            parts.append(rectangle(x, top, count * scale, height, kind, 2))
            if count * scale > 60:
                parts.append(text(x + count * scale / 2, top + 22, kind, "small middle"))
            x += count * scale
        parts.append(f'<path d="M{start + 2:g} 290 v6 H{x - 2:g} v-6" class="line"/>')
        parts.append(text((start + x) / 2, 312, f"pair {number}", "small outside middle"))
    parts.append(rectangle(x, top, left + POSITIONS * scale - x, height, "padding", 2))
    parts.append(text((x + left + POSITIONS * scale) / 2, 312, "padding", "small outside middle"))
    words = "An answer reads itself and the prompt. Each prompt is computed once, and little of a row is padding."
    parts.append(text(left, 344, words, "small outside"))
    return "\n  ".join(parts)


def render() -> str:
    """Returns the picture."""
    head = '<marker id="head" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path d="M0 0 L8 4 L0 8 z" class="head"/></marker>'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    label = "Preferences and a model become token ids and parameters; the reference is scored once; the policy trains."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">\n'
        f"  <style>{STYLE}\n  </style>\n  <defs>{head}</defs>\n  {pipeline()}\n  {row()}\n</svg>\n"
    )


def main() -> None:
    """Writes it."""
    OUT.write_text(render())


if __name__ == "__main__":
    main()
