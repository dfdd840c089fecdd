"""Peak FLOP/s of devices: by the datasheets' table, or measured where it has no such kind."""

import contextlib
import types

import jax
import jax.numpy as jnp
import pytest

from fusion_jax.devices import gpus, peaks, tpus


def on(monkeypatch, kind, count=1):
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(device_kind=kind, platform="gpu")] * count)
    monkeypatch.setattr(jax, "device_count", lambda *_: count)
    return peaks.peak.__wrapped__


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5e", 197e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 2307e12 / 2),  # a chip is two devices
        ("TPU v7x", 2307e12 / 2),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_peak_of_known_devices(monkeypatch, kind, expected):
    assert on(monkeypatch, kind)(jnp.bfloat16) == expected
    assert on(monkeypatch, kind, 8)(jnp.bfloat16) == 8 * expected


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H1000", "NVIDIA L400", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "TPU v55"])
def test_a_kind_that_merely_begins_like_a_known_one_is_not_that(kind):
    assert peaks.datasheet_peak(kind) is None


def test_peak_of_unknown_devices_is_measured_on_one_and_counted_for_all(monkeypatch):
    assert 1e9 < peaks.measured_rate(jax.devices()[0], jnp.float32) < 1e15
    monkeypatch.setattr(peaks, "measured_rate", lambda device, dtype: 3e12)
    assert on(monkeypatch, "a new kind", 4)(jnp.float32) == 12e12


class _Clock:
    """A device on which a product of size n takes `launch` + 2 n^3 / `rate` seconds, and never computes."""

    def __init__(self, monkeypatch, rate, launch, memory=None):
        self.sizes, self.rate, self.launch, self.memory = [], rate, launch, memory
        monkeypatch.setattr(peaks, "_seconds", self._seconds)
        monkeypatch.setattr(peaks.jax, "jit", lambda _: lambda a: types.SimpleNamespace(block_until_ready=lambda: None))
        monkeypatch.setattr(peaks.jnp, "tile", self._tile)
        monkeypatch.setattr(peaks.jax, "default_device", lambda _: contextlib.nullcontext())

    def memory_stats(self):
        return self.memory

    def _tile(self, block, times):
        return jax.ShapeDtypeStruct((len(block) * times[0], len(block) * times[1]), block.dtype)

    def _seconds(self, function, argument):
        self.sizes.append(argument.shape[0])
        return self.launch + 2 * argument.shape[0] ** 3 / self.rate


def test_the_measured_product_is_large_enough_for_the_device(monkeypatch):
    fast = _Clock(monkeypatch, rate=2e15, launch=2e-5)
    assert 0.95 * 2e15 < peaks.measured_rate(fast, jnp.bfloat16) < 2e15 and max(fast.sizes) >= 8192
    slow = _Clock(monkeypatch, rate=5e9, launch=1e-5)  # as large as a second allows
    assert peaks.measured_rate(slow, jnp.float32) > 0.9 * 5e9 and max(slow.sizes) <= 512
    small = _Clock(monkeypatch, rate=2e15, launch=2e-5, memory={"bytes_limit": 3 << 30, "bytes_in_use": 2 << 30})
    peaks.measured_rate(small, jnp.bfloat16)
    assert 2 * 2 * max(small.sizes) ** 2 <= 1 << 30


def test_every_chip_to_plan_for_is_in_the_table():
    """Cards and chips have their peak from the table, by the name that JAX gives the device."""
    known = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
    assert {name: chip.peak for name, chip in tpus.CHIPS.items()} == known
    known = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
    assert {name: card.peak for name, card in gpus.CARDS.items()} == known
