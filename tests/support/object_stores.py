"""Object stores on this machine: servers of the protocols of gs:// and s3://, in threads, with everything in memory."""

import contextlib
import functools
import logging
import os
from http import HTTPStatus
from unittest import mock

BUCKET = "my-bucket"


def _download(request, response, storage, *args, _without, **kwargs):
    """Serves an object's bytes as gs:// does, with its generation, and none to who has that one already.

    The emulator leaves both out. tensorstore, which writes arrays, needs them for an object that it reads again.
    """
    _without(request, response, storage, *args, **kwargs)
    if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        generation = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])["generation"]
        response["x-goog-generation"] = generation
        if generation in request.query.get("ifGenerationNotMatch", ()):
            response.status, response._content = HTTPStatus.NOT_MODIFIED, b""


@contextlib.contextmanager
def servers():
    """Serves both stores, each with a bucket BUCKET, and sets the environment by which programs find them."""
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or it prints a line for each request
    gs = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    gs.start()
    s3.start()
    gs_address = f"http://127.0.0.1:{gs._api._httpd.server_port}"  # type: ignore[union-attr]
    s3_address = f"http://127.0.0.1:{s3.get_host_and_port()[1]}"
    environment = {
        "STORAGE_EMULATOR_HOST": gs_address,
        "TENSORSTORE_GCS_HTTP_URL": gs_address,
        "AWS_ENDPOINT_URL": s3_address,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        download = functools.partial(_download, _without=objects.download)
        with mock.patch.dict(os.environ, environment), mock.patch.object(objects, "download", download):
            import botocore.session

            botocore.session.get_session().create_client("s3").create_bucket(Bucket=BUCKET)
            yield
    finally:
        gs.stop()
        s3.stop()
