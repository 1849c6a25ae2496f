"""Settings as dataclasses. Each setting is declared once.

The declaration is the source for reading files (`build`), checks (`check`), the HTTP description
(`schema`) and the nodes' widgets (nodes/distill.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting, besides its name, type and default.

    Attributes:
        help: its meaning, for users: the node's tooltip and the description over HTTP.
        least, most: inclusive bounds; above: an exclusive lower bound. For a list they hold for
            each item.
        multiple: the value must be a multiple of this.
        choices: the texts that are allowed. pattern: a regular expression that a text must match.
        expected: how an error describes the allowed values, if the limits above are not enough.
        is_path: whether it names a file, whose name may contain bytes that are not UTF-8.
        widget: arguments for the node's widget, such as a narrower range.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    multiple: int | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    expected: str = ""
    is_path: bool = False
    widget: Mapping[str, Any] = field(default_factory=dict)

    def allows(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(self.allows(item) for item in value)
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.multiple is None or value % self.multiple == 0)
            and (not self.choices or value in self.choices)
            and (not self.pattern or re.fullmatch(self.pattern, value) is not None)
        )

    def require(self, is_met: bool, name: str, value: Any) -> None:
        """Raises ValueError unless the condition is met."""
        if not is_met:
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{name} must be {self.expected or self._limits()}, found {shown!r}.")

    def _limits(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        limits = []
        if self.least is not None and self.most is not None:
            limits.append(f"from {self.least:g} to {self.most:g}")
        elif self.least is not None:
            limits.append(f"at least {self.least:g}")
        elif self.above is not None:
            limits.append(f"above {self.above:g}")
        if self.most is not None and self.least is None:
            limits.append(f"at most {self.most:g}")
        if self.multiple is not None:
            limits.append(f"a multiple of {self.multiple}")
        return " and ".join(limits)


class Declared(NamedTuple):
    """One field of a dataclass of settings; `default` is MISSING if a value is required."""

    type: Any
    default: Any
    setting: Setting


def setting(
    help: str, default: Any = MISSING, factory: Callable[[], Any] | None = None, **limits: Any
) -> Any:
    """A dataclass field that is a setting; the keywords are Setting's."""
    metadata = {"setting": Setting(help, **limits)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def same(kind: type, name: str, default: Any = None) -> Any:
    """A field with the declaration of another class's field. `default` may replace its default."""
    original = declared(kind)[name]
    value = original.default if default is None else default
    return field(default=value, metadata={"setting": original.setting})


def declared(kind: type) -> dict[str, Declared]:
    """The settings of a dataclass by name, in its order."""
    hints = get_type_hints(kind)
    return {
        item.name: Declared(
            hints[item.name],
            item.default if item.default_factory is MISSING else item.default_factory(),
            item.metadata["setting"],
        )
        for item in fields(kind)
    }


def shared(settings: Any, kind: type) -> dict[str, Any]:
    """The values of the fields that `same` copied from `kind`, by name."""
    originals = {name: item.setting for name, item in declared(kind).items()}
    items = declared(type(settings)).items()
    return {
        name: getattr(settings, name) for name, item in items if item.setting is originals.get(name)
    }


def check(settings: Any, prefix: str = "") -> None:
    """Raises ValueError for the first field whose value is not allowed.

    Args:
        prefix: what to write before its name.
    """
    for name, item in declared(type(settings)).items():
        value = getattr(settings, name)
        item.setting.require(item.setting.allows(value), f"{prefix}{name}", value)


def build(kind: type[T], content: Any, where: str) -> T:
    """A dataclass of settings from parsed JSON.

    Raises ValueError for a setting that is missing, unknown or of another type, and as `kind` does.

    Args:
        where: the name of the file or request, for errors.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a JSON object, found {type(content).__name__}.")
    settings = declared(kind)
    if unknown := sorted(content.keys() - settings.keys()):
        raise ValueError(f"{where} has unknown settings: {', '.join(unknown)}.")
    required = {name for name, item in settings.items() if item.default is MISSING}
    if missing := sorted(required - content.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    return kind(
        **{
            name: _cast(settings[name].type, value, name, settings[name].setting.is_path)
            for name, value in content.items()
        }
    )


def _cast(kind: Any, value: Any, name: str, is_path: bool) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, found {value!r}.")
        return tuple(_cast(get_args(kind)[0], item, name, is_path) for item in value)
    if is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, name)
    if kind is float and type(value) is int:
        value = float(value)
    # `type(...) is`, because isinstance takes True for an int.
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        words = {str: "text", int: "a whole number", float: "a number", bool: "true/false"}
        raise ValueError(f"{name} must be {words[kind]}, found {value!r}.")
    if kind is str and not is_path:
        _require_unicode(value, name)
    return value


def _require_unicode(text: str, name: str) -> None:
    """Raises ValueError for half of a character, which JSON can contain but nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise ValueError(
            f"{name} contains half of a character ({text[error.start]!a}) in line {line}, which is "
            "not valid Unicode. Type the text again."
        ) from None


def schema(kind: type) -> dict[str, Any]:
    """The JSON Schema of a dataclass of settings, for OpenAPI. A field that is a dataclass itself
    refers to a component of that name."""
    settings = declared(kind)
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, item in settings.items() if item.default is MISSING],
        "properties": {name: _schema(item) for name, item in settings.items()},
    }


def _schema(item: Declared) -> dict[str, Any]:
    setting = item.setting
    if is_dataclass(item.type) and isinstance(item.type, type):
        name = f"#/components/schemas/{item.type.__name__}"
        return {"$ref": name, "description": setting.help}
    types = {str: "string", int: "integer", float: "number", bool: "boolean"}
    limits = {
        "minimum": setting.least,
        "maximum": setting.most,
        "exclusiveMinimum": setting.above,
        "multipleOf": setting.multiple,
        "enum": list(setting.choices) or None,
        "pattern": f"^({setting.pattern})$" if setting.pattern else None,
        "default": None if item.default is MISSING else item.default,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    return {"type": types[item.type], "description": setting.help, **given}
