"""Which overloads torch.library.opcheck is asked about."""

import pytest

from mmgen_kernels import backends
from mmgen_kernels.library import OPERATORS


def with_backward(*names):
    return [each for name in names for each in (name, f"{name}_backward")]


def each_overload(names):
    """Parametrizes a test over (name, overload). Launchers that serve no CPU tensors are left out: the interpreter checks them in
    tests of their own."""
    found = {}
    for name in names:
        operator = OPERATORS[name]
        for implementation, overload in operator.overloads.items():
            if implementation not in operator.launchers or not backends.reasons_against(operator, implementation, "cpu"):
                found[str(overload)] = name, overload  # a default may be one of the others
    return pytest.mark.parametrize(("name", "overload"), list(found.values()), ids=str)
