"""What MkDocs cannot do by itself: pages made from the source, mathematics without a network, links out of docs/.

    <!-- source: algorithms/iql.py -->       each function beside its equations (docs/algorithms/equations.md); flags
    <!-- scores: iql -->                     what short runs of an algorithm came to: table and curves of `make figures`
    <!-- code: minimal/edp.py K to SIGMA -->  these definitions, and beside them the text up to the next mark or heading
    <!-- side by side: iql edp_iql -->       two files of algorithms/, line by line, with the words that differ marked
    $...$, $$...$$                           MathML, which browsers show by themselves, in the font STIX Two Math
    [text](../benchmarks/results/x.csv)      the file becomes part of the site; README.md is its first page
    x.ipynb                                  a page with the notebook's code, and the output that is kept in it

A source file, a function or an equation that is missing ends the build.
"""

import ast
import base64
import difflib
import html
import itertools
import json
import posixpath
import re
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

ROOT = Path(__file__).parents[1]
SCORES = "benchmarks/results/tables/published"
EQUATIONS = ROOT / "docs" / "algorithms" / "equations.md"
PLUMBING = {"make_optimizer", "make_optimizers", "init_state", "train_chunk", "train"}  # functions without equations
CONTEXT = 3  # unchanged lines shown around a change
FOLD = 6  # as few lines are not worth a fold


# -------------------------------------------------------------------------------------------------------- MkDocs


def on_files(files, config):
    first, rest = (ROOT / "README.md").read_text().split("\n## ", 1)  # the first screen has a style of its own
    front = f'---\nhide: [navigation, toc]\n---\n\n<div class="front" markdown>\n\n{first}\n\n</div>\n\n## {rest}'
    files.append(File.generated(config, "index.md", content=front))
    for notebook in (ROOT / "docs").glob("*.ipynb"):
        add_notebook(notebook, config, files)
    font = package_files("ziamath.fonts") / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, "assets/STIXTwoMath-Regular.ttf", abs_src_path=str(font)))


def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"^<!-- source: (\S+) -->$", lambda m: source_page(m[1]), markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- scores: (\w+) -->$", lambda m: scores(m[1]), markdown, flags=re.MULTILINE)
    uri = page.file.src_uri
    if uri == "differences.md":  # a place for each note, which the other pages link to
        markdown = re.sub(r"^\| (D\d+) \|", r'| <span id="\1">\1</span> |', markdown, flags=re.MULTILINE)
    folder = ROOT if uri == "index.md" else (ROOT / "docs" / uri).parent
    link = lambda match: site_link(match, folder, uri, config, files)
    markdown = re.sub(r"\[([^\[\]]*(?:!\[[^\]]*\]\([^)]*\))?)\]\(([^)#\s:]+)(#[^)\s]*)?\)", link, markdown)
    mark = r"^<!-- code: (\S+) (\w+)(?: to (\w+))? -->\n(.*?)(?=^<!-- code|^## |\Z)"  # last: code is full of [a](b)
    return re.sub(mark, lambda m: explained(*m.groups()), markdown, flags=re.MULTILINE | re.DOTALL)


def on_page_content(content, page, config, files):
    content = re.sub(r"<!-- side by side: (\w+) (\w+) -->", lambda match: side_by_side(*match.groups()), content)
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', mathml, content, flags=re.DOTALL)


def add_notebook(path: Path, config, files) -> None:
    """A page of its cells as they are, and a file for each picture."""
    parts = ["---\nhide: [toc]\n---"]
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                text = "".join(output["text"]).rstrip()
                parts.append(f"```{'diff' if text.startswith('---') else 'text'}\n{text}\n```")
            elif picture := output.get("data", {}).get("image/png"):
                name = f"{path.stem}/{len(parts)}.png"
                files.append(File.generated(config, name, content=base64.b64decode("".join(picture))))
                parts.append(f"![what the cell above draws]({name})")
    parts.insert(
        2, f"It is a [notebook]({path.name}): this page shows it with its output. To run it: `pip install jupyterlab`."
    )
    files.append(File.generated(config, f"{path.stem}.md", content="\n\n".join(parts) + "\n"))


