#!/usr/bin/env bash
# Builds both images, with Docker or else buildah, then runs them together and has a call answered: `make images`.
# Steps may be named to run some alone: base_image build_images smoke_run; and cuda_image, which no run includes.
# Where no registry can be reached, the base image is made of Debian's packages, and wheels are gathered by pip here.
set -euo pipefail
cd "$(dirname "$0")/../.."

TAG=${TAG:-dev}
WORK=${DATA_DIR:-.data}/images
PYTHON=${VENV:-.venv}/bin/python
BASE=docker.io/library/python:3.11-slim-bookworm
STORE=localhost/multilora-adapter-store:$TAG
INFERENCE=localhost/multilora-inference:$TAG
TORCH=torch==2.13.0
CUDA_INDEX=${CUDA_INDEX:-https://download.pytorch.org/whl/cu130} # of torch's build for the driver of the nodes
PORTS=(50152 50151 18000) # store, inference, HTTP: of the host, which the containers share

# Builders and containers inside a container need the simplest of everything.
build() { buildah --storage-driver vfs "$1" --isolation chroot "${@:2}"; }
containers() { podman --storage-driver vfs --runtime runc --cgroup-manager cgroupfs "$@"; }
limits=(--ulimit nofile=1024:1024 --ulimit nproc=4096:4096)
if docker info >/dev/null 2>&1; then
  build() { docker "$@"; }
  containers() { docker "$@"; }
  limits=()
fi

base_image() {
  containers image inspect "$BASE" >/dev/null 2>&1 && return
  containers pull "$BASE" >/dev/null 2>&1 && return
  echo "no registry answers: making the base image of Debian's packages"
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates,g++ bookworm "$WORK/base.tar"
  containers import --change "LABEL multilora.made=here" "$WORK/base.tar" "$BASE" >/dev/null
  rm "$WORK/base.tar"
}

base_is_made_here() { # by an earlier run too, of whichever checkout
  containers image inspect "$BASE" | grep -q '"multilora.made": "here"'
}

gather_wheels() { # extras
  local gathered=$WORK/wheels/.gathered-$1
  [ -e "$gathered" ] && [ ! constraints.txt -nt "$gathered" ] && return
  "$PYTHON" -m pip download --quiet --dest "$WORK/wheels" --constraint constraints.txt \
    hatchling "$TORCH" async-timeout ".[$1]" # redis wants async-timeout on Debian's 3.11.2
  touch "$gathered"
}

build_image() { # tag, extras its wheels come from, flags of `build`
  local tag=$1 extras=$2 from_here=()
  if base_is_made_here; then
    gather_wheels "$extras"
    from_here=(--volume "$PWD/$WORK/wheels:/wheels:ro" --build-arg PIP_FIND_LINKS=/wheels --build-arg PIP_NO_INDEX=1)
  fi
  build build "${from_here[@]}" --tag "$tag" "${@:3}" .
}

build_images() {
  build_image "$STORE" store,s3,redis,cli --file deploy/docker/store.Dockerfile
  build_image "$INFERENCE" inference --file deploy/docker/inference.Dockerfile --target cpu
}

cuda_image() {
  build_image "$INFERENCE-cuda" inference,gpu --file deploy/docker/inference.Dockerfile --target cuda \
    --build-arg "TORCH=$TORCH" --build-arg "TORCH_INDEX=$CUDA_INDEX" --build-arg EXTRAS=inference,gpu
}

start() { # name, image, flags of `run` up to --, arguments of the service
  local name=$1 image=$2 options=()
  shift 2
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  containers run --detach --rm --name "$name" --network host --read-only --tmpfs /tmp --cap-drop all \
    --security-opt no-new-privileges "${limits[@]}" "${options[@]}" "$image" "$@" >/dev/null
}

smoke_run() {
  local model data=$WORK/smoke
  model=$("$PYTHON" -c 'import deploy.demo as demo; print(demo.default_model())')
  rm -rf "$data" && mkdir -p "$data/store" "$data/inference" && chmod 0777 "$data"/*
  trap 'containers logs smoke-inference 2>&1 | tail -3; containers stop smoke-inference smoke-store >/dev/null' EXIT
  start smoke-store "$STORE" --volume "$PWD/$data/store:/data" -- --port "${PORTS[0]}" --data-dir /data
  start smoke-inference "$INFERENCE" --volume "$PWD/$data/inference:/data" --volume "$model:/models/model.gguf:ro" -- \
    --model /models/model.gguf --served-model-name smollm2-135m-instruct --adapter-store "127.0.0.1:${PORTS[0]}" \
    --data-dir /data --port "${PORTS[1]}" --http-port "${PORTS[2]}" --max-model-len 2048
  wait_until_ready
  local client=("$PYTHON" -m services.cli.main --server "127.0.0.1:${PORTS[1]}" --store "127.0.0.1:${PORTS[0]}")
  "${client[@]}" base-models register smollm2-135m-instruct --from-server --accept HuggingFaceTB/SmolLM2-135M-Instruct
  "${client[@]}" adapters register pirate tests/assets/adapters/pirate --base-model smollm2-135m-instruct
  "${client[@]}" generate --chat --adapter pirate --max-tokens 24 "Tell me about the sea."
}

wait_until_ready() {
  for _ in $(seq 120); do
    curl --silent --fail "http://127.0.0.1:${PORTS[2]}/health" >/dev/null && return
    sleep 1
  done
  echo "the inference container did not become ready" >&2
  return 1
}

mkdir -p "$WORK"
[ $# -gt 0 ] || set -- base_image build_images smoke_run
for step; do "$step"; done
