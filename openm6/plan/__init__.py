"""Plans of a run before its start: memory, layout, time, energy and cost, and dry runs that measure them."""
