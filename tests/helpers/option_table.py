"""The table of ``docs/reference/options.md``, from the package's table of options; as a program, writes it anew."""

from __future__ import annotations

from pathlib import Path

from alphaext.training.options import OPTIONS, HeadOptions

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "options.md"
MARK = "<!-- made by tests/helpers/option_table.py -->\n"


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def table() -> str:
    lines = ["| option | of | plain | `few` | `paper` | values | |", "|---|---|---|---|---|---|---|"]
    head = HeadOptions.__dataclass_fields__
    for name, entry in OPTIONS.items():
        given = entry.metadata
        bounds = {"minimum": "at least", "above": "above", "maximum": "at most"}
        values = ", ".join(f"{word} {given[bound]:g}" for bound, word in bounds.items() if bound in given)
        values = ", ".join(given["choices"]) if given["choices"] else values
        presets = [shown(given["presets"][preset]) for preset in ("few", "paper")]
        cells = [f"`{name}`", "head" if name in head else "training", shown(entry.default), *presets, values, given["help"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text() if PAGE.exists() else MARK
    PAGE.write_text(text[: text.index(MARK) + len(MARK)] + "\n" + table())
