"""The house as its sources say it is: the parts of docs/architecture.md that are made of them.

`python -m tests.support.architecture` writes those parts anew; a test compares.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"

ROOMS = ("common", "settings", "data", "model", "checkpoint", "training", "evaluation", "doctor", "export")
"""The rooms of `finetune`; each may use those before it."""

SERVING = ("memories", "engine", "web", "stock", "program")
"""The rooms of `moshi_patch.serving`, likewise; the last one is a file."""

TREES = ("moshi_patch", "finetune", "benchmarks", "example")
"""Folders of the tree, in the order in which they are read."""
ENTRY_POINTS = ("train.py", "eval_from_checkpoint.py")


def modules() -> dict[str, Path]:
    """Every product module by its dotted name; a package by its folder's."""
    found = {}
    for top in ("finetune", "moshi_patch"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> dict[str, set[str]]:
    """For every product module those that it imports: anywhere in its text, also for types alone or in a function."""
    known = modules()
    return {name: _imports(name, path, known) for name, path in known.items()}


def _imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin for alias in node.names}
    return {module for module in found if module in known and module != name}


def room(module: str) -> str:
    """The room of `finetune` that a module stands in, or its package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "finetune" and len(parts) > 1 else parts[0]


def room_arrows() -> set[tuple[str, str]]:
    """Which room uses which, without what follows from the others: (from, to)."""
    direct = {
        (room(name), room(used)) for name, uses in arrows().items() for used in uses if room(name) != room(used)
    } - {("finetune", used) for used in ROOMS}

    def reached(start: str, without: tuple[str, str]) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            here = waiting.pop()
            new = {b for a, b in direct if a == here and (a, b) != without} - seen
            seen |= new
            waiting += new
        return seen

    return {arrow for arrow in direct if arrow[1] not in reached(arrow[0], arrow)}


def picture() -> str:
    """A Mermaid chart of the rooms, those that use others at the top."""
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {a} --> {b}" for a, b in sorted(room_arrows())]
    return "\n".join([*lines, "```"])


def first_sentence(path: Path) -> str:
    """The first line of a module's documentation, or of a script's opening comment."""
    documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
    return documentation.split("\n\n")[0].replace("\n", " ").strip()


def tree() -> str:
    """One line a file: what it is for, in its own words."""
    lines = [f"{name}  {first_sentence(ROOT / name)}" for name in ENTRY_POINTS]
    for top in TREES:
        folders = sorted({path.parent for path in (ROOT / top).rglob("*.py")}, key=_order)
        for folder in folders:
            init = folder / "__init__.py"
            about = first_sentence(init) if init.is_file() else ""
            lines += ["", f"{folder.relative_to(ROOT)}/  {about}".rstrip()]
            for path in sorted(folder.glob("*.py")):
                if path.name != "__init__.py":
                    lines.append(f"    {path.name}  {first_sentence(path)}")
    return "\n".join(["```text", *lines, "```"])


def _order(folder: Path) -> tuple[int, int, str]:
    top, *rest = folder.relative_to(ROOT).parts
    below = ROOMS.index(rest[0]) if rest and rest[0] in ROOMS else -1
    return TREES.index(top), below, str(folder)


def fill(text: str) -> str:
    """The page with its generated parts as the sources are now."""
    for name, content in (("picture", picture()), ("tree", tree())):
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, c=content: m[1] + c + "\n" + m[2], text, flags=re.S
        )
        if found != 1:
            raise ValueError(f"{PAGE}: needs one part <!-- {name} --> ... <!-- end -->, has {found}.")
    return text


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
