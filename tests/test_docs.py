"""What the documentation tells people to type is what the programs take, and what it links to is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from acmds_optimizer import cli
from acmds_optimizer.config import load
from acmds_tune import cli as tune

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(program: str) -> list[tuple[str, str]]:
    """(page, command) of all indented lines that run `program`."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            match = re.match(rf"^    (?:.* && )?({program} .*)$", line)
            if match:
                found.append((page.name, match[1].split(" #")[0].split(" && ")[0].strip()))
    return found


@pytest.mark.parametrize(("page", "command"), commands("acmds-train"))
def test_a_training_command_of_the_documentation_is_understood(page, command):
    words = shlex.split(command)[1:]
    if words[0] in cli.VERBS:
        with pytest.raises(SystemExit) as end:
            cli.VERBS[words[0]]([*words[1:], "--help"])
        assert end.value.code == 0
        return
    options = vars(cli.build_parser().parse_args(words))
    own = ("config", "resume", "evaluate", "dry_run", "log_file", "quiet")
    flags = {name: value for name, value in options.items() if name not in own}
    file = options["config"]
    load(REPOSITORY / file if file and (REPOSITORY / file).exists() else None, flags)
    if file and not file.startswith("results/"):
        assert (REPOSITORY / file).is_file()


@pytest.mark.parametrize(("page", "command"), commands("acmds-tune"))
def test_a_tuning_command_of_the_documentation_is_understood(page, command):
    words = shlex.split(command)[1:]
    tune._parser().parse_args(words)
    for word in words:
        if word.startswith("search_spaces/"):
            assert (REPOSITORY / word).is_file()


@pytest.mark.parametrize(("page", "command"), commands("python -m"))
def test_a_module_of_the_documentation_exists(page, command):
    module = shlex.split(command)[2]
    assert (REPOSITORY / (module.replace(".", "/") + ".py")).is_file()


@pytest.mark.parametrize(("page", "command"), commands("pip install"))
def test_an_extra_of_the_documentation_exists(page, command):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for named in re.findall(r"\[([\w,]+)\]", command):
        assert set(named.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("page", "number"), [(page.name, number) for page in PAGES for number in range(len(fenced(page, "python")))]
)
def test_python_of_the_documentation_runs(page, number, tmp_path, monkeypatch):
    code = fenced(REPOSITORY / page if page == "README.md" else REPOSITORY / "docs" / page, "python")[number]
    compiled = compile(code, f"{page} block {number}", "exec")
    if "import" not in code:  # a part of a longer program, which docs/own_loop.md has whole
        return
    monkeypatch.chdir(tmp_path)
    if "weights.safetensors" in code:
        import torch
        from safetensors.torch import save_file

        save_file({"head": torch.zeros(2)}, "weights.safetensors", metadata={"model": "x"})
    exec(compiled, {"__name__": "documentation"})


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", REPOSITORY / "docs" / "own_loop.md"], ids=lambda p: p.name)
def test_the_loop_asks_for_no_more_samples_than_a_short_last_batch_has(page):
    loop = next(code for code in fenced(page, "python") if "guard.run(" in code)
    assert "min(controller.decide().batch, len(inputs))" in loop


@pytest.mark.parametrize(
    ("page", "number"), [(page.name, number) for page in PAGES for number in range(len(fenced(page, "yaml")))]
)
def test_yaml_of_the_documentation_is_yaml(page, number):
    text = fenced(REPOSITORY / page if page == "README.md" else REPOSITORY / "docs" / page, "yaml")[number]
    assert isinstance(yaml.safe_load(text), dict)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documentation_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_tests_that_the_documentation_names_exist(page):
    for file in re.findall(r"\btests/test_\w+\.py", page.read_text(encoding="utf-8")):
        assert (REPOSITORY / file).is_file()


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"\w+\.md", str(settings["nav"]))
    assert sorted(listed) == sorted(page.name for page in PAGES if page.name != "README.md")


def test_the_first_page_leads_to_every_other():
    linked = re.findall(r"\]\((\w+\.md)", (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8"))
    assert sorted([*linked, "index.md"]) == sorted(page.name for page in PAGES if page.name != "README.md")


def test_every_documented_error_is_one_that_the_programs_give():
    """Headings of docs/errors.md are words of the messages, so that a search for a message finds its section."""
    sources = [*(REPOSITORY / "acmds_optimizer").rglob("*.py"), *(REPOSITORY / "acmds_tune").rglob("*.py")]
    code = " ".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # one message over two lines
    headings = re.findall(r"^### (.+)$", (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(headings) > 30
    unknown = [h for h in headings if h not in code and h.split(": ")[-1] not in code]
    assert unknown == []
