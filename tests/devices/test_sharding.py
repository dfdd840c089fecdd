"""Meshes: their sizes and what is refused, equal results on all of them, shardings, and what is communicated."""

import collections
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.fixtures import tiny

from fusion_jax.config import MeshConfig, RunConfig, StageConfig, from_dict
from fusion_jax.devices import sharding
from fusion_jax.errors import UserError
from fusion_jax.training import optim, state

# As in mesh_worker.py.
ROWS, LENGTH, WIDTH = 16, 37, 64


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(2, -1, 2), 8, (2, 2, 2)),
        (MeshConfig(1, 4, -1), 4, (1, 4, 1)),
        (MeshConfig(2, 3, 1), 6, (2, 3, 1)),
    ],
)
def test_the_rest_is_filled_in(config, devices, sizes):
    assert sharding.mesh_sizes(config, devices) == sizes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sharding.mesh_sizes(MeshConfig(3, -1, 1), 8), ("data=3, fsdp=-1", "3 does not divide", "8 device")),
        (lambda: sharding.mesh_sizes(MeshConfig(2, 2, 1), 8), ("needs 4", "there are 8", "-1")),
        (lambda: MeshConfig(-1, -1, 1), ("only one", "data and fsdp")),
        (lambda: MeshConfig(fsdp=0), ("config.mesh.fsdp=0", "at least 1")),
        (
            lambda: from_dict(MeshConfig, {"fsdpp": 2}, "config.mesh"),
            ("config.mesh.fsdpp is not a key", "did you mean fsdp?"),
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert all(word in str(error.value) for word in words), error.value


class _Sizes:
    """Stands for a mesh where only its sizes are used."""

    def __init__(self, data=1, fsdp=1, tensor=1):
        self.shape = {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (_Sizes(tensor=4), ("tensor=4", "vision.heads=2", "llm.kv_heads=2")),
        (_Sizes(fsdp=3), ("fsdp=3", "vision.width=16", "llm.width=16")),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_is_refused(mesh, words):
    with pytest.raises(UserError) as error:
        sharding.check_model(tiny(), mesh)
    assert all(word in str(error.value) for word in words), error.value
    sharding.check_model(tiny(), _Sizes(5, 4, 2))


def test_rows_that_do_not_divide_are_refused():
    sharding.check_rows(24, _Sizes(2, 4), "stage 's'")
    with pytest.raises(UserError, match=r"12 row.* over 8 devices .*data=2 x fsdp=4"):
        sharding.check_rows(12, _Sizes(2, 4), "stage 's'")


@dataclasses.dataclass(frozen=True)
class _Device:
    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "none"


def _mesh(sizes, per_process, order=None):
    order = range(math.prod(sizes)) if order is None else order
    mesh = _Sizes(*sizes)
    mesh.devices = np.array([_Device(i, i // per_process) for i in order], object).reshape(sizes)
    return mesh


@pytest.mark.parametrize(
    ("sizes", "per_process", "order", "expected"),
    [
        ((2, 2, 2), 2, None, [(0,), (1,), (2,), (3,)]),
        ((2, 2, 2), 4, None, [(0, 1), (2, 3)]),
        ((1, 2, 4), 2, None, [(0,), (0,), (1,), (1,)]),  # two processes share a tensor group
        ((1, 1, 8), 4, None, [(0,), (0,)]),
        ((1, 4, 1), 2, [0, 2, 1, 3], [(0, 2), (1, 3)]),  # as on a TPU v5p of several hosts
        ((1, 4, 3), 4, None, [(0, 1), (1, 2), (2, 3)]),  # a shard is on two processes
    ],
)
def test_each_process_feeds_the_shards_that_it_holds(monkeypatch, sizes, per_process, order, expected):
    all_held, rows = [], np.arange(2 * sizes[0] * sizes[1])
    mesh = _mesh(sizes, per_process, order)
    for process in range(len(expected)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        all_held.append(sharding.held_shards.__wrapped__(mesh))
        monkeypatch.setattr(sharding, "held_shards", lambda _, held=all_held[-1]: held)
        fed = sharding.local_rows(rows, mesh)
        assert fed.tolist() == [row for shard in all_held[-1] for row in (2 * shard, 2 * shard + 1)]
        assert sharding.local_rows(rows[:, None][:, :0], mesh).shape == (len(fed), 0)
        monkeypatch.undo()
    assert all_held == expected


@dataclasses.dataclass(frozen=True)
class _Chip(_Device):
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    device_kind: str = "TPU v5"


def _v5p(shape):
    """The chips of a slice, whose hosts have 2 x 2 x 1 of them each."""
    x, y, z = shape
    hosts = [(a, b, c) for c in range(z) for b in range(0, y, 2) for a in range(0, x, 2)]
    chips = [(host, (a + i, b + j, c)) for host, (a, b, c) in enumerate(hosts) for j in (0, 1) for i in (0, 1)]
    return [_Chip(i, host, coords=coords) for i, (host, coords) in enumerate(chips)]


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((4, 4, 4), (1, 64, 1)), ((4, 4, 8), (2, 64, 1)), ((2, 2, 2), (1, 8, 1)), ((4, 4, 4), (1, 16, 4))],
)
def test_every_row_is_fed_where_it_lies_on_slices_of_several_hosts(monkeypatch, shape, sizes):
    mesh = _Sizes(*sizes)
    mesh.devices = sharding.mesh_utils.create_device_mesh(sizes, _v5p(shape), allow_split_physical_axes=True)
    fed, scattered = set(), False
    for process in range(math.prod(shape) // 4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        held = sharding.held_shards.__wrapped__(mesh)
        places = mesh.devices.reshape(-1, sizes[2])
        assert all(
            (process in [chip.process_index for chip in places[shard]]) == (shard in held)
            for shard in range(len(places))
        )
        scattered |= held != tuple(range(held[0], held[0] + len(held)))
        fed |= {*held}
    assert scattered and fed == set(range(len(places)))


def test_only_data_spans_slices(monkeypatch):
    slices = [_Device(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match="data=1 must be a multiple of the 2 slices"):
        sharding.make_mesh(MeshConfig(1, -1, 1), slices)
    shapes = {}

    def hybrid(inner, outer, devices, **_):
        shapes.update(inner=inner, outer=outer)
        return np.array(devices, object).reshape(tuple(np.multiply(inner, outer)))

    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", hybrid)
    monkeypatch.setattr(sharding, "Mesh", lambda places, *_, **__: places)
    assert sharding.make_mesh(MeshConfig(-1, 2, 2), slices).shape == (2, 2, 2)
    assert shapes == {"inner": (1, 2, 2), "outer": (2, 1, 1)}


def test_first_moments_in_bfloat16():
    stage = StageConfig("s", "d.json", first_moment="bfloat16", freeze=("^vision/",))
    mesh = sharding.make_mesh()
    params = state.abstract_parameters(tiny(), mesh)
    moments = state.abstract(params, optim.optimizer(stage, params), mesh).opt_state[1].inner_state[0]
    assert {x.dtype for x in jax.tree.leaves(moments.mu)} == {np.dtype(jax.numpy.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(moments.nu)} == {np.dtype(np.float32)}
    with pytest.raises(UserError, match="first_moment='float16' is unknown; allowed: float32, bfloat16, int8"):
        StageConfig("s", "d.json", first_moment="float16")


def test_the_mesh_is_a_key_of_the_run():
    stage = {"name": "s", "data": "d.json", "max_length": 4000}
    run = from_dict(RunConfig, {"model": tiny(), "stages": [stage], "tokenizer": "t", "mesh": {"data": 1, "fsdp": -1}})
    assert run.mesh == MeshConfig(1, -1, 1)


# Moments of other shapes than their parameters, and towers cut on loading: four devices, in a process of their own.


def _run_worker(name, folder, devices):
    """What tests/helpers/`name`, which writes two files, gave on so many CPU devices."""
    outputs = [folder / "arrays.npz", folder / "report.json"]
    worker = Path(__file__).parents[1] / "helpers" / name
    root = worker.parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root}:{root}/tests",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(root / ".jax_cache"),
    }
    command = [sys.executable, worker, *outputs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(outputs[0])), json.loads(outputs[1].read_text())


def test_factored_moments_lie_with_their_parameters_and_update_as_on_one_device(tmp_path):
    # It compares each array's place after two updates, and cuts a tower in its place.
    arrays, report = _run_worker("state_worker.py", tmp_path, 4)
    for mesh, least in {"fsdp": 1.3, "tensor": 1.2, "mixed": 1.5}.items():
        for name in ("adafactor", "adafactor, masked", "sm3"):
            held = report[f"{mesh}|{name}"].values()
            whole, here = (sum(math.prod(shapes[i]) for shapes in held) for i in (0, 1))
            assert whole > least * here, (mesh, name)
    # Of (vocabulary, width), split over tensor and fsdp, the mean over rows and that over columns.
    rows, columns = (report["mixed|adafactor"][f"[0].{name}['llm']['embedding']"] for name in ("v_row", "v_col"))
    assert (rows, columns) == ([[16], [8]], [[128], [64]])
    for key, array in arrays.items():
        mesh, rest = key.split("|", 1)
        np.testing.assert_allclose(array, arrays[f"one|{rest}"], rtol=1e-4, atol=1e-6, err_msg=key)


# Eight devices, in a process of their own.


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return _run_worker("mesh_worker.py", tmp_path_factory.mktemp("meshes"), 8)


MESHES = ["data", "fsdp", "tensor", "mixed", "copies", "mixed, released", "fsdp, muon", "mixed, muon"]


@pytest.mark.slow
def test_copies_add_up_sums_of_16_bits(ran):
    arrays, report = ran
    name = "copies, narrow sums"
    assert report[name]["losses"][0]["total"] == pytest.approx(report["one"]["losses"][0]["total"], rel=1e-5)
    ones = {key: x for key, x in arrays.items() if key.startswith("one|mu|")}
    size, error = (
        np.sqrt(sum(np.sum(np.square(x - arrays[key.replace("one", other, 1)] * scale)) for key, x in ones.items()))
        for other, scale in (("one", 0), (name, 1))
    )
    assert 1e-5 < error / size < 0.01  # of the means of both steps' gradients; bfloat16 has 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_losses_gradients_and_parameters_of_one_device(ran, name):
    arrays, report = ran
    one = ", ".join(["one", *name.split(", ")[1:]])
    for ours, theirs in zip(report[name]["losses"], report[one]["losses"], strict=True):
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-5, err_msg=key)
    # The second loss is that of other parameters.
    assert report[name]["losses"][0]["total"] > report[name]["losses"][1]["total"] + 0.1
    compared = collections.Counter()
    for key, theirs in arrays.items():
        case, kind, path = key.split("|")
        if case == one and kind != "init":
            np.testing.assert_allclose(arrays[f"{name}|{kind}|{path}"], theirs, atol=1e-5, rtol=1e-4, err_msg=key)
            compared[kind] += 1
    assert compared["mu"] == compared["after"] > 40


@pytest.mark.slow
def test_parameters_begin_with_the_same_bits_on_every_mesh(ran):
    arrays, _ = ran
    initial = [key for key in arrays if key.startswith("one|init|")]
    assert len(initial) > 40
    for key in initial:
        np.testing.assert_array_equal(arrays[key], arrays[key.replace("one|", "mixed|")], err_msg=key)


@pytest.mark.slow
def test_parameters_and_moments_are_dealt(ran):
    _, report = ran
    assert report["one"]["state_here"] == report["one"]["state"]
    assert report["data"]["state_here"] == report["data"]["state"]
    assert report["fsdp"]["state_here"] < 1.02 * report["fsdp"]["state"] / 8 + 4000  # norms are copied
    assert report["tensor"]["state_here"] < report["tensor"]["state"] / 4
    assert report["mixed"]["state_here"] < 1.1 * report["mixed"]["state"] / 4 + 4000


@pytest.mark.slow
def test_constraints_are_in_the_program(ran):
    _, report = ran
    assert report["one"]["constraints"] == 0 and report["one"]["manual"] == 0
    for name in MESHES:
        # Linen's logical constraints silently vanish where the mesh is not set the right way.
        assert report[name]["constraints"] > 60 and report[name]["manual"] > 10


def _sizes(report, kind):
    return [math.prod(int(n) for n in shape.split(",") if n) for k, shapes in report if k == kind for shape in shapes]


@pytest.mark.slow
def test_only_gradients_travel_where_rows_alone_are_dealt(ran):
    collectives = ran[1]["data"]["collectives"]
    assert {kind for kind, _ in collectives} == {"all-reduce"}
    largest = ran[1]["data"]["largest"]
    assert max(_sizes(collectives, "all-reduce")) <= largest


@pytest.mark.slow
def test_hidden_states_of_all_devices_meet_nowhere(ran):
    report = ran[1]["fsdp"]
    collectives = report["collectives"]
    whole = ROWS * LENGTH * WIDTH
    assert report["largest"] < whole / 4  # so that the two can be distinguished
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute"):
        # Parameters, their gradients, and token ids for the embedding's lookup.
        assert max(_sizes(collectives, kind), default=0) <= max(report["largest"], ROWS * LENGTH), kind
    # Embeddings, columns against rows: a device's own share of them.
    assert max(_sizes(collectives, "all-to-all")) <= whole / 8 / 8


@pytest.mark.slow
def test_microbatches_are_cut_where_they_lie(ran):
    # Rows of a cut batch would travel as 24 x 24 crops, the only arrays with such an axis.
    for name in ("mixed", "mixed, released"):
        shapes = [shape for _, shapes in ran[1][name]["collectives"] for shape in shapes]
        assert len(shapes) > 20 and not any("24,24,3" in shape for shape in shapes)


@pytest.mark.slow
def test_gradients_of_copies_are_added_up_once_a_step(ran):
    bytes_sent, runs = ran[1]["copies"]["sent"]["all-reduce data"]
    # In float32 over two copies, and the losses with them; both microbatches together.
    assert bytes_sent == pytest.approx(4 * ran[1]["copies"]["parameters_here"], rel=0.01) and runs <= 2


@pytest.mark.slow
def test_weights_are_gathered_once_a_step_on_request(ran):
    report = ran[1]["copies"]
    whole = 3 * 4 * report["parameters_here"]  # the float32 shards of three other devices
    # Gathered for each pass of two microbatches the same weights are 1.7 times that.
    assert report["sent"]["all-gather fsdp"][0] < 1.2 * whole
