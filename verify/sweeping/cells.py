"""The cells of a sweep, and what each stands for."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version

from ...calibrate.allocation import AllocationRequest
from ...convert.bundle.manifest import TOOLKIT
from ...convert.bundle.recipe import Recipe
from ...convert.bundle.recipe_file import to_toml
from ...convert.errors import UserError
from ...quant.affine import DATA_DRIVEN, method_name, stored_method
from .settings import NO_DATA, CalibrationSet, Evaluation, Pattern, Sweep, SweepRecipe, SweepSource

_LIBRARIES = ("ml_dtypes", "mlx", "numba", "numpy", "safetensors", "torch")
_SHOWN = 12  # digits of an identity in the name of a folder
SELF_GENERATED = CalibrationSet("self-generated")


@dataclass(frozen=True)
class Cell:
    """One bundle of a sweep. method: in place of the recipe's, empty for its own. calibration: None without data."""

    source: SweepSource
    recipe: SweepRecipe
    method: str = ""
    calibration: CalibrationSet | None = None

    @property
    def quantized(self) -> Recipe:
        """The recipe with the cell's method; without rules where these are chosen by sensitivities."""
        return self.recipe.recipe.with_method(self.method) if self.method else self.recipe.recipe

    @property
    def request(self) -> AllocationRequest | None:
        """What is asked of an allocation, None for a recipe that has its rules."""
        request = self.recipe.request
        return replace(request, method=self.method) if request and self.method else request

    @property
    def methods(self) -> str:
        """The methods of its rules as they are stored, such as ``gptq``."""
        if self.request:
            return self.request.method
        used = {rule.quantization.method for rule in self.quantized.rules if rule.quantization}
        return "+".join(sorted(used)) or "float"

    @property
    def method_names(self) -> str:
        """The methods of its rules as people call them."""
        return "+".join(map(method_name, self.methods.split("+")))

    @property
    def name(self) -> str:
        """``SOURCE/RECIPE-METHOD-CALIBRATION``, which names its folder."""
        parts = [self.recipe.name, method_name(self.method), self.calibration.name if self.calibration else ""]
        return f"{self.source.name}/{'-'.join(part for part in parts if part)}"

    @property
    def needs_sensitivities(self) -> bool:
        """Whether its recipe is chosen by measurements of the source."""
        return self.request is not None


def cells_of(sweep: Sweep) -> list[Cell]:
    """Return the cells of a sweep, in order and each once; raises UserError if there are none."""
    cells: dict[str, Cell] = {}
    for source in sweep.sources:
        for recipe in sweep.recipes:
            for method in sweep.methods or ("",):
                for cell in _with_data(Cell(source, recipe, _effective(recipe, method)), sweep.calibrations):
                    if not any(_matches(pattern, cell) for pattern in sweep.exclude):
                        cells.setdefault(cell.name, cell)
    for pattern in sweep.include:
        for cell in _included(sweep, pattern):
            cells.setdefault(cell.name, cell)
    if not cells:
        raise UserError("the sweep has no cells: everything is excluded")
    return list(cells.values())


def _effective(recipe: SweepRecipe, method: str) -> str:
    """Return a method, or an empty one where the recipe quantizes nothing or has the method already."""
    if recipe.request:
        return "" if recipe.request.method == method else method
    used = {rule.quantization.method for rule in recipe.recipe.rules if rule.quantization}
    return "" if not used or used == {method} else method


def _with_data(cell: Cell, sets: Iterable[CalibrationSet]) -> list[Cell]:
    """Return a cell for each calibration set, or the cell itself where it needs no data."""
    if not cell.request and not set(cell.methods.split("+")) & set(DATA_DRIVEN):
        return [cell]
    return [replace(cell, calibration=one) for one in tuple(sets) or (SELF_GENERATED,)]


def _matches(pattern: Pattern, cell: Cell) -> bool:
    data = cell.calibration.name if cell.calibration else NO_DATA
    return pattern.matches(cell.source.name, cell.recipe.name, cell.methods, data)


def _included(sweep: Sweep, pattern: Pattern) -> list[Cell]:
    (source,) = (one for one in sweep.sources if one.name.lower() == pattern.source.lower())
    (recipe,) = (one for one in sweep.recipes if one.name.lower() == pattern.recipe.lower())
    method = _effective(recipe, stored_method(pattern.method)) if pattern.method else ""
    cells = _with_data(Cell(source, recipe, method), sweep.calibrations)
    wanted = pattern.calibration.lower()
    chosen = [cell for cell in cells if not wanted or (cell.calibration and cell.calibration.name.lower() == wanted)]
    return chosen or cells


def digest(*decisive: object) -> str:
    """Return the sha256 of values that JSON can hold, and of the versions that compute with them."""
    libraries = {name: version(name) for name in (TOOLKIT, *_LIBRARIES)}
    return hashlib.sha256(json.dumps([libraries, *decisive], sort_keys=True).encode()).hexdigest()


def identity(cell: Cell, source: str, calibration: str | None, evaluation: str) -> str:
    """Return what stands for everything that decides a cell's result, given the same of its inputs."""
    request = cell.request
    asked: list[object] | None = None
    if request:
        budget = request.budget
        asked = [budget.nbytes, budget.bits_per_weight, request.target, request.dtype, request.method]
        asked += [request.depformer_steps, list(request.keep)]
    recipe = cell.quantized
    return digest("cell", source, recipe.name, to_toml(recipe), recipe.original, asked, calibration, evaluation)


def evaluation_identity(evaluation: Evaluation, tokens: str | None) -> str:
    """Return what stands for what cells are verified on. tokens: sha256 of the file."""
    return digest("evaluation", tokens, evaluation.sequences, evaluation.frames, list(evaluation.controls))


def folder_of(name: str, identity: str) -> str:
    """Return where the result of a cell, or work that cells share, is kept: a path with slashes."""
    return f"{name}.{identity[:_SHOWN]}"
