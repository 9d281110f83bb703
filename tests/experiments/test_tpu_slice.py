"""Hosts of a TPU slice, counted by what a metadata server says of it."""

import contextlib
import dataclasses
import http.server
import threading

import pytest

from experiments.environment import Environment
from experiments.tpu_slice import count_hosts

PATH = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"


@contextlib.contextmanager
def metadata_server(endpoints):
    """Its address; without endpoints it answers 404, as on machines of another kind."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = endpoints is not None and self.path == PATH and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(endpoints.encode() if known else b"")

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("endpoints", "hosts"),
    [("unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", 2), ("host-0,host-1,host-2,host-3", 4), ("host-0", 1), (None, 1)],
)  # fmt: skip
def test_hosts_of_a_slice(endpoints, hosts):
    with metadata_server(endpoints) as address:
        machine = Environment(variables={"GCE_METADATA_IP": address}, versions={"libtpu": "0.0.51"}, num_tpus=4)
        assert count_hosts(machine) == hosts
        assert count_hosts(dataclasses.replace(machine, num_tpus=0)) == 1
        assert count_hosts(dataclasses.replace(machine, versions={"libtpu": None})) == 1
        assert count_hosts(dataclasses.replace(machine, variables=machine.variables | {"TPU_SKIP_MDS_QUERY": "1"})) == 1


def test_no_server():
    machine = Environment(variables={"GCE_METADATA_IP": "127.0.0.1:9"}, versions={"libtpu": "0.0.51"}, num_tpus=4)
    assert count_hosts(machine) == 1
