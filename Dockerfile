# An image with the project set up for training, at /workspace with its .venv, as launch/kubernetes.yaml expects it.
# NOT BUILT YET: there was no image builder where this was written; its commands are those of launch/setup.sh.
#
#   docker build --tag nextlat-dist .
#   docker run --rm --gpus all --shm-size=8g nextlat-dist bash launch/quickstart.sh
#
# The default build of torch brings CUDA and needs the host's driver only; TORCH_SUFFIX=+cpu takes the CPU build.

FROM python:3.11-slim-bookworm

# A compiler for what pip finds no wheel of, ssh and pdsh for launch/multi_node.sh.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git gcc g++ openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY . .
ARG TORCH_SUFFIX=""
RUN python3 -m venv .venv \
    && .venv/bin/python -m pip install --no-cache-dir --constraint launch/constraints.txt \
        "$(grep '^torch==' launch/constraints.txt)$TORCH_SUFFIX" \
    && .venv/bin/python -m pip install --no-cache-dir --constraint launch/constraints.txt --editable '.[train]'
ENV PATH="/workspace/.venv/bin:$PATH"
CMD ["nextlat", "doctor"]
