"""What a compiled program sends between devices: the collectives of its text, those in loops once for each turn."""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
ARRAY = r"(\w+)\[([\d,]*)\]"


class Collective(NamedTuple):
    kind: str
    arrays: list[tuple[str, tuple[int, ...]]]  # dtype and shape of each result
    times: int  # how often a step runs it
    op: str  # where it comes from, of the source

    @property
    def bytes(self):
        """Of its results, on one device, over all turns."""
        return self.times * sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)


def collectives(compiled):
    """All that one execution of a compiled function runs."""
    entry, bodies = _computations(compiled.as_text())
    return list(_walk(bodies, entry, 1))


def total(found, *kinds):
    """Bytes of the results of all collectives, or of those of some kinds."""
    return sum(each.bytes for each in found if not kinds or each.kind in kinds)


def _walk(bodies, name, times):
    for line in bodies[name]:
        if match := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
            arrays = [
                (dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in re.findall(ARRAY, match[1])
            ]
            op = re.search(r'op_name="([^"]*)"', line)
            yield Collective(match[2], arrays, times, op[1] if op else "")
        turns = 1
        if " while(" in line:
            turns = int(re.search(r'"known_trip_count":{"n":"(\d+)"}', line)[1])
        for called in re.findall(
            r"(?:calls|body|to_apply|branch_computations|condition)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)", line
        ):
            for each in called.split(", "):
                yield from _walk(bodies, each, times * turns)


def _computations(text):
    """(the entry's name, {name: lines})."""
    bodies, entry, lines = {}, None, []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{$", line):
            lines = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return entry, bodies
