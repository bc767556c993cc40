# Two images from one file; neither contains weights or data.
#   docker build --target cpu -t aer-megatron:cpu .                      CPU: `docker run --rm aer-megatron:cpu` runs the quick start
#   docker build -t aer-megatron:gpu .                                   H100: trainer in /opt/aer, SGLang servers in /opt/sglang
#   docker build --build-arg WITH_APEX=1 -t aer-megatron:gpu-apex .      the same with NVIDIA apex, built from source
# TransformerEngine (and apex) are compiled for sm_90 in the build: 47 minutes with MAX_JOBS=2, some 4 GB of memory a job.
# tools/check_image_pins.py checks that every apt and pip name and version below resolves; tools/pin_images.py writes the
# digests of the base images into the three arguments, and any of them may be given: --build-arg PYTHON_311=...
# Root installs system packages and, in the GPU image, the environments; what runs is the user aer (uid 1000).
ARG WITH_APEX=0
ARG PYTHON_311=python:3.11-slim-bookworm
ARG PYTHON_312=python:3.12-slim-bookworm
ARG CUDA=nvidia/cuda:13.0.2-devel-ubuntu24.04

# ---------------------------------------------------------------- CPU
# hadolint ignore=DL3006
FROM ${PYTHON_311} AS cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++=4:12.2.* git=1:2.39.* iproute2=6.1.* make=4.3-* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 aer \
    && install --directory --owner aer --group aer /opt/aer-megatron
USER aer
WORKDIR /opt/aer-megatron
ENV OMP_NUM_THREADS=1 PIP_NO_CACHE_DIR=1
# Dependencies change less often than code: this layer is rebuilt only when they or the extension do.
COPY --chown=aer:aer Makefile pyproject.toml setup.py MANIFEST.in LICENSE NOTICE ./
COPY --chown=aer:aer constraints constraints
COPY --chown=aer:aer tools tools
COPY --chown=aer:aer cpp cpp
COPY --chown=aer:aer aer_megatron/__init__.py aer_megatron/__init__.py
RUN make install
COPY --chown=aer:aer . .
RUN make install && bash tools/smoke_test.sh .venv/bin/python
CMD ["make", "quickstart"]

# ---------------------------------------------------------------- GPU: toolkit and system
# The toolkit is that of the CUDA image; the system is Debian, whose Python image brings 3.12.
# hadolint ignore=DL3006
FROM ${CUDA} AS cuda

# hadolint ignore=DL3006
FROM ${PYTHON_312} AS gpu-system
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# iproute2: make test-multinode; libnuma1, libibverbs1 and librdmacm1: SGLang's kernels and NCCL's InfiniBand transport
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++=4:12.2.* git=1:2.39.* iproute2=6.1.* libibverbs1=44.0-* libnuma1=2.0.16-* librdmacm1=44.0-* make=4.3-* \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cuda /usr/local/cuda-13.0 /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda \
    PATH=/usr/local/cuda/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OMP_NUM_THREADS=1 \
    PIP_NO_CACHE_DIR=1

# ---------------------------------------------------------------- GPU: the servers' environment
FROM gpu-system AS servers
COPY constraints/sglang-gpu-py312.txt /tmp/
RUN python -m venv /opt/sglang \
    && /opt/sglang/bin/pip install --constraint /tmp/sglang-gpu-py312.txt sglang==0.5.23

# ---------------------------------------------------------------- GPU: the trainer's environment
FROM gpu-system AS trainer
ARG MAX_JOBS=2
COPY constraints/gpu-py312.txt /tmp/
ENV PATH=/opt/aer/bin:$PATH
RUN python -m venv /opt/aer \
    && pip install --constraint /tmp/gpu-py312.txt \
        torch==2.13.0 megatron-core==0.19.2 cmake==4.4.4 ninja==1.13.2 pybind11==3.1.0 setuptools==84.2.1 wheel==0.48.0
# without build isolation: compiled against the torch installed above, with the CUDA headers of its packages
RUN NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 NVTE_CUDA_ARCHS=90 \
    CPATH=/usr/local/cuda/include MAX_JOBS="$MAX_JOBS" \
    pip install --constraint /tmp/gpu-py312.txt --no-build-isolation \
        'transformer-engine[pytorch,core-cu13]==2.20.2'

FROM trainer AS trainer-apex-0

FROM trainer AS trainer-apex-1
ARG MAX_JOBS=2
# release 25.09; on the package index "apex" is another project
ARG APEX_COMMIT=4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49
RUN git clone --filter=blob:none https://github.com/NVIDIA/apex /tmp/apex \
    && git -C /tmp/apex checkout --quiet "$APEX_COMMIT" \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS="$MAX_JOBS" \
        pip install --no-build-isolation --no-deps /tmp/apex \
    && rm -rf /tmp/apex

# ---------------------------------------------------------------- GPU: the image
# hadolint ignore=DL3006
FROM trainer-apex-${WITH_APEX} AS gpu
COPY --from=servers /opt/sglang /opt/sglang
ENV SGLANG_PYTHON=/opt/sglang/bin/python PIP_NO_CACHE_DIR=1
WORKDIR /opt/aer-megatron
COPY pyproject.toml setup.py MANIFEST.in LICENSE NOTICE ./
COPY cpp cpp
COPY aer_megatron/__init__.py aer_megatron/__init__.py
RUN pip install --constraint /tmp/gpu-py312.txt --no-build-isolation --editable '.[test]'
COPY . .
# no device is visible in a build: the smoke test trains on the CPU with this image's own packages
RUN pip install --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 1000 aer \
    && chown --recursive aer:aer /opt/aer-megatron
USER aer
RUN bash tools/smoke_test.sh /opt/aer/bin/python
CMD ["bash", "tools/gpu_acceptance.sh"]
