"""Strike a run until it ends."""

from __future__ import annotations

import subprocess
import time

from resnet_dist.errors import UNSENT_EXIT_CODE
from tests.benchmarks.soak.faults import FAULTS, OUTAGE_SECONDS, Strike, planned
from tests.benchmarks.soak.scene import LOG, Soak

BEGIN_SECONDS = 600.0  # until the first steps
MAX_SUBMISSIONS = 60
END_SECONDS = 1800.0  # for the run to end after the last fault


def strike_until_the_end(soak: Soak, seed: int, seconds: float) -> None:
    """Submit, strike for `seconds`, and wait for the end of the run; submit again what ends before."""
    soak.submit()
    soak.scene.client.wait_for("\nstep 4/", BEGIN_SECONDS, log=LOG)
    begin = at = time.monotonic()
    for coming in planned(seed, len(soak.scene.nodes)):
        at += coming.pause
        if at - begin > seconds:
            break
        if is_finished(soak, at):
            return
        strike(soak, coming)
        at = max(at, time.monotonic() - OUTAGE_SECONDS)  # A longer one delays those after it.
    print(f"{time.strftime('%H:%M:%S')} no more faults", flush=True)
    assert is_finished(soak, time.monotonic() + END_SECONDS), "the run does not end"


def is_finished(soak: Soak, until: float) -> bool:
    """Wait; report whether the run has ended for good before the time `until`."""
    while True:
        assert soak.process is not None
        try:
            code = soak.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        soak.codes.append(code)
        print(f"{time.strftime('%H:%M:%S')} submission {len(soak.codes)} ended with {code}", flush=True)
        if code in (0, UNSENT_EXIT_CODE):
            return True
        assert len(soak.codes) < MAX_SUBMISSIONS, soak.scene.client.output(LOG)[-3000:]
        soak.submit()


def strike(soak: Soak, coming: Strike) -> None:
    note, struck = "", (coming.fault, time.time())
    soak.struck.append(struck)
    try:
        FAULTS[coming.fault](soak, coming.node)
    except AssertionError as error:  # What it would have struck was just being started again.
        soak.struck.remove(struck)
        note = f", not struck: {str(error).splitlines()[0]}"
    print(f"{time.strftime('%H:%M:%S')} {coming.fault} (node {coming.node}){note}", flush=True)
