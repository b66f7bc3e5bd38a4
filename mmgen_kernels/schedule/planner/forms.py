"""Linear forms in the columns of a row, so that a scheduler's file reads as its paper does."""

from __future__ import annotations

from mmgen_kernels.schedule.planner.floats import div


class Form:
    """sum of coefficient * column. A column that is not named has no term, so that no infinite factor turns it into NaN."""

    def __init__(self, terms: dict[str, float]) -> None:
        self.terms = terms

    def __add__(self, other: Form) -> Form:
        terms = dict(self.terms)
        for name, c in other.terms.items():
            terms[name] = terms[name] + c if name in terms else c
        return Form(terms)

    def __sub__(self, other: Form) -> Form:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Form:
        return Form({name: factor * c for name, c in self.terms.items()})

    def __truediv__(self, divisor: float) -> Form:
        return Form({name: div(c, divisor) for name, c in self.terms.items()})

    def replace(self, column: str, by: Form) -> Form:
        """This form with `by` in the place of `column`."""
        rest = Form({name: c for name, c in self.terms.items() if name != column})
        return rest + self.terms[column] * by if column in self.terms else rest


def column(name: str) -> Form:
    return Form({name: 1.0})


SAMPLE, MODEL_OUTPUT, DERIVED, NOISE = column("sample"), column("model_output"), column("derived"), column("noise")


def matrix(inputs: tuple[str, ...], derived: Form, *outputs: Form) -> list[list[float]]:
    """A row of the table: (1 + len(outputs), len(inputs) + 2)."""
    columns = (*inputs, "derived", "noise")
    return [[form.terms.get(name, 0.0) for name in columns] for form in (derived, *outputs)]
