# Images for the tensorrt backend. Written for, but not yet built on, a host with Docker.
#
#   docker build -f docker/tensorrt.Dockerfile --target rtx -t trtllm-redrafter:rtx .
#   docker run --rm --gpus all -v "$PWD/models:/workspace/models" trtllm-redrafter:rtx doctor
#
# `rtx`: TensorRT-RTX from pip packages, for RTX cards, and for compiling their engines without a GPU.
# `datacentre`: NVIDIA's TensorRT container (10.15 or newer), for H100, H200 and B200. Another: --build-arg TENSORRT_IMAGE=...
ARG PYTHON_IMAGE=python:3.12-slim
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:26.06-py3

FROM ${PYTHON_IMAGE} AS rtx
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
WORKDIR /opt/trtllm-redrafter
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY trtllm_redrafter ./trtllm_redrafter
RUN python3 -m pip install --constraint constraints.txt --editable '.[tensorrt-rtx,onnxruntime]' \
    && useradd --create-home --uid 10001 redrafter \
    && install -d -o redrafter -g redrafter /workspace
WORKDIR /workspace
USER 10001
ENTRYPOINT ["trtllm-redrafter"]
CMD ["doctor", "--set", "backend=tensorrt"]

FROM ${TENSORRT_IMAGE} AS datacentre
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
WORKDIR /opt/trtllm-redrafter
COPY pyproject.toml README.md LICENSE ./
COPY trtllm_redrafter ./trtllm_redrafter
# TensorRT stays the container's: a plan runs on the version that compiled it.
RUN python3 -m pip list --format=freeze > /tmp/image.txt \
    && python3 -m pip install --constraint /tmp/image.txt --editable . onnx \
    && rm /tmp/image.txt \
    && useradd --create-home --uid 10001 redrafter \
    && install -d -o redrafter -g redrafter /workspace
WORKDIR /workspace
USER 10001
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "trtllm-redrafter"]
CMD ["doctor", "--set", "backend=tensorrt"]
