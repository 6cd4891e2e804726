"""A plan for TPUs, through the real compiler (libtpu): operations, messages, memory, and a program that does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdiff import cli

CONFIG = """
from mdiff.config import *
config = Config(name="tiny", data=Data(source="digits", size=8, n=20), train=Train(batch=16),
    net=Net({net}), sample=Sample(n=8, batch=8, steps=3))
"""
UNET = "channels=16, mults=(1, 2), blocks=1, attention=(4,)"
DIT = "arch='dit', channels=32, blocks=3, head_channels=16, patch=2, remat='blocks'"


def plan(folder: Path, net: str, *more: str) -> dict:
    (folder / "tiny.py").write_text(CONFIG.format(net=net))
    out = folder / "plan.json"
    line = ["--config", str(folder / "tiny.py"), "--topology", "v5e:2x2", "--out", str(out), *more]
    assert cli.plan(line) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("net", [UNET, DIT], ids=["unet", "dit"])
def test_a_slice_of_v5e(tmp_path, net):
    made = plan(tmp_path, net)
    for name, part in made["parts"].items():
        assert part["counted"]["flops"] == pytest.approx(part["flops"]["analytic"], rel=0.05), name
        assert part["counted"]["unknown_loops"] == 0
        assert part["estimate"]["fits"] and 0 < part["estimate"]["mfu"] < 1
        held = sum(part["holds"].values())
        assert 0.99 * held <= part["memory"]["arguments"], name
    train = made["parts"]["train"]
    reduced = train["counted"]["collectives"]["all-reduce"]
    assert reduced["payload"] == pytest.approx(train["holds"]["parameters"], rel=0.02)
    assert made["parts"]["sweep"]["counted"]["collectives"] == {}


def test_a_program_that_does_not_fit(tmp_path):
    """64 ablations of 65,536 images at once are refused by the compiler; the plan says what to change."""
    made = plan(tmp_path, DIT, "--parts", "sweep", "--sweep.images", "65536", "--sweep.chunk", "64")
    part = made["parts"]["sweep"]
    assert part["estimate"]["fits"] is False
    assert part["first_change"]["flags"].startswith("--sweep.chunk ")


REFUSED = """
from mdiff.errors import UserError
from mdiff.plan import child, chips
try:
    child.devices(chips.Topology("v5e:3x5", "v5e", (3, 5), chips.CHIPS["v5e"]))
except UserError as error:
    print(error)
"""


def test_libtpu_has_the_last_word_on_shapes():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=env, capture_output=True, text=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("--topology v5e:3x5: ") and "v5e:4x4" in line
