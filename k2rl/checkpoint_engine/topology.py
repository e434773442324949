"""A cluster as links with rates: what the simulator sends a plan over. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from k2rl.config import DeviceConfig

#: What collectives reach of NVLink's nominal rate: about 370 of 450 GB/s in NCCL's own tests on H100.
#: Nominal, the same for every device; all other rates of a device sheet are already those of large transfers.
NVLINK_EFFICIENCY = 0.82

GIGA = 1e9

#: Host and position on it.
Place = tuple[int, int]


@dataclass(frozen=True)
class Topology:
    """`ranks` devices on hosts that are alike; each device has one trainer rank and one receiver.

    One host is simulated, with the load of the most loaded.
    """

    device: DeviceConfig
    ranks: int
    #: Receivers that each planned one stands for: they need as much, of the same owners.
    stands_for: int = 1
    #: Where owners and receivers are, if not in order of their ids.
    owners: Mapping[int, Place] = field(default_factory=dict)
    receivers: Mapping[int, Place] = field(default_factory=dict)

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.device.per_host)

    @property
    def shares_memory(self) -> bool:
        """Whether receivers read the host's memory, rather than device memory filled over NVLink."""
        return self.device.nvlink_gbps == 0

    def owner_place(self, owner: int) -> Place:
        return self.owners.get(owner) or divmod(owner, self.device.per_host)

    def receiver_place(self, receiver: int) -> Place:
        return self.receivers.get(receiver) or divmod(receiver, self.device.per_host)

    def rates(self) -> dict[str, float]:
        """Nominal bytes a second of every link of the simulated host; a name is `kind` or `kind:number`."""
        device = self.device
        rates = {"memory": device.memory_gbps}
        for number in range(device.per_host):
            rates[f"copy_in:{number}"] = device.copy_in_gbps
            rates[f"apply:{number}"] = device.apply_gbps
            if device.switch_gbps:
                rates[f"switch:{number // device.per_switch}"] = device.switch_gbps
            if device.nvlink_gbps:
                rates[f"nvlink:{number}"] = device.nvlink_gbps
                rates[f"network:{number}"] = device.network_gbps / device.per_host
        if self.shares_memory:
            rates["network"] = device.network_gbps
        return {name: rate * GIGA for name, rate in rates.items()}

    def copy_in_links(self, position: int) -> tuple[str, ...]:
        links = ["memory", f"copy_in:{position}"]
        if self.device.switch_gbps:
            links.append(f"switch:{position // self.device.per_switch}")
        return tuple(links)

    def network_links(self, position: int) -> tuple[str, ...]:
        """Into device `position` from another host: its adapter reaches it over the same PCIe link."""
        if self.shares_memory:
            return ("network",)
        return (f"network:{position}", f"copy_in:{position}")

    def apply_links(self, position: int) -> tuple[str, ...]:
        return (f"apply:{position}", "memory") if self.shares_memory else (f"apply:{position}",)

    def relay_latency(self, nbytes: float) -> float:
        """Seconds until the last host has what the first has sent, beyond the time on one link."""
        hops = self.hosts - 1
        piece = self.device.relay_mib * 2**20
        if hops <= 0:
            return 0.0
        step = min(piece or nbytes, nbytes) / (self.device.network_gbps * GIGA)
        return hops * self.device.message_us * 1e-6 + (hops - 1) * step


def effective(rates: Mapping[str, float]) -> dict[str, float]:
    """What transfers reach of nominal rates."""
    return {
        name: rate * (NVLINK_EFFICIENCY if name.startswith("nvlink") else 1.0) for name, rate in rates.items()
    }
