"""`python -m trainer selftest`: every operation, small models, and with ranks the collectives, on this machine."""

import argparse
import json
import tempfile
from pathlib import Path

import mlx.core as mx

import comm
from trainer.agreement import end_on_interrupt
from trainer.machine.facts import machine_facts
from trainer.selftest.across_ranks import rank_checks
from trainer.selftest.models import model_checks
from trainer.selftest.operations import has_reduced_products, operation_checks
from trainer.selftest.outcome import Outcome, outcomes
from trainer.selftest.report import as_json, heading, line_of, summary
from trainer.selftest.speed import speed_checks


def main(arguments: argparse.Namespace) -> int:
    """Check and report; returns 1 where something failed. Under a launcher every rank checks, and rank 0 reports."""
    world = comm.init()
    end_on_interrupt(world)
    if arguments.device:
        mx.set_default_device(getattr(mx, arguments.device))
    speaks = world.rank == 0 and not arguments.json
    facts = machine_facts(world.size, world.backend, {})
    for line in heading(facts) if speaks else ():
        print(line, flush=True)
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        checks = [
            *operation_checks(),
            *speed_checks(),
            *model_checks(Path(folder), has_reduced_products()),
            *rank_checks(world, Path(folder)),
        ]
        for outcome in outcomes(checks):
            if speaks and (not found or found[-1].section != outcome.section):
                print(outcome.section, flush=True)
            if speaks:
                print(line_of(outcome), flush=True)
            found.append(outcome)
    if world.rank == 0:
        print(json.dumps(as_json(facts, found), indent=2) if arguments.json else "\n".join(summary(found)), flush=True)
    return int(not all(outcome.is_passed for outcome in found))
