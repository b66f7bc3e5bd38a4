"""Cases of fold_in. The law: the reference's keys bit for bit, for a key alone as in its batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.philox.streams import KEYS, keys_of
from mmgen_kernels.philox import reference

INTEGERS = (0, 1, 3, 1000, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63))


def folded(key: torch.Tensor, i: torch.Tensor) -> Callable:
    def prepare(device: torch.device, dtypes) -> Callable[[], Outcome]:
        batch = torch.broadcast_shapes(key.shape[:-1], i.shape)
        truth = reference.fold_in(key.expand(*batch, 2), i.expand(batch))
        on_device = key.to(device), i.to(device)

        def judge() -> Outcome:
            result = mk.fold_in(*on_device)
            if result.dtype != torch.int64 or result.shape != truth.shape:
                return Outcome(float("inf"), True, (f"got {result.dtype} {tuple(result.shape)}",))
            wrong = int((result.cpu() != truth).sum())
            failures = [f"{wrong} words differ from the reference"] if wrong else []
            if i.dim() == 0 and not torch.equal(mk.fold_in(on_device[0], int(i)), result):
                failures.append("an int differs from a tensor")
            if key.dim() == 1 and i.dim() == 1 and len(i) and not torch.equal(mk.fold_in(on_device[0], int(i[-1])), result[-1]):
                failures.append("one integer alone differs from the same integer in the batch")
            return Outcome(wrong / max(1, truth.numel()), torch.equal(mk.fold_in(*on_device), result), tuple(failures))

        return judge

    return prepare


def case(name: str, key: torch.Tensor, i: torch.Tensor, quick: bool = False) -> Case:
    return Case("philox", "fold_in", name, ((torch.int64,),), folded(key, i), quick)


MANY = torch.tensor(INTEGERS)
CASES = [
    *[case(f"key_{name}", torch.tensor(values), MANY, quick=True) for name, values in KEYS.items()],
    *[case(f"by_{i}", keys_of(()), torch.tensor(i)) for i in INTEGERS],
    case("batch_by_one", keys_of((5,)), torch.tensor(3)),
    case("batch_by_batch", keys_of((5,)), torch.arange(5)),
    case("outer", keys_of((4, 1)), torch.arange(3)),
    case("strided", keys_of((4, 3)).transpose(0, 1), torch.arange(12).view(4, 3).t()),
    case("no_keys", keys_of((0,)), torch.tensor(3)),
    case("more_than_a_program", keys_of(()), torch.arange(1500)),
]
