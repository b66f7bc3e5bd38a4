"""Which operators run."""

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero")  # what brings a value to the host


class Called(TorchDispatchMode):
    """The overloads that are called inside the `with`, in their order."""

    def __init__(self):
        super().__init__()
        self.overloads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.overloads.append(func)
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return [overload.overloadpacket.__name__ for overload in self.overloads]

    @property
    def reads(self):
        return [name for name in self.names if name in READS]

    @property
    def ours(self):
        return [overload for overload in self.overloads if overload.namespace == "mmgen_kernels"]
