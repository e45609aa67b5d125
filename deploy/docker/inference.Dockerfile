# The inference service. `--target cpu` (the default), or cuda, with the arguments that images.sh gives it.
# checkov:skip=CKV_DOCKER_2: OCI images have no HEALTHCHECK; the chart's probes ask the service's own gRPC health
# checkov:skip=CKV_DOCKER_7: the default of BASE names a version
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=inference
# Where the build's own pip is to look first, and whether only there; `images.sh` fills it where no network is.
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Not pinned: Debian keeps one version of a package at a time, with its security fixes.
# hadolint ignore=DL3008
RUN command -v g++ || { apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/multilora
WORKDIR /src
COPY constraints.txt ./
RUN /opt/multilora/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" "${TORCH}"
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY protos protos
COPY kernels kernels
COPY services services
RUN /opt/multilora/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

FROM ${BASE} AS runtime
COPY --from=build /opt/multilora /opt/multilora
ENV PATH=/opt/multilora/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp TRITON_CACHE_DIR=/tmp/triton
USER 10001:10001
EXPOSE 50051 8000
ENTRYPOINT ["multilora-inference"]

# Triton compiles its launchers where they run, with a C compiler; the driver's library comes from the node.
FROM runtime AS cuda
USER 0
# hadolint ignore=DL3008
RUN command -v gcc || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }
USER 10001:10001

FROM runtime AS cpu
