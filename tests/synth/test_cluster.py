"""The stages on a Ray cluster of two machines, one of which dies: the output is that of a local run."""

import os
import threading
import time

import pytest
from helpers import model_server
from helpers.synth_run import OUTPUT, make_config, run

from fusion_jax.synth import cluster
from fusion_jax.synth.stages import STAGES


def test_passes_hold_each_model_once():
    passes = cluster.passes(list(STAGES))
    assert [stage for one in passes for _, stages in one for stage in stages] == list(STAGES)
    assert [[pool for pool, _ in one] for one in passes] == [
        ["cpu", "llm", "images", "scorer"],
        ["llm", "vision"],
        ["llm", "scorer"],
    ]


@pytest.mark.slow
@pytest.mark.skipif("FUSION_JAX_SOAK" not in os.environ, reason="minutes on two cores: set FUSION_JAX_SOAK=1")
def test_a_machine_dies(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # beside other tests, nice workers would never run
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [machines.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=machines.address, log_to_driver=False)
    killed = []
    try:
        with model_server.running(wrong=0.2, latency=0.1) as url:
            config = make_config(tmp_path, url, 40, traffic={"concurrency": 4, "timeout": 30.0}, block=4)
            config |= {"engine": "ray", "ray": {"actors": {"llm": 2, "images": 2, "vision": 2}}}

            def kill_one():
                while model_server.stats(url)["answered"] < 60:
                    time.sleep(0.1)
                machines.remove_node(nodes[0], allow_graceful=False)
                killed.append(model_server.stats(url)["answered"])

            killer = threading.Thread(target=kill_one, daemon=True)
            killer.start()
            run(config, tmp_path / "cluster")
            killer.join(60)
            seen = model_server.stats(url)
    finally:
        ray.shutdown()
        machines.shutdown()
    assert killed and killed[0] < seen["answered"]
    # What the dead machine had under way is asked for again, and no more: each of its workers had at most its places.
    assert seen["answered_again"] <= 3 * 8
    with model_server.running(wrong=0.2) as url:
        run(make_config(tmp_path, url, 40, block=4), tmp_path / "local")
    for name in OUTPUT:
        assert (tmp_path / "cluster" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
