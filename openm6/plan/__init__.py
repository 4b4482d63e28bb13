"""What a run needs before it runs: bytes, layout, time, energy and cost, and dry runs that measure them."""
