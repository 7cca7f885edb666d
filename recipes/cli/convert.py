"""ppx-convert: from a PyTorch checkpoint to an MLX bundle."""

import json
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ...calibrate import size_budget
from ...calibrate.allocation import AllocationRequest, Budget
from ...convert import conversion
from ...convert.bundle import describe, destination
from ...convert.bundle.plan import Plan, inventory_of_7b, make_plan
from ...convert.bundle.quantized_store import LayerwiseQuantizer
from ...convert.bundle.recipe import Recipe, uniform
from ...convert.bundle.targets import DEFAULT, TARGETS
from ...convert.errors import UserError, printable
from ...convert.parallel import cores
from ...convert.source import adapter as adapters
from ...convert.source import source
from ...convert.source.hub import DiskBudget
from ...convert.source.source import Source
from ...quant.affine import DATA_DRIVEN, DEFAULT_METHOD, QuantizationConfig
from ...verify.options import VerifyOptions
from ...verify.publish import gate
from .. import shipped
from . import allocate, console, dry_plan, reporting
from .choices import DtypeName, MethodName, TargetName

EXAMPLES = f"""\b
Examples:
  ppx-convert --bits 4 --group-size 64
      download {source.DEFAULT}, write a 4-bit bundle for {DEFAULT}
  ppx-convert ./my-finetune --recipe moshi-q8 --output my-q8
      convert a local checkpoint for moshi_mlx and personaplex-mlx
  ppx-convert demo --dry-run
      show what would be written, from a source that needs no download
"""
DEFAULT_RECIPE = "4bit"
DEFAULT_GROUP_SIZE = 64

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@console.reported
def convert(
    where: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hub id, folder with its five files, demo, demo:audio or demo:7b.")
    ] = source.DEFAULT,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder.  [default: SOURCE-TARGET-RECIPE, here]")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"Shipped ({', '.join(shipped.names())}) or a TOML file.  [default: {DEFAULT_RECIPE}]"),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Uniform recipe: 2, 3, 4, 5, 6 or 8.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help=f"Uniform recipe: 32, 64 or 128.  [default: {DEFAULT_GROUP_SIZE}]")
    ] = None,
    no_quantize: Annotated[bool, typer.Option("--no-quantize", help="Keep everything float.")] = False,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The bits that lose least within 5.3GB, say; see ppx-allocate.")
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(min=1, max=32, help="The same, by the bits of the whole model a weight.")
    ] = None,
    target: Annotated[
        TargetName | None, typer.Option(help=f"What will load it.  [default: the recipe's, else {DEFAULT}]")
    ] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of floats, scales and biases.  [default: the recipe's or the target's]")
    ] = None,
    method: Annotated[
        MethodName | None, typer.Option(help=f"Quantizer.  [default: the recipe's, else {DEFAULT_METHOD}]")
    ] = None,
    fill_depformer_steps: Annotated[
        bool, typer.Option("--fill-depformer-steps", help="Copy steps 0-7 of a base Moshi to 8-15.")
    ] = False,
    depformer_steps: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many: 8 are the agent's, the user's are given.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FILE_OR_HUB_ID", help="LoRA of moshi-finetune to merge while converting.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Tokens [N, streams, T] for --method gptq.  [default: the model speaks some itself]"),
    ] = None,
    refine: Annotated[
        int, typer.Option(min=0, metavar="STEPS", help="Tune codes, scales and biases together; 600 are usual.")
    ] = 0,
    publish_to: Annotated[
        str | None,
        typer.Option("--publish", metavar="USER/NAME", help="Upload it when it has passed; see ppx-publish."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --publish: where only you see it.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the bundle with its source at the end.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace another bundle, or a begun one.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Threads.  [default: one a core]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write and download nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; errors go to standard error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convert a PersonaPlex checkpoint into a folder that an MLX runtime loads.

    Reads the source twice (once to check it, once to convert), never holds it in memory, reads back what it wrote,
    and leaves a manifest. A killed run goes on where it stopped when the same command is given again. In the end it
    compares what the bundle predicts with what its source predicts; ppx-verify repeats that, and has more to choose.
    """
    quiet = console.quiet(as_json)
    _check_publishing(publish_to, private, verify)
    named = (None if option is None else str(option) for option in (target, dtype, method))
    budget = size_budget.budget_of(target_size, bits_per_weight)
    chosen = _recipe(recipe, bits, group_size, no_quantize, budget, *named)
    if depformer_steps is not None:
        chosen = replace(chosen, depformer_steps=depformer_steps, original="")
    _check_source(where, revision, chosen)
    default = f"{Path(where).resolve().name.replace(':', '-')}-{chosen.target}-{chosen.name}"
    folder = destination.named(output or Path(default))
    if dry_run:
        if budget:
            raise UserError("a dry run measures nothing: ppx-allocate writes the recipe for a size, and tells its own")
        plan = dry_plan.planned(where, revision, chosen, fill_depformer_steps, adapter, quiet)
        said = describe.summary(plan, jobs or cores()) | {"output": str(folder)}
        console.show(json.dumps(said, indent=1) if as_json else describe.text(plan, jobs or cores()))
        return
    present = destination.check_output(folder, force)
    _check_at_hand(publish_to, adapter, calibration, quiet)
    location = source.locate(where, revision, quiet, _room(where, chosen, folder))
    with ExitStack() as stack:
        if budget:
            wanted = AllocationRequest(
                budget, chosen.target, chosen.dtype, str(method or DEFAULT_METHOD), chosen.depformer_steps
            )
            opened = stack.enter_context(conversion.open_merged(location, adapter, fill_depformer_steps, True, quiet))
            destination.make_parent(folder)
            fingerprints = source.fingerprint(opened, quiet)
            if present:
                conversion.check_same(present, folder, fingerprints)
            allocation = size_budget.beside(opened, fingerprints, wanted, calibration, folder, quiet)
            console.say(size_budget.text(allocation)) if as_json else console.show(size_budget.text(allocation))
            chosen = allocation.recipe
            opened, plan = conversion.planned(opened, chosen)
        else:
            opened, plan = conversion.prepare(location, chosen, fill_depformer_steps, True, quiet, adapter)
            stack.enter_context(opened)
            fingerprints = source.fingerprint(opened, quiet)
        if present:
            conversion.check_same(present, folder, fingerprints, plan.recipe)
        else:
            destination.make_place(plan, folder, _needs_data(plan))
        quantizer = _solver(opened, fingerprints, plan, folder, calibration, refine, budget is not None, quiet)
        done = conversion.convert(
            opened, plan, folder, force=force, workers=jobs, quiet=quiet, quantizer=quantizer, fingerprints=fingerprints
        )
        destination.enter_again(done.folder)
        if not as_json:
            console.show(describe.finished(done.folder, done.manifest, done.files_written))
        found = _verify(opened, done.folder, adapter, quiet) if verify else None
    reporting.leave_card(found, done.folder)
    _say_verdict(done, found, as_json)
    if publish_to:
        published = gate.publish(done.folder, publish_to, gate.PublishOptions(private=private), quiet)
        console.say(published.line) if as_json else console.show(published.line)


def _check_publishing(repository: str | None, private: bool, verify: bool) -> None:
    """Raise UserError for options that contradict each other, or a name that is none."""
    if repository and not verify:
        raise UserError("--publish needs the report of a verification: leave --no-verify out")
    if repository:
        gate.check_name(repository)
    elif private:
        raise UserError("--private says nothing without --publish: give both")


def _check_source(where: str, revision: str | None, recipe: Recipe) -> None:
    """Raise UserError for a revision of what has none, and, before a download, for what the target cannot load."""
    if source.is_hub_id(where):
        conversion.check_recipe(recipe)
    elif revision:
        raise UserError(f"--revision says nothing of {where}, which is not on the Hub: leave it out")


def _check_at_hand(repository: str | None, adapter: str | None, calibration: Path | None, quiet: bool) -> None:
    """Raise UserError for what a long download would be in vain without."""
    if repository:
        gate.check_token(repository)
    if adapter:
        adapters.locate(adapter, quiet)
    if calibration and not calibration.is_file():
        raise UserError(f"{calibration}: no such file: give tokens, or leave --calibration out")


def _needs_data(plan: Plan) -> bool:
    return any(output.quantization and output.quantization.method in DATA_DRIVEN for output in plan.outputs)


def _solver(
    opened: Source,
    fingerprints: size_budget.Fingerprints,
    plan: Plan,
    folder: Path,
    tokens: Path | None,
    steps: int,
    allocation: bool,
    quiet: bool,
) -> LayerwiseQuantizer | None:
    """Return what solves what the plan wants solved; importing PyTorch takes seconds that others need not wait."""
    if not _needs_data(plan):
        if steps or (tokens and not allocation):
            raise UserError("--calibration and --refine are for --method gptq: leave them out, or choose that method")
        return None
    from ...calibrate import dataset

    heard = size_budget.conversations(opened, fingerprints, tokens, folder, quiet)
    found = dataset.quantizer_of(opened, plan, heard, steps, quiet)
    if dataset.is_scarce(found.record, opened):
        console.say("calibration material is scarce: recorded conversations (--calibration) make a better bundle")
    return found


def _room(where: str, recipe: Recipe, output: Path) -> DiskBudget | None:
    """Return what a bundle will take on the disk, for each byte of a source that is still to be downloaded."""
    if not source.is_hub_id(where):
        return None
    plan = make_plan(inventory_of_7b(source.DEFAULT), recipe)
    return DiskBudget(output, plan.free_disk / sum(plan.inventory.sizes.values()))


def _say_verdict(done: conversion.Conversion, found: dict[str, Any] | None, as_json: bool) -> None:
    """Print what came of the verification, or all of it as JSON; raises CheckFailed if the bundle does not pass."""
    if as_json:
        said = {"output": str(done.folder), "files_made": done.files_written, **done.manifest.to_json()}
        console.show(json.dumps(said | ({"verdict": found["verdict"]} if found else {}), indent=1))
    elif found:
        console.show(reporting.text(found, done.folder))
    if found:
        reporting.fail_if_failed(found)


def _verify(opened: Source, folder: Path, adapter: str | None, quiet: bool) -> dict[str, Any]:
    """Verify a bundle that was just made; return the report."""
    identity = opened.location.identity
    merged = ["--adapter", adapters.named(adapter)] if adapter else []
    command = printable(shlex.join(["ppx-verify", folder.resolve().name, "--reference", identity, *merged]))
    return reporting.leave_report(opened, folder, VerifyOptions(), command, quiet, same_source=True)


def _recipe(
    name: str | None,
    bits: int | None,
    group_size: int | None,
    no_quantize: bool,
    budget: Budget | None,
    target: str | None,
    dtype: str | None,
    method: str | None,
) -> Recipe:
    """Return the recipe that the options mean, that of a budget without rules; raises UserError if they contradict."""
    asked = {"--recipe": name, "--bits": bits, "--no-quantize": no_quantize or None, "a size": budget}
    given = [option for option, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} contradict each other: give one of them")
    if group_size is not None and bits is None:
        raise UserError("--group-size says nothing without --bits: give both")
    if no_quantize and method:
        raise UserError("--method says nothing with --no-quantize: leave one out")
    if budget:
        consumer = TARGETS[target or allocate.DEFAULT_TARGET]
        return Recipe(budget.name, consumer.name, dtype or consumer.dtype)
    if bits is not None or no_quantize:
        consumer = TARGETS[target or DEFAULT]
        quantization = (
            None
            if bits is None
            else QuantizationConfig(bits, group_size or DEFAULT_GROUP_SIZE, method or DEFAULT_METHOD)
        )
        if quantization and quantization.problems():
            raise UserError([f"--{problem.replace('_', '-', 1)}" for problem in quantization.problems()])
        return uniform(quantization, consumer.name, dtype or consumer.dtype, consumer.uniform)
    loaded = shipped.load(name or DEFAULT_RECIPE, target)
    loaded = loaded.with_method(method) if method else loaded
    return replace(loaded, dtype=dtype or loaded.dtype)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-convert")


if __name__ == "__main__":
    main()
