"""What the options of the command line take: budgets, settings, numbers, shapes."""

from __future__ import annotations

import ast
from fractions import Fraction
from typing import Any

import click


class Epsilon(click.ParamType):  # type: ignore[type-arg]  # not generic in older clicks
    """A budget, as a number or a fraction such as 36/255."""

    name = "eps"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse ``value``; a click error for anything but a number of at least zero."""
        try:
            number = float(value) if isinstance(value, float) else float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value!r} is not a number or a fraction such as 36/255", param, ctx)
        if number < 0:
            self.fail(f"{value!r} is negative; a budget is at least 0", param, ctx)
        return number


class Setting(click.ParamType):  # type: ignore[type-arg]
    """``KEY=VALUE`` with a Python literal or a bare word as value."""

    name = "key=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Parse ``value``; a click error unless it has the form ``KEY=VALUE``."""
        if isinstance(value, tuple):
            return value
        key, sign, text = str(value).partition("=")
        if not sign or not key.isidentifier():
            self.fail(f"{value!r} does not have the form KEY=VALUE", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, text


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Numbers between commas, such as 0.5,0.25."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse ``value``; a click error for anything but numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.5,0.25", param, ctx)


class Shape(click.ParamType):  # type: ignore[type-arg]
    """Sizes between commas, such as 3,32,32."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse ``value``; a click error for anything but positive whole numbers."""
        if isinstance(value, tuple):
            return value
        sizes = str(value).split(",")
        if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
            self.fail(f"{value!r} is not a shape such as 3,32,32", param, ctx)
        return tuple(int(size) for size in sizes)
