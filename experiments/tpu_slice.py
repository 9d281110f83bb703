"""How many hosts a TPU slice has, where only the machine's metadata server tells: TPU VMs of Compute Engine, but not of GKE."""

import urllib.request

from experiments.environment import Environment

_TIMEOUT_SECONDS = 5.0


def count_hosts(machine: Environment) -> int:
    """1 also where there is no TPU, or no metadata server that knows of a slice (Colab, Kaggle).

    The attribute and the variables are those by which JAX then finds its neighbours (jax/_src/clusters/cloud_tpu_cluster.py).
    """
    if not machine.num_tpus or machine.versions["libtpu"] is None or "TPU_SKIP_MDS_QUERY" in machine.variables:
        return 1
    server = machine.variables.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine
    try:
        with direct.open(request, timeout=_TIMEOUT_SECONDS) as answer:
            return answer.read().decode().count(",") + 1
    except OSError:  # URLError is one
        return 1
