"""``d2obench gate init``: a suite that fits this machine, and a workflow, for a repository that is gated."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from d2obench import __version__
from d2obench.errors import UsageError

Ci = Annotated[
    str, typer.Option("--ci", metavar="SERVICE", help="Write the workflow of this service: github, gitlab or none.")
]
Action = Annotated[
    str,
    typer.Option(
        metavar="OWNER/REPOSITORY",
        show_default=False,
        help="With --ci github, take the actions of this repository, at the tag of this version: --action me/d2obench. "
        "There is no default.",
    ),
]
Package = Annotated[
    str, typer.Option(metavar="REQUIREMENT", help="With --ci gitlab, let the job install this with pip.")
]
Policy = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        show_default=False,
        help="Measure these policies beside full and streaming: --policy strided,h2o. By default, those that the "
        "pyproject.toml here offers, or else d2o.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        show_default=False,
        help="Measure this model: --model Qwen/Qwen2.5-0.5B. By default, speed is measured on shape:tiny and fidelity "
        "on embedded.",
    ),
]
Device = Annotated[str, typer.Option(help="Measure on this device: --device cuda.")]
Seconds = Annotated[float, typer.Option(min=1.0, help="Measure the noise of this machine for so many seconds.")]
Folder = Annotated[Path, typer.Option("--folder", metavar="FOLDER", help="Write into this folder: the repository.")]


def init(
    ci: Ci = "github",
    action: Action = "",
    package: Package = f"d2obench=={__version__}",
    policy: Policy = "",
    model: Model = "",
    device: Device = "cpu",
    seconds: Seconds = 20.0,
    folder: Folder = Path(),
) -> None:
    """Write a suite, gate.toml, that fits the noise of this machine, and a workflow for CI; say what they will detect.

    Run it on the kind of machine that will run the gate. Files that you changed are left alone.

    Example: d2obench gate init --action me/d2obench
    """
    from d2obench.gate.setup import SUITE, policies_of, size_for, suite_text, workflow_files, write_files
    from d2obench.measure.checkup import measure_noise
    from d2obench.models import pick_device
    from d2obench.suite.grammar import split_list

    services = get_args(Literal["github", "gitlab", "none"])
    if ci not in services:
        raise UsageError(f"there is no workflow for '{ci}'", remedy=f"use one of {', '.join(services)}")
    workflow = workflow_files(ci, action, package)  # type: ignore[arg-type]
    policies = split_list(policy) if policy else policies_of(folder) or ["d2o"]
    typer.echo(f"measuring the noise of this machine for {seconds:g} s", err=True)
    size = size_for(measure_noise(pick_device(device), seconds).detectable)
    said = write_files(folder, {SUITE: suite_text(size, policies, model, device), **workflow})
    for line in said:
        typer.echo(line)
    took = _time_of(size.looks, 2 + len(policies), model or "shape:tiny", device)
    what = "the ratio to full" if size.noisy else "TPOT"
    whose = "a suite for this machine would detect" if "left alone" in said[0] else "on this machine"
    typer.echo(f"{whose}: +{size.detects:.0%} in {what} with {size.looks[-1]} rounds, about {took:.0f} s")
    if size.noisy:
        typer.echo(
            "this machine is too noisy to tell 10 % in times of its own: the suite judges ratios to a policy that is "
            "measured in the same rounds, and everything that can be counted"
        )
    typer.echo(f"try it: d2obench gate --suite {SUITE} --base HEAD")


def _time_of(looks: tuple[int, ...], cells: int, model: str, device: str) -> float:
    """Roughly how many seconds a gate takes that needs all looks: both sides start for each look, and measure every
    cell in every round."""
    from d2obench.run.worker_client import WorkerClient

    axes = {
        "task": "speed", "model": model, "dtype": "float32", "device": device, "policy": "full", "budget": None,
        "shape": "128+32", "batch": 2, "seed": 0,
    }  # fmt: skip
    request = {"axes": axes, "batch": 2, "sampled": None}
    since = time.monotonic()
    with WorkerClient(threads=1) as client:
        client.call("measure", request)
        start = time.monotonic() - since
        client.call("measure", request)
        one = time.monotonic() - since - start
    return len(looks) * start + 2 * cells * looks[-1] * one
