"""`python google_store.py PORT DIRECTORY`: Google's object store with one bucket, played by an emulator.

Objects are files below DIRECTORY.
"""

import sys

from gcp_storage_emulator.handlers import objects

download = objects.download


def download_with_generation(request, response, storage, *args, **kwargs):
    """As Google answers: TensorStore reads no object without the number of its generation, which the emulator leaves out."""
    download(request, response, storage, *args, **kwargs)
    if response.status < 300:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]


objects.download = download_with_generation  # before the server puts it into its table

from gcp_storage_emulator.server import create_server  # noqa: E402

port, directory = sys.argv[1:]
create_server("localhost", int(port), data_dir=directory, default_bucket="bucket").run()
