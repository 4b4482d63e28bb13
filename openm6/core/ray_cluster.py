"""The connection to a Ray cluster."""

from __future__ import annotations

from openm6.core.errors import OpenM6Error


def connect(address: str | None, log_to_driver: bool) -> None:
    """Connect this process to the Ray cluster at `address`; None: to that at $RAY_ADDRESS, else to a local one that is
    started. Raises OpenM6Error for a cluster that cannot be reached or refuses the connection."""
    import ray

    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=log_to_driver)
    except (ConnectionError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = f"The Ray cluster at {address}" if address else "The Ray cluster"
        raise OpenM6Error(f"{where} cannot be used: {reason}") from None
