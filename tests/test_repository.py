"""What the repository says of itself: the READMEs, links, code blocks, versions, files of habit."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import deepseek
from deepseek.cli.main import make_parser
from tests.helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?://)([^)\s]+)\)", _prose(page))


@pytest.mark.parametrize("page", [page for page in PAGES if links(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{target}: there is no such file"
        assert not heading or heading in anchors(file), f"{target}: the page has no such heading"


@every_page
def test_code_blocks_are_fenced_with_a_language(page: Path) -> None:
    inside = False
    assert "\n<<<<<<<" not in page.read_text(encoding="utf-8")
    for number, line in enumerate(lines := page.read_text(encoding="utf-8").split("\n")):
        if line.startswith("```"):
            inside = not inside
            assert not inside or re.fullmatch(r"```[a-z]+", line), f"line {number + 1}: no language"
        else:
            assert inside or not (line.startswith("    ") and not lines[number - 1]), f"line {number + 1}: not fenced"
    assert not inside


@every_page
def test_a_page_has_one_title(page: Path) -> None:
    """The site's table of contents ends where a second one begins."""
    assert len(re.findall(r"^# ", _prose(page), re.MULTILINE)) == 1


@pytest.mark.parametrize("page", [page for page in PAGES if page.name.endswith(".zh.md")], ids=lambda page: page.name)
def test_chinese_lines_are_whole(page: Path) -> None:
    """HTML shows a line break as a space, which Chinese text does not have: a paragraph is one line."""
    wide = "[\u2018-\u201d\u2026\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
    assert re.findall(rf"^(?![#|]).*{wide}\n(?![-|\n]|\d\.|\Z).*$", _prose(page), re.MULTILINE) == []


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_is_one_page(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("\n") <= 130


def test_the_readmes_have_the_same_commands_figures_and_parts() -> None:
    ours, theirs = (page.read_text(encoding="utf-8") for page in READMES)
    for pattern in (r"^#+ ", r"`python [^` ]+(?: --[^`]+)?", r"^(?:deepseek|make|curl|git|source) [^#\n]*", r"^\|"):
        want, have = (re.findall(pattern, text, re.MULTILINE) for text in (ours, theirs))
        assert want == have and len(want) > 3, pattern


@pytest.mark.parametrize(("page", "rows"), [(READMES[0], 5), (ROOT / "docs" / "benchmarks.md", 25)],
                         ids=["README.md", "benchmarks.md"])
def test_figures_stand_in_the_results(page: Path, rows: int) -> None:
    """Every row names its command, and the newest result of that script has the figures. Ratios of two of them, and
    seconds that a result has in milliseconds, are computed."""
    found = re.findall(r"^\|[^|]*\|([^|]*)\| `python benchmarks/(\w+)\.py(?: --only (\w+))?` \|$",
                       page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == rows
    for figures, script, only in found:
        name = f"{script}-{only}" if only else script
        assert (ROOT / "benchmarks" / f"{script}.py").is_file()
        result = sorted((ROOT / "benchmarks" / "results").glob(f"{name}-*.md"))[-1].read_text(encoding="utf-8")
        numbers = [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.-])\d[\d,]*\.?\d*", result)]
        numbers += [number / 1000 for number in numbers if "(ms)" in result]
        for figure in re.findall(r"\d[\d,]*\.?\d*", re.sub(r"[\d.]+x|\d+ % fewer", "", figures)):
            digits = len(figure.rstrip(",").partition(".")[2])
            assert any(f"{number:.{digits}f}" == figure.replace(",", "") for number in numbers), (name, figure)


def test_the_version_stands_in_one_place_and_is_the_newest_change() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "src/deepseek/__init__.py"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == deepseek.__version__
    dated = re.findall(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert dated[0][0] == deepseek.__version__


def test_badges_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = project["requires-python"].removeprefix(">=") + "+"
    for badge, value in (("python", python), ("license", project["license"])):
        assert f">{value}</text>" in (ROOT / "docs" / "images" / f"badge-{badge}.svg").read_text(encoding="utf-8")


def test_workflows_call_what_there_is() -> None:
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / ".github").rglob("*.yml")]
    runs = [step["run"] for file in files for job in file.get("jobs", {}).values() for step in job["steps"]
            if "run" in step]
    assert ".ci/run" in runs and (ROOT / ".ci" / "run").stat().st_mode & 0o111
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    said = " ".join(page.read_text(encoding="utf-8") for page in PAGES) + " ".join(runs)
    assert set(re.findall(r"`make ([a-z-]+)", said)) <= targets


def test_the_site_has_every_page_and_every_public_name() -> None:
    """`make docs` builds it; what can go wrong without mkdocs is looked at here."""
    listed = re.findall(r"- .*?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in ROOT.glob("docs/*.md"))
    api = re.findall(r"^::: deepseek\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert api == deepseek.__all__
    for page in ROOT.glob("docs/*.md"):
        assert "](../" not in page.read_text(encoding="utf-8"), f"{page.name}: links out of the site"


def test_the_house_names_every_module() -> None:
    """A room's block has each of its modules; a line that begins with a dot names modules up to its colon, apart from
    what stands in brackets."""
    source = ROOT / "src" / "deepseek"
    tree = (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("```text\n")[2].split("```")[0]
    blocks = dict(re.findall(r"^  ([\w/.]+) +(.*(?:\n {10,}.*)*)", tree, re.MULTILINE))
    modules = {path.name for path in source.glob("*.py")} - {"__main__.py"}
    rooms = {path.name + "/" for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(blocks) == modules | rooms
    for room in rooms:
        stems = {path.stem for path in (source / room).glob("*.py") if not path.stem.startswith("__")}
        assert stems <= set(re.findall(r"\w+", blocks[room])), room
        for line in re.findall(r"^ +\. (.*)", blocks[room], re.MULTILINE):
            named = re.sub(r"\([^)]*\)", "", line).partition(":")[0]
            assert set(re.findall(r"\w+", named)) <= stems, (room, line)


def test_the_walk_of_a_request_names_what_there_is() -> None:
    """Every file, class and method of the walk in docs/serving.md exists."""
    walk = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("## One chat request")[2]
    source = ROOT / "src" / "deepseek"
    files = {name: (source / name).read_text(encoding="utf-8") for name in re.findall(r"`(\w[\w/]*\.py)`", walk)}
    code = "\n".join([*files.values(), *(file.read_text(encoding="utf-8") for file in source.glob("engine/*.py"))])
    assert len(files) > 15
    for name, method in set(re.findall(r"`([A-Z]\w+)(?:\.(\w+))?`", walk)) - {("Host", ""), ("StreamingResponse", "")}:
        assert re.search(rf"^class {name}\b", code, re.MULTILINE), name
        assert not method or re.search(rf"^ +(?:async )?def {method}\b", code, re.MULTILINE), f"{name}.{method}"


def commands(page: Path) -> Iterator[str]:
    for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"(?:^|\| |KEY )(deepseek(?:-infer)? .*)$", line):
                yield found[1]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.name)
def test_commands_are_such_as_the_parser_takes(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               recwarn: pytest.WarningsRecorder) -> None:
    """Their names and flags; none of a name that is deprecated."""
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        words = shlex.split(command, comments=True)
        for file in re.findall(r"--config (\S+)", command):  # read while the command line is parsed
            Path(file).write_text("{}", encoding="utf-8")
        words = ["infer", *words[1:]] if words[0] == "deepseek-infer" else words[1:]
        try:
            make_parser().parse_args(words)
        except SystemExit as left:
            assert left.code == 0, command
        assert not [str(one.message) for one in recwarn], command
