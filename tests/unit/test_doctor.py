"""`explain doctor` against a scripted server."""

from scripted_server import Scripted, scripted_server
from tritonclient.grpc import service_pb2

from explain_client.doctor import diagnose


class Old(Scripted):
    """An older server, whose models have another contract."""

    def ServerMetadata(self, request, context):  # noqa: N802
        return service_pb2.ServerMetadataResponse(name="triton", version="2.30.0")

    def ModelMetadata(self, request, context):  # noqa: N802
        outputs = [service_pb2.ModelMetadataResponse.TensorMetadata(name="PROBABILITIES", datatype="FP32")]
        return service_pb2.ModelMetadataResponse(name=request.name, outputs=outputs)

    def ModelReady(self, request, context):  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name != "classify")


def test_doctor_names_versions_that_do_not_fit():
    with scripted_server(0, Old) as (_, url):
        findings = {finding.name: finding for finding in diagnose(url)}
    assert "triton 2.30.0 is not what this client was made for: 2.51 or newer" in findings["version"].message
    assert "'classify' is not ready" in findings["classify"].message
    assert "no output ATTRIBUTIONS, CONVERGENCE_DELTA" in findings["explain"].message
    assert not any(finding.is_good for finding in findings.values())
