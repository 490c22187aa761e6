"""Any Python function as a scorer."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo_lightning.errors import UsageError
from dpo_lightning.scorers.base import Prompt, Scorer, Unscored, digest_of_code

ALONE = ("response", "responses")


@dataclass(frozen=True, kw_only=True)
class Function(Scorer):
    """A Python function, as a ground-truth reward.

    Its parameters without defaults say what it is given: two of them prompt and response, one that is called response
    the response, one of another name the two joined, which takes prompts that are text.

    Args:
        path: Where it lies, as in my_module.my_function; modules in the current folder are found.
        batched: Whether it takes lists and returns a list, one number a response.
    """

    path: str
    batched: bool = False

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """What the function returns for each response.

        Raises:
            Unscored: If it fails, or returns something that is no number.
        """
        arguments = self._arguments(prompts, responses)
        if not self.batched:
            return [
                self._number(self._call(place, *one), place) for place, one in enumerate(zip(*arguments, strict=True))
            ]
        returned = self._call(0, *arguments) if responses else []
        numbers = list(returned) if isinstance(returned, Sequence) or hasattr(returned, "tolist") else None
        if numbers is None or len(numbers) != len(responses):
            got = type(returned).__name__ if numbers is None else f"{len(numbers)}"
            raise Unscored(
                0, f"{self.path} has to return a list of {len(responses)} numbers, one a response; got {got}."
            )
        return [self._number(value, place) for place, value in enumerate(numbers)]

    def fingerprint(self) -> str:
        """The settings, with the content of the function's file."""
        return super().fingerprint() + digest_of_code(self._function)

    @cached_property
    def _function(self) -> Callable[..., Any]:
        module, _, name = self.path.rpartition(".")
        if not module:
            raise UsageError(f"`path` must be a module and a function in it, as in my_module.score, got {self.path!r}.")
        try:
            function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise UsageError(
                f"There is no module {error.name} for {self.path}; is it in the current folder?"
            ) from error
        except AttributeError as error:
            raise UsageError(f"The module {module} has no function {name!r}.") from error
        if not callable(function):
            raise UsageError(f"{self.path} is no function, it is {type(function).__name__}.")
        return function

    @cached_property
    def _needed(self) -> list[str]:
        """Names of the parameters that have to be given."""
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except ValueError:
            return ["text"]
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = [one.name for one in parameters if one.kind in named and one.default is one.empty]
        if len(needed) not in (1, 2):
            raise UsageError(
                f"{self.path} needs {len(needed)} arguments ({', '.join(needed)}); a score function takes prompt and "
                "response, or one text. Give the others defaults."
            )
        return needed

    def _arguments(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[Any]]:
        if len(self._needed) == 2:
            return [list(prompts), list(responses)]
        if self._needed[0] in ALONE:
            return [list(responses)]
        joined = []
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not isinstance(prompt, str):
                raise Unscored(
                    place,
                    f"{self.path} takes one text, prompt and response joined, and this prompt is messages. Give it the "
                    "parameters prompt and response, or one that is called response.",
                )
            joined.append(prompt + response)
        return [joined]

    def _call(self, place: int, *arguments: Any) -> Any:
        try:
            return self._function(*arguments)
        except Exception as error:
            raise Unscored(place, f"{self.path} failed: {type(error).__name__}: {error}") from error

    def _number(self, value: Any, place: int) -> float:
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value)
        except (TypeError, ValueError):
            raise Unscored(place, f"{self.path} has to return a number, got {value!r:.80}.") from None
