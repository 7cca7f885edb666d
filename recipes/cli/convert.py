"""ppx-convert: from a PyTorch checkpoint to an MLX bundle."""

from typing import Annotated, Any

import typer

from ...calibrate import allocation, dry_runs, forecast, quantizer, size_budget
from ...convert import conversion, typed_json
from ...convert.bundle import describe, recipe_choice, targets
from ...convert.errors import UserError
from ...convert.source import source
from ...verify import bundle_report
from ...verify.publishing import gate
from . import console, endings, options, publish_options, voice_options

EXAMPLES = f"""\b
Examples:
  ppx-convert --bits 4 --group-size 64
      convert {source.DEFAULT} for {targets.DEFAULT}, 4 bit
  ppx-convert ./my-finetune --recipe moshi-q8 --output my-q8
      convert a local checkpoint for moshi_mlx and personaplex-mlx
  ppx-convert demo --dry-run
      show what would be written, and what it takes
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@endings.reported
def convert(
    where: options.ConvertedSource = source.DEFAULT,
    revision: options.Revision = None,
    output: options.OutputFolder = None,
    recipe: options.RecipeName = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    no_quantize: Annotated[bool, typer.Option("--no-quantize", help="Keep everything float.")] = False,
    target_size: options.TargetSize = None,
    bits_per_weight: options.BitsPerWeight = None,
    target: options.Target = None,
    dtype: options.Dtype = None,
    method: options.Method = None,
    fill_depformer_steps: options.FillDepformerSteps = False,
    depformer_steps: options.DepformerSteps = None,
    adapter: options.Adapter = None,
    tokens: options.CalibrationTokens = None,
    fine_tune: options.FineTune = 0,
    gpus: options.Gpus = 1,
    voices: voice_options.AddedVoices = None,
    consent: voice_options.Consent = None,
    publish_to: publish_options.PublishTo = None,
    private: publish_options.Private = False,
    base_model: publish_options.BaseModel = None,
    verify: options.Verify = True,
    force: Annotated[bool, typer.Option("--force", help="Replace another bundle, or an unfinished one.")] = False,
    jobs: options.Jobs = None,
    plan_only: options.PlanOnly = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Convert a PersonaPlex checkpoint into a folder that an MLX runtime loads.

    Reads the source twice (to check it, to convert it), never loads all of it into memory, reads back what it wrote,
    and leaves a manifest. A killed run resumes when the same command is given again. In the end it compares the
    bundle's predictions with its source's; ppx-verify repeats that, with more options.
    """
    quiet, added = console.quiet(as_json), voice_options.added(voices, consent, plan_only)
    publish_options.check(publish_to, verify, private, base_model, where, adapter)
    console.check_quantization(bits, group_size)
    size = {"--target-size": target_size, "--bits-per-weight": bits_per_weight}
    console.one_of({"--recipe": recipe, "--bits": bits, "--no-quantize": no_quantize, **size})
    budget = size_budget.budget_of(target_size, bits_per_weight)
    request = budget and allocation.request_of(budget, target, dtype, method, depformer_steps)
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "quantize": not no_quantize}
    settings |= {"target": target, "dtype": dtype, "method": method, "depformer_steps": depformer_steps}
    chosen = request.recipe if request else recipe_choice.make_recipe(recipe, **settings)
    which: dict[str, Any] = {"revision": revision, "adapter": adapter, "fill_depformer_steps": fill_depformer_steps}
    console.only_with_gptq((request or chosen).needs_data, tokens=None if request else tokens, refine=fine_tune)
    quantizer.check_needed((request or chosen).needs_data, None if request else tokens, fine_tune, gpus)
    if plan_only:
        if request:
            raise UserError("a dry run measures nothing: run ppx-allocate, and give its recipe as --recipe")
        planned = dry_runs.dry_run(where, chosen, output, tokens=tokens, gpus=gpus, workers=jobs, **which, quiet=quiet)
        console.show_json(planned.to_json()) if as_json else console.show(planned.text)
        return
    by_data, show = quantizer.quantizer_for(tokens, fine_tune, gpus=gpus), console.say if as_json else console.show
    gate.check_token(publish_to) if publish_to else None
    with conversion.open_conversion(where, output, chosen, force=force, **which, quiet=quiet) as opened:
        if request:
            allocated = size_budget.allocate_for(opened, request, tokens)
            show(size_budget.text(allocated))
            chosen = allocated.recipe
        needs_data = fine_tune or (tokens and not request) or opened.needs_data(chosen)
        done = opened.write(chosen, by_data if needs_data else None, jobs, added(opened.source))
        console.show(describe.finished(done.folder, done.manifest, done.files_written)) if not as_json else None
        console.advise("--method", None if as_json else forecast.advice(opened.source, chosen))
        same: dict[str, Any] = {"adapter": adapter, "same_source": True, "keep": not done.files_written, "quiet": quiet}
        report = bundle_report.verify(done.folder, opened.source, **same) if verify else None
    verdict = {"verdict": typed_json.to_json(report.verdict)} if report else {}
    console.show_json(done.to_json() | verdict) if as_json else None
    if report is None:  # a verification writes the card itself
        bundle_report.write_card(done.folder)
    else:
        console.show(bundle_report.text(report, done.folder)) if not as_json else None
        bundle_report.fail_if_failed(report)
    if publish_to:
        how = gate.PublishOptions(private=private, base_model=base_model)
        show(gate.publish(done.folder, publish_to, how, quiet=quiet).line)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-convert")


if __name__ == "__main__":
    main()
