"""How the house's source becomes Markdown, rewritten before mkdocstrings renders it.

Sphinx roles turn into links, ``Example:`` into a section of examples, and the options of a backend, which are declared
as ``Annotated[type, Field(description=…)]``, into attributes with that type and that description.
"""

import ast
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|mod):`([\w.]+)`")


class HouseStyle(griffe.Extension):
    """Called with each object once, when it has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _ROLE.sub(_link, text)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        kind, description = _annotated(attr.annotation)
        if description is not None and attr.docstring is None:
            attr.annotation = kind
            attr.docstring = griffe.Docstring(description, parent=attr)


def _link(match: re.Match[str]) -> str:
    """A link where the name is documented, the name alone where it is not."""
    name = match.group(1)
    target = name if "." in name else f"hyperopt_implicit.{name}"
    return f'<autoref optional identifier="{target}"><code>{name.rpartition(".")[2]}</code></autoref>'


def _annotated(annotation: Any) -> tuple[Any, str | None]:
    """The type in ``Annotated[type, Field(description=…)]``, without further annotations, and the description."""
    if isinstance(annotation, griffe.ExprBinOp):
        left, right = _annotated(annotation.left)[0], _annotated(annotation.right)[0]
        return griffe.ExprBinOp(left, annotation.operator, right), None
    if not isinstance(annotation, griffe.ExprSubscript) or str(annotation.left) != "Annotated":
        return annotation, None
    assert isinstance(annotation.slice, griffe.ExprTuple)
    kind, *fields = annotation.slice.elements
    descriptions = [
        ast.literal_eval(str(argument.value))
        for field in fields
        if isinstance(field, griffe.ExprCall)
        for argument in field.arguments
        if isinstance(argument, griffe.ExprKeyword) and argument.name == "description"
    ]
    return _annotated(kind)[0], next(iter(descriptions), None)