def mathml(match) -> str:
    display = "block" if match[1] == "div" else "inline"
    return convert(html.unescape(match[2]).strip(), display=display)


def site_link(match, folder: Path, uri: str, config, files) -> str:
    """A Markdown link as the site needs it; a file outside docs/ becomes one of the site's."""
    text, target, anchor = match[1], match[2], match[3] or ""
    path = (folder / target).resolve()
    if path.is_dir():  # a folder is no page
        return text
    made = posixpath.normpath(posixpath.join(posixpath.dirname(uri), target))  # a page or a picture of a notebook
    if not path.is_relative_to(ROOT) or not (path.is_file() or files.get_file_from_path(made)):
        raise PluginError(f"{uri} links to {target}, which is not there")
    if path == ROOT / "README.md":
        target = "index.md"
    elif path.is_relative_to(ROOT / "docs"):
        target = path.relative_to(ROOT / "docs").as_posix()
        if path.suffix == ".ipynb" and not uri.startswith(path.stem):
            target = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
    else:
        target = f"repository/{path.relative_to(ROOT).as_posix()}"
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return f"[{text}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor})"


# --------------------------------------------------------------------------------------- equations beside the code


@cache
def equations() -> dict[tuple[str, str], str]:
    """The sections of equations.md by function and algorithm; of most functions, all algorithms ("") share one."""
    found = {}
    for section in re.split(r"^## ", EQUATIONS.read_text(), flags=re.MULTILINE)[1:]:
        heading, text = section.split("\n", 1)
        function, *algorithms = re.findall(r"`(\w+)`", heading)
        for algorithm in algorithms or [""]:
            if (function, algorithm) in found:
                raise PluginError(f"equations.md has two sections for {function} of {algorithm or 'all'}")
            found[function, algorithm] = text.strip()
    return found


