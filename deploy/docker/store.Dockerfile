# The adapter store, with its clients of S3 and Redis; no torch.
# checkov:skip=CKV_DOCKER_2: OCI images have no HEALTHCHECK; the chart's probes ask the service's own gRPC health
# checkov:skip=CKV_DOCKER_7: the default of BASE names a version
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
# Where the build's own pip is to look first, and whether only there; `images.sh` fills it where no network is.
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
RUN python3 -m venv /opt/multilora
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY protos protos
COPY kernels kernels
COPY services services
RUN /opt/multilora/bin/pip install --no-cache-dir --constraint constraints.txt '.[store,s3,redis,cli]'

FROM ${BASE}
COPY --from=build /opt/multilora /opt/multilora
ENV PATH=/opt/multilora/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
EXPOSE 50052 9090
ENTRYPOINT ["multilora-adapter-store"]
