"""The docstring of a public name tells all that CONTRIBUTING.md asks for, where it applies."""

import inspect
import re

import pytest

import mmgen_kernels as mk

WITHOUT_NUMBERS = {"backend_report", "use_backend", "schedulers.plan", "schedulers.Plan"}


def public_names():
    for name in mk.__all__:
        thing = getattr(mk, name)
        if inspect.ismodule(thing):
            yield from ((f"{name}.{inner}", getattr(thing, inner)) for inner in thing.__all__)
        else:
            yield name, thing


def sections(doc: str) -> set[str]:
    """The words before a colon at the begin of a line: "Args:", "NaN: ..." and "Raises, NaN:"."""
    heads = re.findall(r"^([A-Z]\w+(?:, [A-Z]\w+)*):", doc, re.MULTILINE)
    return {word for head in heads for word in head.split(", ")}


def asked_for(name: str, thing: object) -> set[str]:
    numbers = set() if name in WITHOUT_NUMBERS else {"NaN"}
    if inspect.isclass(thing):
        is_result = issubclass(thing, (tuple, dict)) or name == "schedulers.Plan"  # its fields are told one by one
        return set() if is_result else {"Raises"} | numbers
    signature = inspect.signature(thing)
    wanted = {"Args", "Raises"} if signature.parameters else set()
    if signature.return_annotation not in (None, "None") and not hasattr(thing, "__wrapped__"):  # nor a context manager
        wanted.add("Returns")
    return wanted | numbers


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*found, id=found[0]) for found in public_names()])
def test_tells_all(name, thing):
    doc = inspect.getdoc(thing)
    assert doc and not doc.startswith(f"{thing.__name__}(")  # which is what a tuple without a docstring says
    assert not asked_for(name, thing) - sections(doc)