def source_page(name: str) -> str:
    """The algorithm of a file in words, each function beside its equations, its notes and its flags, as Markdown."""
    path = ROOT / name
    if not path.is_file():
        raise PluginError(f"there is no file {name}")
    lines, tree = path.read_text().splitlines(), ast.parse(path.read_text())
    header, parts = ast.get_docstring(tree), []
    outline = re.search(r"^    init_state:.*?(?=^Run:)", header, flags=re.DOTALL | re.MULTILINE)
    if outline:
        parts += ["## The algorithm", f"```text\n{outline[0].rstrip()}\n```"]
    parts.append("## Equations and code")
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        if function.name in PLUMBING:
            continue
        text = equations().get((function.name, path.stem)) or equations().get((function.name, ""))
        if text is None:
            raise PluginError(f"equations.md has no section for {function.name} of {name}")
        code = fence(name, lines, function.lineno, function.end_lineno)
        parts.append(f"### `{function.name}`\n\n{beside('beside', with_notes(text), code)}")
    notes = re.findall(r"^(D\d+) +(.+)$", header, flags=re.MULTILINE)
    if notes:
        rows = [f"| {with_notes(number)} | {text} |" for number, text in notes]
        parts += ["## Differences that the code cites", "\n".join(["| note | |", "|---|---|", *rows])]
    (flags,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"] or [None]
    if flags:
        rows = []
        for field, below in itertools.pairwise(flags.body):
            if isinstance(field, ast.AnnAssign):
                text = lines[field.end_lineno - 1].partition("  # ")[2] or ast.literal_eval(below.value)
                default = ast.unparse(field.value).replace("None", "by domain or none").strip("'")
                flag = "--" + field.target.id.replace("_", "-")
                rows.append(f"| `{flag}` | {default} | {text.replace('|', '&#124;')} |")
        parts += ["## Flags", "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])]
    return "\n\n".join(parts)


def scores(algorithm: str) -> str:
    """Its table beside its curves, as Markdown."""
    table = ROOT / f"{SCORES}-{algorithm}.md"
    if not table.is_file():
        raise PluginError(f"there is no file {table.relative_to(ROOT)}")
    which = "short runs with K = 5" if algorithm == "dql_baseline" else "short runs"
    text = (
        f"Of [{which}](../results.md#each-with-its-own-settings): the last score after 10,000 updates, mean ± "
        "deviation of five seeds, `behaviour` that of the data. In the curves the band is the range of the seeds."
    )
    picture = f"![score against updates on each of the six datasets](../../{SCORES}-{algorithm}.png)"
    return f"## Scores\n\n{text}\n\n{beside('beside scores', table.read_text(), picture)}"


def explained(name: str, first: str, last: str | None, text: str) -> str:
    """The definitions of a file from `first` to `last`, with the comment above them, beside a text, as Markdown."""
    path = ROOT / name
    if not path.is_file():
        raise PluginError(f"there is no file {name}")
    lines, places = path.read_text().splitlines(), {}
    for node in ast.parse(path.read_text()).body:
        names = [node.name] if hasattr(node, "name") else re.findall(r"\w+", lines[node.lineno - 1].partition(" = ")[0])
        places |= {defined: (node.lineno, node.end_lineno) for defined in names}
    if not {first, last or first} <= set(places):
        raise PluginError(f"{name} does not define {first} or {last}")
    start, end = places[first][0], places[last or first][1]
    while lines[start - 2].startswith(("#", "@")):  # comments and decorators
        start -= 1
    return beside("beside code-first", fence(name, lines, start, end), text.strip()) + "\n\n"


def fence(name: str, lines: list[str], first: int, last: int) -> str:
    code = "\n".join(lines[first - 1 : last])
    return f'``` {{ .python linenums="{first}" title="{name}, lines {first} to {last}" }}\n{code}\n```'


def beside(classes: str, left: str, right: str) -> str:
    columns = "\n\n".join(f"<div markdown>\n\n{column}\n\n</div>" for column in (left, right))
    return f'<div class="{classes}" markdown>\n\n{columns}\n\n</div>'


def with_notes(text: str) -> str:
    """D1, D2, ... as links to their rows in differences.md."""
    return re.sub(r"\bD\d+\b", r"[\g<0>](../differences.md#\g<0>)", text)


# ---------------------------------------------------------------------------------------------------- side by side


def side_by_side(left: str, right: str) -> str:
    """Two files of algorithms/ in two columns, as HTML; what is alike is folded."""
    paths = [ROOT / "algorithms" / f"{name}.py" for name in (left, right)]
    for path in paths:
        if not path.is_file():
            raise PluginError(f"there is no file {path.relative_to(ROOT)}")
    a, b = (path.read_text().splitlines() for path in paths)
    colours = [coloured_lines(path.read_text()) for path in paths]
    out, removed, added = [], 0, 0
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            rows = [
                row("same", (i, colours[0][i], []), (j, colours[1][j], []))
                for i, j in zip(range(i1, i2), range(j1, j2))
            ]
            first, last = (CONTEXT if i1 else 0), (CONTEXT if i2 < len(a) else 0)
            folded = rows[first : len(rows) - last]
            if len(folded) > FOLD:
                names = re.findall(r"^(?:def|class) (\w+)", "\n".join(a[i1 + first : i2 - last]), flags=re.MULTILINE)
                label = f"{len(folded)} lines alike" + (": " + ", ".join(names) if names else "")
                rows[first : len(rows) - last] = [f"<details><summary>{label}</summary>", *folded, "</details>"]
            out += rows
            continue
        removed, added = removed + i2 - i1, added + j2 - j1
        for i, j in align(a[i1:i2], b[j1:j2]):
            cells = [
                None if k is None else (at + k, colours[n][at + k], []) for n, (at, k) in enumerate([(i1, i), (j1, j)])
            ]
            if i is not None and j is not None:
                for cell, marks in zip(cells, changed_words(a[i1 + i], b[j1 + j])):
                    cell[2].extend(marks)
            out.append(row("changed" if None not in (i, j) else "removed" if j is None else "added", *cells))
    heads = "".join(f"<b>algorithms/{name}.py</b>" for name in (left, right))
    count = f"<p>{removed} lines of <code>{left}.py</code> became {added} of <code>{right}.py</code>.</p>"
    return (
        f"{count}<section data-search-exclude>"  # search ends an exclusion at the first closing tag of its name
        f'<div class="sides highlight"><div class="heads">{heads}</div>{"".join(out)}</div></section>'
    )


def coloured_lines(text: str) -> list[list[tuple[str, str]]]:
    """Each line as (CSS class of Pygments, text) pairs."""
    lines = [[]]
    for kind, value in PythonLexer(stripnl=False).get_tokens(text):
        while kind not in STANDARD_TYPES:
            kind = kind.parent
        for i, part in enumerate(value.split("\n")):
            if i:
                lines.append([])
            lines[-1].append((STANDARD_TYPES[kind], part))
    return lines


def words(line: str) -> list[str]:
    return re.findall(r"\w+|\s+|.", line)


def align(a: list[str], b: list[str]) -> list[tuple[int | None, int | None]]:
    """Pairs of lines with the largest sum of likenesses, in order; None where a line has no partner."""
    total, step = {}, {}  # of the lines from (i, j) on: the largest sum, and its first step
    for i, j in itertools.product(range(len(a), -1, -1), range(len(b), -1, -1)):
        options = [(0.0, (0, 0))] if i == len(a) and j == len(b) else []
        if i < len(a) and j < len(b):
            like = difflib.SequenceMatcher(None, words(a[i]), words(b[j]), autojunk=False).ratio()
            options += [(total[i + 1, j + 1] + like, (1, 1))] if like > 0.5 else []
        options += [(total[i + 1, j], (1, 0))] if i < len(a) else []
        options += [(total[i, j + 1], (0, 1))] if j < len(b) else []
        total[i, j], step[i, j] = max(options, key=lambda option: option[0])
    pairs, i, j = [], 0, 0
    while (i, j) != (len(a), len(b)):
        down, across = step[i, j]
        pairs.append((i if down else None, j if across else None))
        i, j = i + down, j + across
    return pairs


def changed_words(a: str, b: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The stretches of characters, (first, after last), in which two lines differ, word by word."""
    sides = words(a), words(b)
    places = [list(itertools.accumulate(map(len, side), initial=0)) for side in sides]
    marks = [], []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, *sides, autojunk=False).get_opcodes():
        for side, place, mark, first, last in zip(sides, places, marks, (i1, j1), (i2, j2)):
            if (kind == "equal" and "".join(side[first:last]).strip()) or first == last:
                continue
            if mark and mark[-1][1] == place[first]:  # a space between two changed words is marked, too
                first_place = mark.pop()[0]
            elif kind == "equal":
                continue
            else:
                first_place = place[first]
            mark.append((first_place, place[last]))
    return tuple([(first, last) for first, last in mark if first < last] for mark in marks)


def row(kind: str, *cells) -> str:
    """One line of both files: for each a number and its coloured text, with marked stretches."""
    parts = []
    for cell in cells:
        if cell is None:
            parts.append("<i></i><code></code>")
            continue
        number, tokens, marks = cell
        characters, at = [], 0
        for css, text in tokens:
            characters += [(css, any(first <= at + k < last for first, last in marks), c) for k, c in enumerate(text)]
            at += len(text)
        code = ""
        for (css, marked), group in itertools.groupby(characters, key=lambda character: character[:2]):
            text = html.escape("".join(c for _, _, c in group), quote=False)
            text = f'<span class="{css}">{text}</span>' if css else text
            code += f"<mark>{text}</mark>" if marked else text
        parts.append(f"<i>{number + 1}</i><code>{code}</code>")
    return f'<div class="{kind}">{"".join(parts)}</div>'
