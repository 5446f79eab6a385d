"""Lepton's grammar: text to a tree.

Precedence from weak to strong: ``+ -``, ``* /``, unary ``-``, ``^``. ``^`` associates to the right
and binds tighter than a minus to its left, so ``-x^2`` is ``-(x^2)``, and ``2^-x`` is allowed.
There is no unary plus. Definitions follow the expression after semicolons, ``a*b; b = 2*c; c = 3``;
each may use those to its right, and replaces a variable of that name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Generator, Mapping

from mdgraft._errors import InvalidInputError


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A number."""

    value: float


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A name whose value is given."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A geometric function of labels, such as ``distance(p1,p2)``; its value is given."""

    name: str
    arguments: tuple[str, ...]

    @property
    def key(self) -> str:
        """What its value is called."""
        return f"{self.name}({','.join(self.arguments)})"


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """An operator, a function of the language, or one that the user supplies."""

    operation: str
    arguments: tuple[Node, ...]
    #: Whether the function is one that the user supplies.
    custom: bool = False


Node = Constant | Variable | Call | Apply
# What reads a part of the grammar: it yields the readers of inner parts, and is sent their nodes.
_Reader = Generator["_Reader", Node, Node]

#: Number of arguments of every function of the language.
FUNCTIONS = {"atan2": 2, "min": 2, "max": 2, "select": 3} | dict.fromkeys(
    ("sqrt", "exp", "log", "square", "cube", "recip", "abs", "floor", "ceil", "step", "delta")
    + ("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh")
    + ("erf", "erfc"),
    1,
)

_OPERATORS = {"+": (0, 1), "-": (0, 1), "*": (1, 2), "/": (1, 2), "^": (3, 3)}
_NEGATION = 2
_SPACE = " \t\n\v\f\r"
_DIGITS = "0123456789"


@dataclasses.dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    place: int


