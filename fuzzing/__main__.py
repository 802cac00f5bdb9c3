"""`scripts/fuzz`: the arguments, the progress and the last line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from .pool import Report, run_pool, save, targets_of
from .target import Target, buffer_of, check_case, draw


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Give odd and damaged input to every public entry. Each outcome is a result or "
        "a documented error; anything else is a fault, is kept, and prints how to repeat it.",
        epilog="Exits with 1 where there is a fault.",
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--only", action="append", metavar="TARGET", help="repeat for more")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--repeat", metavar="TARGET:SEED:INDEX", help="run one case, in the open")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/fuzz"), help="for faults")
    parser.add_argument("--guided", metavar="TARGET", help="with atheris, by what the bytes reach")
    parser.add_argument("--module", default="fuzzing.targets", help=argparse.SUPPRESS)
    return parser.parse_args()


def _plan(targets: Mapping[str, Target], cases: int, only: list[str] | None) -> dict[str, int]:
    """Target -> cases by its share; what division leaves over goes to the first."""
    chosen = {name: targets[name] for name in only or targets}
    shares = sum(target.share for target in chosen.values())
    plan = {name: cases * target.share // shares for name, target in chosen.items()}
    plan[next(iter(plan))] += cases - sum(plan.values())
    return plan


def _repeat(targets: Mapping[str, Target], text: str) -> int:
    name, seed, index = text.split(":")
    for case in draw(targets[name])(buffer_of(name, int(seed), int(index))):
        outcome = check_case(targets[name], case)
        print(f"{outcome.case}\n\n{outcome.kind}: {outcome.detail}")
        return int(outcome.kind == "fault")
    print("these bytes give no case")
    return 0


def _table(report: Report, plan: Mapping[str, int]) -> None:
    print(f"{'target':<12}{'result':>8}{'refused':>9}{'faults':>8}  refused as")
    for name in plan:
        numbers = [report.counts[name, kind] for kind in ("result", "refused", "fault")]
        kinds = sorted(kind for target, kind in report.refusals if target == name)
        print(f"{name:<12}{numbers[0]:>8}{numbers[1]:>9}{numbers[2]:>8}  {', '.join(kinds)}")


def main() -> int:
    """Run the cases; 1 where there is a fault."""
    given = _arguments()
    if given.guided is not None:
        from .guided import run_guided  # before the package is imported: it is instrumented

        run_guided(given.module, given.guided, given.cases, given.seed, given.output)
    targets = targets_of(given.module)
    unknown = sorted({*(given.only or ())} - set(targets))
    if unknown:
        print(f"no target {', '.join(unknown)}; there are {', '.join(targets)}", file=sys.stderr)
        return 2
    if given.repeat is not None:
        return _repeat(targets, given.repeat)
    plan = _plan(targets, given.cases, given.only)
    start = time.monotonic()

    shown = 0

    def progress(report: Report) -> None:
        nonlocal shown
        terminal = sys.stderr.isatty()
        if terminal or report.cases - shown >= given.cases / 20:
            shown, seconds = report.cases, time.monotonic() - start
            end = "\r" if terminal else "\n"
            print(f"{report} of {given.cases} ({seconds:.0f} s)", end=end, file=sys.stderr)

    report = run_pool(given.module, plan, given.seed, given.workers, progress)
    _table(report, plan)
    for name, index, outcome in report.faults:
        kept = save(given.output, targets[name], given.seed, index, outcome)
        lines = outcome.detail.strip().splitlines()
        print(f"FAULT {name}: {lines[-1] if lines else ''}\n  kept in {kept}")
        print(f"  repeat: scripts/fuzz --repeat {name}:{given.seed}:{index}")
    print(f"{time.monotonic() - start:.0f} seconds, seed {given.seed}")
    print(report)
    return int(bool(report.faults) or report.cases < given.cases)


if __name__ == "__main__":
    sys.exit(main())
