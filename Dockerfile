# CPU image: installs from the pinned constraints, runs the quick start.
#   docker build -t aer-megatron . && docker run --rm aer-megatron
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/aer-megatron
ENV OMP_NUM_THREADS=1 PIP_NO_CACHE_DIR=1

# Dependencies change less often than code: this layer is rebuilt only when they or the extension do.
COPY Makefile pyproject.toml setup.py MANIFEST.in ./
COPY constraints constraints
COPY tools tools
COPY cpp cpp
COPY aer_megatron/__init__.py aer_megatron/__init__.py
RUN make install

COPY . .
RUN make install

CMD ["make", "quickstart"]