class Parser:
    """Turns one text into a tree.

    Parameters
    ----------
    text
        The expression and its definitions.
    where
        What errors call it.
    variables
        Names that may be used.
    functions
        Number of arguments of each function that the user supplies; these come before the
        language's own.
    geometry
        Number of labels that each geometric function takes.
    labels
        Labels that there are.

    Raises
    ------
    InvalidInputError
        For whatever OpenMM refuses; the message points at the place.
    """

    def __init__(
        self,
        text: str,
        *,
        where: str,
        variables: Collection[str],
        functions: Mapping[str, int],
        geometry: Mapping[str, int],
        labels: Collection[str],
    ) -> None:
        self._text, self._where = text, where
        self._variables, self._labels = frozenset(variables), frozenset(labels)
        self._functions, self._geometry = functions, geometry
        self._definitions: dict[str, Node] = {}
        #: Where each unresolved name stands, by the identity of its node.
        self._places: dict[int, int] = {}
        self._tokens: list[_Token] = []
        self._position = self._end = 0

    def parse(self) -> Node:
        """The tree of the expression, in which definitions are shared subtrees.

        Whether its names are known is a question for `check_names`.
        """
        start = len(self._text)
        while (start := self._text.rfind(";", 0, start)) >= 0:
            stop = self._text.find(";", start + 1)
            self._define(start + 1, len(self._text) if stop < 0 else stop)
        stop = self._text.find(";")
        return self._whole(0, len(self._text) if stop < 0 else stop)

    def _define(self, start: int, stop: int) -> None:
        body = self._text[start:stop]
        if not body.strip(_SPACE):
            return
        name, equals, _ = body.partition("=")
        if not equals or not name.strip(_SPACE):
            raise self._error("a definition must read 'name = expression'", start, stop)
        self._definitions[name.strip(_SPACE)] = self._whole(start + len(name) + 1, stop)

    def _whole(self, start: int, stop: int) -> Node:
        self._tokens, self._position, self._end = list(self._split(start, stop)), 0, stop
        node = _read(self._expression(0))
        if self._position < len(self._tokens):
            raise self._unexpected()
        return node

    # Tokens ------------------------------------------------------------------------------------

    def _split(self, start: int, stop: int) -> list[_Token]:
        tokens, place = [], start
        while place < stop:
            token = self._token(place, stop)
            place = token.place + len(token.text)
            if token.kind != "space":
                tokens.append(token)
        return tokens

    def _token(self, place: int, stop: int) -> _Token:
        first = self._text[place]
        if first in "(),":
            return _Token(first, first, place)
        if first in _OPERATORS:
            return _Token("operator", first, place)
        end = place + 1
        if first in _SPACE:
            while end < stop and self._text[end] in _SPACE:
                end += 1
            return _Token("space", self._text[place:end], place)
        if first == "." or first in _DIGITS:
            return _Token("number", self._text[place : self._number_end(place, stop)], place)
        end = place
        while end < stop and self._text[end] not in "(),+-*/^" and self._text[end] not in _SPACE:
            end += 1
        if end < stop and self._text[end] == "(":
            return _Token("function", self._text[place : end + 1], place)
        return _Token("name", self._text[place:end], place)

    def _number_end(self, place: int, stop: int) -> int:
        point, exponent, end = self._text[place] == ".", False, place + 1
        while end < stop:
            character = self._text[end]
            if character == "." and not point:
                point = True
            elif character in "eE" and not exponent:
                exponent = True
                if end + 1 < stop and self._text[end + 1] in "+-":
                    end += 1
            elif character not in _DIGITS:
                break
            end += 1
        return end

    # Grammar -----------------------------------------------------------------------------------

    def _peek(self) -> _Token | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _expression(self, precedence: int) -> _Reader:
        node = yield self._operand()
        while (token := self._peek()) is not None and token.kind == "operator":
            own, right = _OPERATORS[token.text]
            if own < precedence:
                break
            self._position += 1
            node = Apply(token.text, (node, (yield self._expression(right))))
        return node

    def _operand(self) -> _Reader:
        token = self._peek()
        if token is None:
            raise self._unexpected()
        self._position += 1
        if token.kind == "number":
            return Constant(_number(token.text))
        if token.kind == "name":
            if token.text in self._definitions:
                return self._definitions[token.text]
            node = Variable(token.text)
            self._places[id(node)] = token.place
            return node
        if token.kind == "(":
            inner = yield self._expression(0)
            self._close()
            return inner
        if token.kind == "function":
            return (yield self._call(token))
        if token.text == "-":
            return Apply("negate", ((yield self._expression(_NEGATION)),))
        self._position -= 1
        raise self._unexpected()

    def _call(self, token: _Token) -> _Reader:
        arguments = [(yield self._expression(0))]
        while (following := self._peek()) is not None and following.kind == ",":
            self._position += 1
            arguments.append((yield self._expression(0)))
        self._close()
        name = token.text[:-1]
        stop = token.place + len(name)
        for known in (self._geometry, self._functions, FUNCTIONS):
            if name in known:
                if len(arguments) != known[name]:
                    raise self._error(
                        f"{name} takes {known[name]} argument{'s' * (known[name] > 1)}, got "
                        f"{len(arguments)}",
                        token.place,
                        stop,
                    )
                if known is self._geometry:
                    return self._geometric(name, arguments, token)
                return Apply(name, tuple(arguments), custom=known is self._functions)
        raise self._error(f"unknown function {name!r}", token.place, stop)

    def _geometric(self, name: str, arguments: list[Node], token: _Token) -> Call:
        labels = []
        for argument in arguments:
            if not isinstance(argument, Variable) or argument.name not in self._labels:
                raise self._error(
                    f"the arguments of {name} must be among {', '.join(sorted(self._labels))}",
                    token.place,
                    token.place + len(name),
                )
            labels.append(argument.name)
        return Call(name, tuple(labels))

    def _close(self) -> None:
        token = self._peek()
        if token is None or token.kind != ")":
            raise self._error("a parenthesis is not closed", *self._here())
        self._position += 1

    def check_names(self, root: Node) -> None:
        """Raise for a variable that is unknown; ``root`` may have been simplified."""
        for node in walk(root):
            if isinstance(node, Variable) and node.name not in self._variables:
                place = self._places[id(node)]
                known = ", ".join(sorted(self._variables)) or "none"
                raise self._error(
                    f"unknown variable {node.name!r}; there are {known}",
                    place,
                    place + len(node.name),
                )

    # Errors ------------------------------------------------------------------------------------

    def _here(self) -> tuple[int, int]:
        token = self._peek()
        if token is None:
            return self._end, self._end
        return token.place, token.place + len(token.text)

    def _unexpected(self) -> InvalidInputError:
        token = self._peek()
        if token is None:
            return self._error("it ends where a value is wanted", *self._here())
        return self._error(f"{token.text!r} cannot stand here", *self._here())

    def _error(self, reason: str, start: int, stop: int) -> InvalidInputError:
        # One line each for the text and the mark below it, whatever space the text holds.
        shown = "".join(" " if c in _SPACE else c for c in self._text)
        mark = " " * start + "^" * max(stop - start, 1)
        return InvalidInputError(f"{self._where}: {reason}\n    {shown}\n    {mark}")


def _read(reader: _Reader) -> Node:
    """Run a reader and those within it, however deep they are nested."""
    stack = [reader]
    node: Node | None = None
    while stack:
        try:
            # A generator that has not started yet takes nothing but None.
            stack.append(next(stack[-1]) if node is None else stack[-1].send(node))
            node = None
        except StopIteration as finished:
            node = finished.value
            stack.pop()
    assert node is not None
    return node


def _number(text: str) -> float:
    """What a C++ stream makes of a number."""
    mantissa, exponential, exponent = text.lower().partition("e")
    # It stops at a point in the exponent.
    text = mantissa + exponential + exponent.partition(".")[0]
    try:
        return min(float(text), sys.float_info.max)
    except ValueError:
        # "1e" and "." are zero to it.
        return 0.0


def walk(root: Node) -> list[Node]:
    """Every node of a tree once, after its arguments."""
    found: dict[int, Node] = {}
    stack: list[Node] = [root]
    while stack:
        node = stack[-1]
        missing: list[Node] = []
        if isinstance(node, Apply):
            missing = [a for a in reversed(node.arguments) if id(a) not in found]
        if missing and id(node) not in found:
            stack += missing
        else:
            found.setdefault(id(node), node)
            stack.pop()
    return list(found.values())
