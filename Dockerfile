# For nodes with NVIDIA GPUs: docker build -t training-launcher .

# -devel has nvcc, with which DeepSpeed builds its extensions on first use. Its torch is in the range of pyproject.toml.
ARG PYTORCH_IMAGE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-devel

FROM python:3.11-slim AS wheel
WORKDIR /source
RUN pip install --no-cache-dir "hatchling>=1.25,<2"
COPY pyproject.toml README.md LICENSE ./
COPY launcher/ launcher/
COPY strategies/ strategies/
COPY slurm/ slurm/
RUN python -m hatchling build -t wheel -d /wheels

# hadolint ignore=DL3006
FROM ${PYTORCH_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# Into the image's own Python, which has torch.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir /wheels/*.whl
# A number, so that Kubernetes can check that it is not root.
RUN groupadd --gid 10001 launcher \
    && useradd --uid 10001 --gid launcher --create-home launcher \
    && install --directory --owner launcher --group launcher /workspace
USER 10001:10001
# The user's code, runs/ and wandb/: mount a volume here.
WORKDIR /workspace
ENTRYPOINT ["launcher"]
CMD ["--help"]
