"""Writes docs/api.md: the public names of all packages, with what their docstrings begin with.

python docs/make_api.py
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGES = {
    "certify": "Certificates, evaluation, training.",
    "ff_bounds": "Bounds of kernels and matrices. Tensors in, float64 scalars out.",
    "models": "Plain PyTorch networks and layers.",
}
WITH_MEMBERS = ("Certificate", "CertifiedModel", "Report", "NetworkReport", "ImageData")
MOST = 10
"""Parameters, beyond which they are left to `help`."""

PAGE = Path(__file__).with_name("api.md")


def text() -> str:
    """The whole page."""
    parts = [
        "# Public names\n\nAll that the packages promise to keep. `help(name)` says more: shapes, "
        "units, errors, sources,\nan example. Made by `python docs/make_api.py`.\n"
    ]
    for package, about in PACKAGES.items():
        module = import_module(package)
        rows = "".join(_row(name, getattr(module, name)) for name in module.__all__)
        parts.append(f"\n## {package}\n\n{about}\n\n| name | |\n|---|---|\n{rows}")
    return "".join(parts)


def _row(name: str, value: Any) -> str:
    if not callable(value):
        return f"| `{name}` | {_constant(value)} |\n"
    row = f"| {_call(name, value)} | {_about(value)} |\n"
    if inspect.isclass(value) and value.__name__ in WITH_MEMBERS:
        members = {name: found for name, found in vars(value).items() if not name.startswith("_")}
        row += "".join(map(_member, members, members.values()))
    return row


def _member(name: str, value: Any) -> str:
    """A method, or a property that may be cached; fields are in the class's own docstring."""
    if inspect.isfunction(value):
        return f"| {_call('.' + name, value)} | {_about(value)} |\n"
    found = getattr(value, "fget", None) or getattr(value, "func", None)
    return f"| `.{name}` | {_about(found)} |\n" if found else ""


def _about(value: Any) -> str:
    first = (inspect.getdoc(value) or "").split("\n\n")[0]
    return first.replace("\n", " ").replace("|", "\\|")


def _call(name: str, value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"`{name}`"
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
    if len(parameters) > MOST:
        return f"`{name}(...)`"
    return f"`{name}({', '.join(map(_parameter, parameters))})`"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    given = "" if parameter.default is parameter.empty else "=..."
    return f"{star}{parameter.name}{given}"


def _constant(value: Any) -> str:
    return ", ".join(f"`{key}`" for key in value)


if __name__ == "__main__":
    PAGE.write_text(text())
