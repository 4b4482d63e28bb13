"""Accelerators known to the planner. PyTorch is not imported here: the command line checks the names before that."""

from dataclasses import dataclass

from openm6.core.errors import UsageError, suggest


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator and its part of its host.

    memory, host_memory         GiB
    peak                        dense FLOP/s of matrix products in 16 bits (V100: fp16; cpu: fp32)
    bandwidth                   bytes/s of its memory
    host_bandwidth              bytes/s of the host's memory, its share
    link, network, host_link    bytes/s one way to its neighbours in the host, to other hosts, to the host's memory
    per_host                    accelerators per host
    power                       W, board power of the data sheet: an upper bound of the accelerator alone
    price                       $ per hour
    """

    memory: float
    peak: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    host_bandwidth: float
    host_memory: float
    per_host: int
    power: float
    price: float


# Memory, peak, bandwidth, NVLink (half of the figure for both ways), PCIe and power: NVIDIA's data sheets of the SXM
# forms of "V100" (2020), "A100" (2021), "H100" (2023), "H200" (2024). Hosts and networks: the guides of DGX-2 (1.5 TB
# of memory and 8 x 100 Gb/s for 16), DGX A100 (1 or 2 TB, 8 x 200 Gb/s for 8), DGX H100 and H200 (2 TB, 8 x 400 Gb/s
# for 8); host bandwidth is that of their processors' memory channels, divided among the accelerators. Usable PCIe
# rates are four fifths of the nominal ones. Prices are about those of Amazon EC2 on demand in 2025 (p3, p4d, p4de, p5,
# p5en, an eighth of a host); capacity reserved by the day was offered for 45% to 70% of that (A100 $1.84, H100 $4.92,
# H200 $5.41, EC2 Capacity Blocks, end of 2024). "cpu" is a small server's two cores, by measurement.
HARDWARE = {
    "v100-32g": Hardware(32, 125e12, 0.9e12, 150e9, 6.25e9, 12.5e9, 16e9, 96, 16, 300, 3.06),
    "a100-40g": Hardware(40, 312e12, 1.555e12, 300e9, 25e9, 25e9, 51e9, 128, 8, 400, 4.10),
    "a100-80g": Hardware(80, 312e12, 2.039e12, 300e9, 25e9, 25e9, 51e9, 256, 8, 400, 5.12),
    "h100": Hardware(80, 989e12, 3.35e12, 450e9, 50e9, 50e9, 76e9, 256, 8, 700, 6.88),
    "h200": Hardware(141, 989e12, 4.8e12, 450e9, 50e9, 50e9, 76e9, 256, 8, 700, 7.90),
    "cpu": Hardware(8, 0.17e12, 20e9, 5e9, 1e9, 20e9, 20e9, 0, 1, 30, 0.05),
}


def hardware(name: str) -> Hardware:
    if name not in HARDWARE:
        known = tuple(HARDWARE)
        raise UsageError(f'There is no hardware "{name}".{suggest(name, known)} Known: {", ".join(known)}.')
    return HARDWARE[name]
