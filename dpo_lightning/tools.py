"""Commands that need no Trainer: each is a function, whose signature is its options."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from dpo_lightning.explain import explain


class Tool(NamedTuple):
    """A command.

    Its parameters that can be given by place are so on the command line too, the others are options; a parameter that
    is False unless given is a flag, and a list that is its first parameter takes as many places as are given. The
    first line of its docstring is the help.

    Attributes:
        function: Where its function lies, ``module:name``. It returns the file or folder that it wrote, or several; on
            ranks that write nothing, None.
        bases: Base classes of the components that it takes, ``module:name``.
        goes_on: Whether it goes on from what a call that was interrupted has made.
    """

    function: str
    bases: tuple[str, ...] = ()
    goes_on: bool = False


TOOLS: dict[str, Tool | dict[str, Tool]] = {
    "export": Tool("dpo_lightning.export:export"),
    "label": Tool(
        "dpo_lightning.labelling:label",
        bases=("dpo_lightning.labelling:Labeller", "dpo_lightning.scorers:Scorer", "dpo_lightning.judges:Judge"),
        goes_on=True,
    ),
    "sample": Tool(
        "dpo_lightning.generation.command:sample_prompts", ("dpo_lightning.data.sources:Source",), goes_on=True
    ),
    "evaluate": {
        "reward_kl": Tool(
            "dpo_lightning.evaluation.reward_kl:reward_kl", ("dpo_lightning.scorers:Scorer",), goes_on=True
        ),
        "win_rate": Tool(
            "dpo_lightning.evaluation.win_rate:win_rate",
            ("dpo_lightning.judges:Judge", "dpo_lightning.scorers:Scorer", "dpo_lightning.data.sources:Source"),
            goes_on=True,
        ),
        "agreement": Tool("dpo_lightning.evaluation.agreement:agreement"),
    },
    "frontier": Tool("dpo_lightning.evaluation.frontier:frontier"),
}


def run_tool(name: str, args: list[str]) -> None:
    """Run a command with its arguments, or one of the commands below it."""
    tool, prog = TOOLS[name], f"dpo-lightning {name}"
    if isinstance(tool, dict):
        below, prog, args = args[0] if args else "--help", prog, args[1:]
        if below not in tool:
            _show_choices(prog, tool, below)
        tool, prog = tool[below], f"{prog} {below}"
    function = _named(tool.function)
    parser = _Parser(prog=prog, description=_first_line(function), bases=[_named(base) for base in tool.bases])
    parser.add_function(function, args)
    arguments = parser.instantiate(parser.parse_args(args))
    written = function(**{key: value for key, value in vars(arguments).items() if key != "config"})
    for path in written if isinstance(written, (list, tuple)) else [written] if written else []:
        print(f"Written: {path}")


def way_on(arguments: Sequence[str]) -> str:
    """How a command that was interrupted goes on; nothing for those that begin anew."""
    tool: Any = TOOLS.get(arguments[0]) if arguments else None
    if isinstance(tool, dict):
        tool = tool.get("".join(arguments[1:2]))
    if tool is None or not tool.goes_on:
        return ""
    without = ", without --overwrite," if any(one.startswith("--overwrite") for one in arguments) else ""
    return f" The same command{without} goes on from what was made."


class _Parser(ArgumentParser):
    """A parser of one function's arguments."""

    def __init__(self, *args: Any, bases: list[type] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bases = bases or []
        self._known: list[str] = []

    def add_function(self, function: Callable[..., Any], args: Sequence[str]) -> None:
        """Arguments for all of its parameters, and a file of options.

        Args:
            function: The function.
            args: What was given. What has a place may be given by its name instead, as over a file that says it.
        """
        parameters = inspect.signature(function).parameters
        flags = [name for name, parameter in parameters.items() if parameter.default is False]
        first = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
        several = [name for name in first[:1] if str(parameters[name].annotation).startswith("list")]
        named = {one.removeprefix("--").partition("=")[0] for one in args if one.startswith("--")}
        placed = [name for name in first if name not in named]
        options = [name for name in parameters if name not in placed]
        described = {part.arg_name: part.description for part in docstring_parser.parse(function.__doc__ or "").params}
        self._known = list(parameters)
        self.add_argument("--config", action="config", help="A YAML file of the options below.")
        for name in several:
            self.add_argument(name if name in placed else f"--{name}", type=str, nargs="+", help=described.get(name))
        self.add_function_arguments(function, as_group=False, as_positional=True, skip={*options, *several})
        self.add_function_arguments(function, as_group=False, skip={*placed, *several, *flags})
        for name in flags:
            self.add_argument(f"--{name}", action="store_true", help=described.get(name))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a mistake in words for people."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {explain(message, self._known, self._bases, self.prog)}", file=sys.stderr)
        sys.exit(2)


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _show_choices(prog: str, tools: dict[str, Tool], asked: str) -> NoReturn:
    lines = [f"  {name:12} {_first_line(_named(tool.function))}" for name, tool in tools.items()]
    text = "\n".join([f"usage: {prog} COMMAND ...", "", *lines])
    if asked in ("-h", "--help"):
        print(text)
        sys.exit(0)
    print(f"error: there is no command {asked!r} below `{prog}`.\n\n{text}", file=sys.stderr)
    sys.exit(2)
