"""Counts the instructions of a Hopper kernel's main loop: before its matrix product, while that runs, after the wait for it.

    TRITON_CACHE_DIR=folder python tests/vq/triton_compile.py '[["sweep", 90, 256, "l2"]]'
    nvdisasm -c folder/*/sweep.cubin | python tools/main_loop.py

What stands before and after is issued while the matrix units idle, unless another block of the multiprocessor keeps them busy.
"""

import json
import re
import sys
from collections import Counter

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z]\w*)(.*?);")
KINDS = {
    "HGMMA": "HGMMA",
    "multiply, add": "FFMA|FMUL|FADD",
    "minimum": "FMNMX",
    "global memory": "LDG|STG|UTMALDG",
    "shared memory": "LDS|STS",
    "barrier": "BAR|SYNCS",
    "shuffle": "SHFL",
    "uniform": "U[A-Z0-9]+|R2UR",
}


def kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), "other")


def main_loop(listing: str) -> list[str]:
    """Names of the smallest loop that multiplies. A jump back without a condition is the way out of a wait, not a loop."""
    names, labels, loops = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.search(line):
            condition, name, operands = found.groups()
            names.append(name + ".DEPBAR" if name == "WARPGROUP" and "DEPBAR" in operands else name)
            target = re.search(r"\.L\w+", operands)
            if name == "BRA" and condition and target and "HGMMA" in names[labels.get(target[0], len(names)) :]:
                loops.append(names[labels[target[0]] :])
    if not loops:
        raise SystemExit("no loop with HGMMA in it")
    return min(loops, key=len)


def counts(listing: str) -> dict[str, dict[str, int]]:
    loop = main_loop(listing)
    begin = loop.index("HGMMA")
    wait = len(loop) - loop[::-1].index("WARPGROUP.DEPBAR")
    parts = {"before": loop[:begin], "product": loop[begin:wait], "after": loop[wait:]}
    return {part: {"all": len(names), **Counter(map(kind, names))} for part, names in parts.items()}


if __name__ == "__main__":
    for part, found in counts(sys.stdin.read()).items():
        print(f"{part:<8}", json.dumps(found))
