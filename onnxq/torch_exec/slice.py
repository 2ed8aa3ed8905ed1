"""Running a part of a graph in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from onnxq.errors import UsageError
from onnxq.torch_exec.binding import Argument, Call


class Slice(torch.nn.Module):
    """Some nodes of a graph as a torch module; `onnxq.torch_exec.extract` makes it.

    Constants are buffers, so they follow `module.to(...)`; nothing is a parameter. What is learned is passed to each
    call, as another constant or as a function of a value.

    Args:
        calls: The nodes, each behind those that it reads.
        inputs: Names of the values it is fed.
        outputs: Names of the values it returns.
        constants: Constants that `calls` read (or that are outputs) by name.

    Attributes:
        inputs: Names of the values it is fed.
        outputs: Names of the values it returns.
    """

    def __init__(
        self, calls: Sequence[Call], inputs: Sequence[str], outputs: Sequence[str], constants: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._calls = tuple(calls)
        self._buffer_of = {name: f"constant_{index}" for index, name in enumerate(constants)}
        for name, tensor in constants.items():
            self.register_buffer(self._buffer_of[name], tensor)
        made = [name for call in self._calls for name in call.outputs if name]
        self._known = frozenset({*self.inputs, *self._buffer_of, *made})
        self._dead = _last_reads(self._calls, self.outputs)
        self._numbers: dict[tuple[str, object], object] = {}
        for call in self._calls:
            for argument in call.arguments:
                if argument.numbers is not None and argument.name in constants:
                    self._numbers[argument.name, argument.numbers] = argument.of(constants[argument.name])

    @property
    def constants(self) -> dict[str, Tensor]:
        """The constants by name, on the module's device. They are the module's own: clone before changing one."""
        return {name: cast(Tensor, getattr(self, buffer)) for name, buffer in self._buffer_of.items()}

    def forward(
        self,
        feeds: Mapping[str, Tensor],
        *,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run the slice.

        Args:
            feeds: Values of all `inputs` by name; others are not looked at.
            replace: Functions by value name (input, constant or result of a node): each is applied to its value as
                soon as that exists, inputs first, then constants, then results; all readers, and the caller, see
                what it returns.
            constants: Values that stand in for constants of the same names, in this call only.

        Returns:
            The outputs by name.

        Raises:
            UsageError: An input is missing, or `replace` or `constants` names a value that is not there.
        """
        replace, constants = replace or {}, constants or {}
        self._require(feeds, replace, constants)
        touched = {*replace, *constants}
        values = {name: feeds[name] for name in self.inputs}
        values.update({**self.constants, **constants})
        for name in values:
            if name in replace:  # in the order of `values`, so that functions which draw random numbers repeat
                values[name] = replace[name](values[name])
        for call, dead in zip(self._calls, self._dead, strict=True):
            arguments = [self._argument(argument, values, touched) for argument in call.arguments]
            results = call.handler(*arguments, **call.attributes)
            del arguments
            for name, value in zip(call.outputs, results if isinstance(results, tuple) else (results,), strict=False):
                if name:
                    values[name] = replace[name](value) if name in replace else value
            del results
            for name in dead:
                del values[name]
        return {name: values[name] for name in self.outputs}

    def _argument(self, argument: Argument, values: Mapping[str, Tensor], touched: set[str]) -> object:
        if not argument.name:
            return argument.fixed
        known = (argument.name, argument.numbers)
        if known in self._numbers and argument.name not in touched:
            return self._numbers[known]
        return argument.of(values[argument.name])

    def _require(self, feeds: Mapping[str, Tensor], replace: Mapping[str, object], given: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise UsageError(f"the slice is not fed {', '.join(missing)}")
        unknown = sorted((given.keys() - self._buffer_of.keys()) | (replace.keys() - self._known))
        if unknown:
            raise UsageError(f"the slice has no value {', '.join(unknown)} to replace")


def _last_reads(calls: Sequence[Call], outputs: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """For each call, the values that nothing reads after it and that are no outputs of the slice."""
    last: dict[str, int] = {}
    for index, call in enumerate(calls):
        last.update((name, index) for name in call.outputs if name)
        last.update((argument.name, index) for argument in call.arguments if argument.name)
    dead: list[list[str]] = [[] for _ in calls]
    for name, index in last.items():
        if name not in outputs:
            dead[index].append(name)
    return tuple(tuple(names) for names in dead)
