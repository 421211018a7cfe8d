"""What holds after every generation that went well."""

from parallel.collectives import place
from parallel.world import World


def check_places(world: World) -> None:
    """Called by every rank. Fails where ranks have counted their transfers differently: a job's failure would then end
    a group that could go on."""
    places = world.gather_numbers(place())
    assert len(set(places)) == 1, f"the ranks count their transfers differently: {places}"
