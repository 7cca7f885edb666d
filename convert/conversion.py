"""A whole conversion: from the name of a source to a bundle that was read back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..quant.affine import DATA_DRIVEN
from .bundle.build import Conversion, build, check_same
from .bundle.destination import check_output, enter_again, make_parent, make_place, named
from .bundle.manifest import Manifest
from .bundle.plan import Plan, inventory_of_7b, make_plan
from .bundle.quantized_store import LayerwiseQuantizer
from .bundle.recipe import Recipe
from .bundle.recipe_choice import make_recipe
from .errors import UserError
from .hints import Hint
from .preparation import check_request, check_sizes, open_checked, planned
from .source import adapter as adapters
from .source.hub import DiskBudget
from .source.recorded_voice import RecordedVoice
from .source.scan import Fingerprint
from .source.source import DEFAULT, Source, fingerprint, is_hub_id, locate


@dataclass(frozen=True)
class OpenConversion:
    """A conversion whose source is open and was read once; nothing is written yet.

    source: all of it, with the adapter merged. fingerprints: size and sha256 of each of its files. output: the folder
    of the bundle. present: the manifest of the bundle that is there already, None if there is none.
    """

    source: Source
    fingerprints: Mapping[str, Fingerprint]
    output: Path
    present: Manifest | None
    force: bool
    quiet: bool

    def needs_data(self, recipe: Recipe) -> bool:
        """Tell whether a recipe quantizes any tensor by more than its weights."""
        return _needs_data(planned(self.source, recipe)[1])

    def write(
        self,
        recipe: Recipe,
        quantizer: "QuantizerOf | None" = None,
        workers: int | None = None,
        voices: Iterable[RecordedVoice] = (),
    ) -> Conversion:
        """Write the bundle and read it back; resumes from what a killed run left.

        quantizer: for a recipe that quantizes by more than the weights. voices: made from recordings, beside the
        source's. Raises UserError for what the user can correct, CheckFailed if the disk does not give back what was
        written.
        """
        source, plan = planned(self.source.with_voices(voices), recipe)
        needed = _needs_data(plan)
        if needed and quantizer is None:
            raise UserError(f"recipe {recipe.name}: a method that needs calibration tokens, but no quantizer is given")
        if quantizer and not needed:
            raise UserError("calibration tokens and fine-tuning are for the method gptq", Hint.CHOOSE_GPTQ)
        if self.present:
            check_same(self.present, self.output, self.fingerprints, plan.recipe)
        else:
            make_place(plan, self.output, needed)
        done = build(
            source,
            plan,
            self.output,
            force=self.force,
            workers=workers,
            quiet=self.quiet,
            quantizer=quantizer(self, replace(source, voices=self.source.voices), plan) if quantizer else None,
            fingerprints=self.fingerprints,
        )
        enter_again(done.folder)
        return done


# Makes the quantizer of a plan: of the conversion, its source as the recipe takes it, and the plan.
QuantizerOf = Callable[[OpenConversion, Source, Plan], LayerwiseQuantizer]

# Makes the voices that are added to a source's own.
VoicesOf = Callable[[Source], Sequence[RecordedVoice]]


def convert(
    source: str | Path = DEFAULT,
    output: str | Path | None = None,
    recipe: Recipe | str | None = None,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    quantizer: QuantizerOf | None = None,
    voices: VoicesOf | None = None,
    force: bool = False,
    workers: int | None = None,
    quiet: bool = True,
) -> Conversion:
    """Convert a checkpoint into a bundle, and read it back.

    Example::

        done = convert("demo", "my-bundle", make_recipe(bits=4, group_size=64))

    source: a Hub id, a folder, or ``demo``. output: a new folder; SOURCE-TARGET-RECIPE in the working folder if it is
    not given. recipe: a recipe, the name of a shipped one, or of a TOML file; None for the usual one. revision: branch,
    tag or commit of a Hub source. adapter: LoRA to merge. fill_depformer_steps: copy steps 0-7 of a base Moshi to 8-15.
    quantizer: for recipes whose method is ``gptq``, see ``ppx.calibrate.quantizer_for``. voices: more voices, made from
    recordings, see ``ppx.speak.voices_for``. force: replace another bundle, or an unfinished one. workers: threads, one
    for each core for None. quiet: no progress bars.

    Nothing is verified; ``ppx.verify.verify`` does that. A killed conversion resumes when it is called again. Raises
    UserError for what the user can correct, CheckFailed if the disk does not give back what was written.
    """
    chosen = recipe if isinstance(recipe, Recipe) else make_recipe(recipe)
    opened = open_conversion(
        source,
        output,
        chosen,
        revision=revision,
        adapter=adapter,
        fill_depformer_steps=fill_depformer_steps,
        force=force,
        quiet=quiet,
    )
    with opened as conversion:
        return conversion.write(chosen, quantizer, workers, voices(conversion.source) if voices else ())


@contextmanager
def open_conversion(
    source: str | Path,
    output: str | Path | None,
    recipe: Recipe,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    force: bool = False,
    quiet: bool = True,
) -> Iterator[OpenConversion]:
    """Find, open and read the source of a conversion once: ``with open_conversion(...) as conversion``.

    Its steps share that. What can be checked before a download is: the recipe, the adapter, the folder of the bundle,
    the free disk. recipe: what will be written, or its target and dtype without rules where they are chosen later.
    Raises UserError that lists every problem.
    """
    where = str(source)
    check_request(where, revision, recipe)
    folder = output_of(where, output, recipe)
    present = check_output(folder, force)
    if adapter:
        adapters.locate(adapter, quiet)
    check = partial(check_sizes, recipe=recipe, fill_depformer_steps=fill_depformer_steps)
    location = locate(where, revision, quiet, _disk_budget(where, recipe, folder), check)
    with open_checked(location, recipe, fill_depformer_steps, True, quiet, adapter) as opened:
        make_parent(folder)
        fingerprints = fingerprint(opened, quiet)
        if present:
            check_same(present, folder, fingerprints)
        yield OpenConversion(opened, fingerprints, folder, present, force, quiet)


def output_of(source: str, output: str | Path | None, recipe: Recipe) -> Path:
    """Return the folder of a bundle: the one that is given, else one named after source, target and recipe."""
    default = f"{Path(source).resolve().name.replace(':', '-')}-{recipe.target}-{recipe.name}"
    return named(Path(output or default))


def _disk_budget(source: str, recipe: Recipe, output: Path) -> DiskBudget | None:
    """Return what a bundle will take on the disk, for each byte of a source that is still to be downloaded."""
    if not is_hub_id(source):
        return None
    plan = make_plan(inventory_of_7b(DEFAULT), recipe)
    return DiskBudget(output, plan.free_disk / sum(plan.inventory.sizes.values()))


def _needs_data(plan: Plan) -> bool:
    return any(output.quantization and output.quantization.method in DATA_DRIVEN for output in plan.outputs)
