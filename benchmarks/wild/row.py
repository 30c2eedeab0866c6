"""One row of the table: all that was found out about one network, as it is kept in a file."""

import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from drifa_attn import Plan

from .case import Case
from .contract import CONTRACT_CHECKS
from .fingerprint import changes, fingerprint
from .leaves import difference
from .promises import CHECKS
from .trial import BrokenPromiseError, NotAskedError, Trial, said


@dataclass
class Row:
    """What was found out about one network.

    Attributes:
        library, title: of the network.
        sites: the names of the sites of the plan; layouts: how many of them have each layout.
        share: what attention adds, of the weights of the network.
        skipped: what the plan left out, and its notes.
        refused: why there is no plan; empty if there is one.
        broken: by the number of a promise, what does not hold; not_asked: why it could not be asked.
        failed: what went wrong outside the library: the network could not be built or run, or took too long.
        seconds: of one processor.
    """

    library: str
    title: str
    sites: list[str] = field(default_factory=list)
    layouts: str = ""
    share: float = 0.0
    skipped: list[str] = field(default_factory=list)
    refused: str = ""
    broken: dict[str, str] = field(default_factory=dict)
    not_asked: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    seconds: float = 0.0


def examined(case: Case) -> Row:
    """The row of a network: its plan, and the promises if it has one."""
    start = time.process_time()
    row, trial = Row(case.library, case.title), Trial(case)
    try:
        trial.output(case.bare())
        if wrong := difference(trial.output(case.bare()), trial.expected):
            row.failed = f"the bare network is not repeatable: {wrong}"
    except Exception as error:
        row.failed = f"the bare network does not run: {said(error)}"
    if not row.failed and (plan := planned(trial, row)):
        note(plan, row)
        hold(trial, row)
    row.seconds = round(time.process_time() - start, 1)
    return row


def planned(trial: Trial, row: Row) -> Plan | None:
    """The plan, or None and the reason in the row; a network that is refused must be untouched."""
    model = trial.case.bare()
    before = fingerprint(model)
    try:
        return trial.plan(model)
    except (TypeError, ValueError) as error:
        row.refused = str(error).strip()
    except Exception as error:
        row.broken["1"] = f"plan raised {said(error)} ({where(error)})"
    if wrong := changes(before, fingerprint(model)) or difference(trial.output(model), trial.expected):
        row.broken["1"] = f"refused, and yet not untouched: {wrong}"
    return None


def note(plan: Plan, row: Row) -> None:
    """Write the plan into the row."""
    row.sites = [site.name for site in plan.sites]
    found = Counter(f"{site.layout}, prefix {n}" if (n := site.num_prefix_tokens) else site.layout for site in plan.sites)
    row.layouts = "; ".join(f"`{layout}` × {number}" for layout, number in found.items())
    row.share = sum(site.params for site in plan.sites) / max(plan.params, 1)
    row.skipped = [*(f"{name}: {reason}" for name, reason in plan.skipped), *plan.notes]


def hold(trial: Trial, row: Row) -> None:
    """Check every promise, of timm's networks timm's own contract; write down what does not hold or cannot be asked."""
    for number, check in enumerate(CONTRACT_CHECKS if row.library == "timm" else CHECKS, start=1):
        try:
            check(trial)
        except BrokenPromiseError as error:
            row.broken[str(number)] = str(error)
        except NotAskedError as error:
            row.not_asked[str(number)] = str(error)
        except Exception as error:
            row.broken[str(number)] = f"{said(error)} ({where(error)})"


def where(error: BaseException) -> str:
    """The place in the code that raised an error: of the library if it took part, else the last one."""
    frames: list[Any] = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/drifa_attn/" in frame.filename] or frames
    last = own[-1]
    return f"{'/'.join(last.filename.split('/')[-2:])}:{last.lineno}"
