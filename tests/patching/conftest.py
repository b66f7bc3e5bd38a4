import pytest

from mmgen_kernels.patching.diffusers_blocks import BlockForward


@pytest.fixture(autouse=True)
def _few_tokens_are_served(monkeypatch):
    """As many are: the tests' blocks are small."""
    monkeypatch.setattr(BlockForward, "fewest", 0)
