"""What a dry run plans from: the source where it is here, else what is known of its shapes; nothing is written."""

from ...convert import conversion
from ...convert.bundle.plan import Plan, inventory_of_7b, inventory_of_demo, make_plan
from ...convert.bundle.recipe import Recipe
from ...convert.source import adapter as adapters
from ...convert.source import demo, source
from . import console


def planned(where: str, revision: str | None, recipe: Recipe, fill: bool, adapter: str | None, quiet: bool) -> Plan:
    """Return the plan of a dry run, and say on standard error what could not be looked at."""
    location = source.locate_here(where, revision, quiet)
    if location is not None:
        here = None if adapter and adapters.on_hub(adapter) else adapter
        if adapter != here:
            console.say(f"{adapter}: not looked at: a dry run downloads nothing")
        opened, plan = conversion.prepare(location, recipe, fill, adapter=here)
        opened.close()
        return plan
    if adapter:
        console.say(f"{adapter}: not looked at, as the source is not here")
    if where in demo.SIZES:
        console.say(f"{where} was not made yet: planned from its shapes")
        return make_plan(inventory_of_demo(where), recipe)
    console.say(f"{where} is not on this machine: planned from the published layout of {source.DEFAULT}")
    return make_plan(inventory_of_7b(where), recipe)
