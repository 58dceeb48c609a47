"""What the documentation says of the code is up to date."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_of_public_names_is_up_to_date() -> None:
    specification = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    assert specification is not None
    assert specification.loader is not None
    make_api = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make_api)
    assert make_api.PAGE.read_text() == make_api.text(), "run python docs/make_api.py"


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    for page in [*pages, *ROOT.glob("examples/*.md")]:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_that_pages_name_have_the_options_they_show() -> None:
    """Each option behind ``certify COMMAND`` in a block of code is one of that command."""
    from certify.cli import main

    context = main.make_context("certify", ["train"], resilient_parsing=True)
    shown = 0
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for block in re.findall(r"```\n(.*?)```", page.read_text(), flags=re.DOTALL):
            joined = re.sub(r"\\\n|\n +", " ", block)
            for command, rest in re.findall(r"(?:^|-m )certify (\w+)(.*)", joined, flags=re.M):
                found = main.get_command(context, command)
                assert found is not None, f"{page.name}: certify {command}"
                known = {option for parameter in found.params for option in parameter.opts}
                known |= {o for p in found.params for o in p.secondary_opts} | {"--help"}
                for option in re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", rest):
                    shown += 1
                    assert option in known, f"{page.name}: certify {command} {option}"
    assert shown > 50
