"""Device descriptions: the table, the probe, and the time model by hand."""

import types

import pytest
import torch

from resnet_fused.plan import devices
from resnet_fused.plan.devices import BANDWIDTH_SHARE, COMPUTE_SHARE, CPU_CORE, DEVICES, Device, Operation, predict

CUDA = torch.device("cuda", 0)

#: Clocks (MHz) and bus widths (bits) as drivers report them.
CLOCKS = {
    "a100": (1410, 1593, 5120),
    "h100": (1980, 2619, 5120),
    "h200": (1980, 3201, 6144),
    "b200": (1965, 3996, 7680),
    "rtx4090": (2520, 10501, 384),
}


def properties(entry, **changes):
    """What the driver says of an entry of the table."""
    known, (clock, memory, wires) = DEVICES[entry], CLOCKS[entry]
    told = {"name": known.reported, "multi_processor_count": known.sms, "L2_cache_size": known.l2}
    told |= {"major": known.capability[0], "minor": known.capability[1], "clock_rate": clock * 1000}
    return types.SimpleNamespace(**(told | {"memory_clock_rate": memory * 1000, "memory_bus_width": wires} | changes))


@pytest.fixture
def gpu(monkeypatch):
    """Makes `of` and `probe` find the given properties on a machine without a GPU."""

    def put(told):
        devices._gpus.clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: told.name)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    yield put
    devices._gpus.clear()


def test_find():
    assert devices.find("h100") is DEVICES["h100"]
    assert devices.find("RTX 4090") is devices.find("rtx-4090") is DEVICES["rtx4090"]
    with pytest.raises(
        ValueError, match="unknown device 'v100'; pass one of 'a100', 'h100', 'h200', 'b200', 'rtx4090'"
    ):
        devices.find("v100")


@pytest.mark.parametrize("name", DEVICES)
def test_entries_are_dense_rates(name):
    """Half is twice TF32 and no more than what the tensor cores' clocks allow; sparse figures would be twice that."""
    known = DEVICES[name]
    assert 1.9 <= known.half / known.tf32 <= 2.1
    assert known.single <= known.tf32
    per_clock = known.half / known.sms / (CLOCKS[name][0] * 1e6)
    assert per_clock <= devices.PER_CLOCK[known.capability][0] * 1.02


@pytest.mark.parametrize("name", DEVICES)
def test_probe_comes_to_the_table(gpu, name):
    gpu(properties(name))
    found, known = devices.probe(CUDA), DEVICES[name]
    assert found.bandwidth == pytest.approx(known.bandwidth, rel=0.03)
    assert found.half == pytest.approx(known.half, rel=0.15)
    assert found.tf32 == pytest.approx(known.tf32, rel=0.15)
    assert found.single == pytest.approx(known.single, rel=0.15)
    assert (found.l2, found.sms, found.capability) == (known.l2, known.sms, known.capability)


def test_probe_without_clocks(gpu):
    """As older PyTorch reports: the memory is taken to be as fast per SM as a known board's."""
    told = properties("h100", name="NVIDIA H100 PCIe", multi_processor_count=114)
    del told.clock_rate, told.memory_clock_rate, told.memory_bus_width, told.L2_cache_size
    gpu(told)
    found = devices.probe(CUDA)
    assert found.bandwidth == pytest.approx(3.35e12 * 114 / 132)
    assert 0.5e15 < found.half < 1e15
    assert found.l2 == 0


@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 7), (9, 9), (13, 0)])
def test_probe_of_a_capability_that_nobody_listed(gpu, capability):
    gpu(properties("a100", major=capability[0], minor=capability[1]))
    found = devices.probe(CUDA)
    assert found.capability == capability
    assert found.half > found.single > 0
    assert found.tf32 >= found.single


def test_of(gpu):
    gpu(properties("h200"))
    assert devices.of(CUDA) is devices.of(torch.device("cuda")) is DEVICES["h200"]
    gpu(properties("h100", name="NVIDIA H100 PCIe", multi_processor_count=114))
    assert devices.of(CUDA).name == "NVIDIA H100 PCIe"
    assert devices.of(CUDA) is devices.of(CUDA)  # asked once
    assert devices.of(torch.device("cpu")) is CPU_CORE


def test_a_graph_that_is_traced_first_gets_the_device_that_is_there(gpu, monkeypatch):
    """Nothing ran before; and a second GPU, asked in the same graph, is another one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu(properties("a100"))
    names = {0: DEVICES["a100"].reported, 1: DEVICES["b200"].reported}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])

    def sms(x):
        return x + devices.of(torch.device("cuda", 0)).sms + 1000 * devices.of(torch.device("cuda", 1)).sms

    torch.compiler.reset()
    traced = torch.compile(sms, backend="eager", fullgraph=True)
    assert traced(torch.zeros(())) == 108 + 148_000


def test_peak(monkeypatch):
    known = DEVICES["a100"]
    assert known.peak(torch.bfloat16) == known.peak(torch.float16) == 312e12
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert known.peak(torch.float32) == 156e12
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert known.peak(torch.float32) == known.peak(torch.float64) == 19.5e12


def test_predict():
    device = Device("even", bandwidth=1e12, half=100e12, tf32=50e12, single=10e12, overhead=1e-6)
    moving = Operation("add", 850_000_000, 10**9, torch.bfloat16)
    computing = Operation("conv", 10**6, 6 * 10**11, torch.bfloat16, launches=2)
    assert predict([moving], device) == pytest.approx(1e-3 + 1e-6)
    assert predict([computing], device) == pytest.approx(1e-2 + 2e-6)
    assert predict([moving, computing], device) == pytest.approx(11e-3 + 3e-6)
    assert predict([], device) == 0
    assert (BANDWIDTH_SHARE, COMPUTE_SHARE) == (0.85, 0.60)


def test_expect_is_a_range_with_the_hosts_part():
    device = Device("even", bandwidth=1e12, half=100e12, tf32=50e12, single=10e12, overhead=0.0)
    long, short = Operation("add", 850_000_000, 0, torch.bfloat16), Operation("add", 850, 0, torch.bfloat16, launches=3)
    found = devices.expect(iter([long]), device, "stock")
    assert (found.low, found.high) == pytest.approx((1e-3, 1e-3 / devices.SURE_SHARE))
    assert found.host == devices.HOST_SECONDS["stock"]
    for side, each in devices.HOST_SECONDS.items():
        found = devices.expect([short], device, side)
        assert found.low == pytest.approx(1e-9) and found.high == found.host == pytest.approx(3 * each)
    assert devices.HOST_SECONDS["compiled"] < devices.HOST_SECONDS["stock"] < devices.HOST_SECONDS["fused"]


def test_a_cpu_core_reaches_what_was_measured():
    assert predict([Operation("add", 7 * 10**9, 0, torch.float32)], CPU_CORE) == pytest.approx(1)
    assert predict([Operation("conv", 0, 85 * 10**9, torch.bfloat16)], CPU_CORE) == pytest.approx(1)
